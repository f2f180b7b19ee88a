# SPDX-License-Identifier: Apache-2.0
"""Attention of a Hugging Face model with a listener: queries, keys and values after RoPE, layer by layer.

Registered in transformers' AttentionInterface under `NAME`; a model loaded with `attn_implementation=NAME` uses it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vllm_kvcompress.errors import UnsupportedModelError

NAME = "kvcompress_calibration"


@dataclass(frozen=True)
class Heads:
    """What one attention layer computes with, for one sequence. Batch is dropped: sequences are fed one at a time."""

    layer_id: int
    query: torch.Tensor
    """[Hq, T, D] after RoPE"""
    key: torch.Tensor
    """[Hkv, T, D] after RoPE"""
    value: torch.Tensor
    """[Hkv, T, D]"""
    scaling: float
    softcap: float | None
    window: int | None
    """Sliding window in tokens, None where attention is global."""

    @property
    def group(self) -> int:
        """Query heads a KV head serves."""
        return self.query.shape[0] // self.key.shape[0]

    def grouped_query(self, positions: torch.Tensor | None = None) -> torch.Tensor:
        """[Hkv, G, T or len(positions), D] float32 queries beside the KV head they read."""
        query = self.query if positions is None else self.query[:, positions]
        return query.float().unflatten(0, (self.key.shape[0], self.group))

    def scores(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Scaled (and capped) scores of [Hkv, G, Q, D] queries against [Hkv, T, D] keys: [Hkv, G, Q, T], unmasked."""
        found = query @ key.float().unsqueeze(1).mT * self.scaling
        return found if self.softcap is None else torch.tanh(found / self.softcap) * self.softcap

    def visible(self, positions: torch.Tensor) -> torch.Tensor:
        """[len(positions), T] bool: which tokens a query at each position may attend to."""
        tokens = torch.arange(self.key.shape[1], device=self.key.device)
        found = tokens <= positions[:, None]
        return found if self.window is None else found & (tokens > positions[:, None] - self.window)


Listener = Callable[[Heads], torch.Tensor | None]
"""Sees a layer; may return an attention output [Hq, T, D] to use in place of the exact one."""

_listener: Listener | None = None


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Send every attention layer of the forward passes inside to `listener`."""
    global _listener
    previous, _listener = _listener, listener
    try:
        yield
    finally:
        _listener = previous


def full_attention(listener: Listener) -> Listener:
    """The same without the sliding-window layers: their cache stays in 16 bits, so nothing is measured there."""
    return lambda heads: listener(heads) if heads.window is None else None


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """transformers' attention function: [1, Hq, T, D] queries -> ([1, T, Hq, D], None)."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if _listener is not None:
        _refuse_unknown(module, key, value, kwargs)
        heads = Heads(
            layer_id=int(module.layer_idx),  # type: ignore[arg-type]
            query=query[0],
            key=key[0],
            value=value[0],
            scaling=float(scaling),
            softcap=kwargs.get("softcap"),
            window=kwargs.get("sliding_window"),
        )
        replaced = _listener(heads)
        if replaced is None and heads.softcap is not None:
            replaced = attend(heads)
        if replaced is not None:
            return replaced.to(query.dtype).transpose(0, 1).unsqueeze(0).contiguous(), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


def attend(heads: Heads, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Plain attention, [Hq, T, D] float32; `mask` [T, T] bool narrows what is visible. 256 queries at a time."""
    length = heads.key.shape[1]
    parts = []
    for positions in torch.arange(length, device=heads.key.device).split(256):
        allowed = heads.visible(positions)
        if mask is not None:
            allowed = allowed & mask[positions]
        scores = heads.scores(heads.grouped_query(positions), heads.key).masked_fill(~allowed, -torch.inf)
        parts.append(scores.softmax(-1) @ heads.value.float().unsqueeze(1))
    return torch.cat(parts, dim=2).flatten(0, 1)


def _refuse_unknown(module: nn.Module, key: torch.Tensor, value: torch.Tensor, kwargs: dict[str, Any]) -> None:
    name = type(module).__name__
    if getattr(module, "is_causal", True) is False or kwargs.get("is_causal") is False:
        raise UnsupportedModelError(
            f"{name} is not causal: only decoder models have a KV cache that grows by the token"
        )
    if key.shape[-1] != value.shape[-1]:
        raise UnsupportedModelError(
            f"{name} has keys of size {key.shape[-1]} and values of size {value.shape[-1]}; "
            "only equal sizes are supported"
        )
    if kwargs.get("s_aux") is not None:
        raise UnsupportedModelError(f"{name} has learned attention sinks, which are not supported")
    if not hasattr(module, "layer_idx"):
        raise UnsupportedModelError(f"{name} does not say which layer it is, so its rotation could not be found again")


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
