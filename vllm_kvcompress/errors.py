# SPDX-License-Identifier: Apache-2.0
"""Errors meant for the person who typed the command: what is wrong, with which value, and what fixes it."""

_MAX_MESSAGE = 2000


class KVCompressError(ValueError):
    """Base of every refusal of this package. A ValueError, so that vLLM and pydantic report it as bad input."""


def printable(text: str) -> str:
    """The text without a terminal's escape sequences or halves of characters: whoever made a file chose its texts."""
    return "".join(character if character.isprintable() or character == "\n" else "?" for character in text)


class RotationError(KVCompressError):
    """A rotation file is missing, foreign, corrupt or does not fit the model. Its message is printable and not long."""

    def __init__(self, message: str) -> None:
        shown = printable(message)
        super().__init__(shown if len(shown) <= _MAX_MESSAGE else f"{shown[: _MAX_MESSAGE // 2]} ... {shown[-500:]}")


class UnsupportedModelError(KVCompressError):
    """The model, or a flag combined with it, cannot be served with a compressed KV cache."""
