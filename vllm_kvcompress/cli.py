# SPDX-License-Identifier: Apache-2.0
"""The `kvcompress` command. Each subcommand is a module with `SUMMARY`, `add_arguments(parser)` and `run(args)`."""

from __future__ import annotations

import argparse
import importlib
import sys

from vllm_kvcompress import __version__
from vllm_kvcompress.errors import KVCompressError

# Modules are imported only for the command that is run: `kvcompress inspect` must not wait for vLLM to load.
_COMMANDS = {
    "calibrate": "vllm_kvcompress.calibration.command",
    "inspect": "vllm_kvcompress.rotations.inspect_command",
    "import-zoo": "vllm_kvcompress.rotations.import_command",
    "plan": "vllm_kvcompress.capacity.command",
    "eval": "vllm_kvcompress.evaluation.command",
    "eval-conversations": "vllm_kvcompress.evaluation.conversation_command",
    "doctor": "vllm_kvcompress.operations.command",
    "demo": "vllm_kvcompress.demo.command",
}


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand; returns the process's exit status (2 for bad input)."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="kvcompress",
        description="KV cache pages of 2 to 4 bits for vLLM: calibrate, inspect, plan, evaluate, examine, demonstrate.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    wanted = next((word for word in argv if word in _COMMANDS), None)
    for name, module_name in _COMMANDS.items():
        if wanted in (None, name):
            module = importlib.import_module(module_name)
            module.add_arguments(subparsers.add_parser(name, help=module.SUMMARY, description=module.__doc__))
    args = parser.parse_args(argv)
    try:
        return importlib.import_module(_COMMANDS[args.command]).run(args) or 0
    except KVCompressError as error:
        print(f"kvcompress {args.command}: {error}", file=sys.stderr)
        return 2
