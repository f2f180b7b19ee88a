# SPDX-License-Identifier: Apache-2.0
"""Errors meant for the person who typed the command: what is wrong, with which value, and what fixes it."""


class KVCompressError(ValueError):
    """Base of every refusal of this package. A ValueError, so that vLLM and pydantic report it as bad input."""


class RotationError(KVCompressError):
    """A rotation file is missing, foreign, corrupt or does not fit the model."""


class UnsupportedModelError(KVCompressError):
    """The model, or a flag combined with it, cannot be served with a compressed KV cache."""
