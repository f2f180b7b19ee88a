# SPDX-License-Identifier: Apache-2.0
"""Sizes and tables as people write and read them."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence

_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?b)?", re.IGNORECASE)


def parse_bytes(text: str) -> int:
    """Bytes: 80GiB and 80G are 2^30 each, 80GB and 80g 10^9 (lone letters as vLLM reads them), 123456 plain.

    Raises:
        argparse.ArgumentTypeError: anything else, or nothing left of it in whole bytes.
    """
    match = _SIZE.fullmatch(text.strip())
    value = 0
    if match:
        number, letter, unit = match.groups()
        binary = unit.lower() == "ib" if unit else letter.isupper()
        value = int(float(number) * (1024 if binary else 1000) ** _POWERS[letter.lower()])
    if value <= 0 or (match and (match[3] or "").lower() == "ib" and not match[2]):
        raise argparse.ArgumentTypeError(
            f"not a size: {text!r}; write bytes, or 80GiB (also 80G, 2^30 each), 80GB (also 80g, 10^9 each), "
            "with K, M, G or T"
        )
    return value


def gib(size: float) -> str:
    """A size in GiB, or in MiB if it is less than one."""
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table: the first row is its head, the first column is set left and the others right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells))
    lines.insert(1, "  ".join("-" * width for width in widths))
    return lines
