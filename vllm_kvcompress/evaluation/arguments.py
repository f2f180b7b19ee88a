# SPDX-License-Identifier: Apache-2.0
"""Types of command-line arguments."""

from __future__ import annotations

import argparse
import json
from typing import Any


def numbers(value: str) -> list[int]:
    """`1024` or `1024,2048`."""
    try:
        return [int(number) for number in value.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"not a number or comma-separated numbers: {value!r}") from None


def json_object(value: str) -> dict[str, Any]:
    """`{"key": ...}`."""
    try:
        parsed = json.loads(value)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise argparse.ArgumentTypeError("must be a JSON object")
    return parsed
