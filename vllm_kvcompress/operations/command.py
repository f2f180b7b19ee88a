# SPDX-License-Identifier: Apache-2.0
"""Look at versions, the device, the CUDA extension, the places of vLLM that are leant on and rotation files.

The exit status is 1 if something would keep an engine from serving, 0 if not.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import asdict

from vllm_kvcompress.logs import quiet
from vllm_kvcompress.operations.doctor import Finding, examine

SUMMARY = "check this installation, its device and its rotation files"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "model", metavar="MODEL", nargs="?", help="check this model's rotation file too: folder or name"
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(args: argparse.Namespace) -> int:
    """Examine and print; 1 with errors."""
    with quiet():
        found = examine(args.model)
    counts = Counter(finding.status for finding in found)
    if args.json:
        print(
            json.dumps({"healthy": not counts["error"], "findings": [asdict(finding) for finding in found]}, indent=2)
        )
    else:
        print("\n".join(_lines(found)))
        print(f"\n{counts['error']} errors, {counts['warning']} warnings")
    return 1 if counts["error"] else 0


def _lines(found: list[Finding]) -> list[str]:
    width = max(len(finding.check) for finding in found)
    lines = []
    for finding in found:
        status = finding.status if finding.status == "ok" else finding.status.upper()
        lines.append(f"{status:<8} {finding.check:<{width}}  {finding.text}")
        if finding.fix:
            lines.append(f"{'':<8} {'':<{width}}  to do: {finding.fix}")
    return lines
