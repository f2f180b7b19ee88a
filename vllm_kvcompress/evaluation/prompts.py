# SPDX-License-Identifier: Apache-2.0
"""What is fed to every engine: token sequences, and which of their predictions are scored."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Prompt:
    """One sequence. Row p is the prediction made after tokens[: p + 1]; it is scored against tokens[p + 1]."""

    tokens: list[int]
    start: int
    """First row scored."""
    stop: int
    """One past the last row scored; at most len(tokens) - 1."""

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop < len(self.tokens):
            raise ValueError(f"rows {self.start}..{self.stop} do not fit a prompt of {len(self.tokens)} tokens")

    @property
    def fed(self) -> list[int]:
        """Tokens the engine reads: the last one is only ever predicted."""
        return self.tokens[:-1]
