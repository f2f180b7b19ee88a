# SPDX-License-Identifier: Apache-2.0
"""Block prefill with eviction on a Hugging Face model: what the engine's version of EpiCache is compared with.

The procedure of EpiCache (arXiv 2509.17396, section 3): append a block, run the guide prompt without keeping its keys,
score the slots with its queries, keep each layer's budget in every KV head, go on. Keys keep the RoPE phase of their
position; the guide and the question stand at the positions after the tokens so far. Heads may keep different tokens.

Attention is computed here, over the slots of a `Cache`, through the calibration's tapped attention; everything else of
the forward pass is the model's own. Where nothing is evicted the logits are the model's, to float32 rounding.

What differs from the authors' code: the first `protected` tokens are never evicted; the guide starts one position after
the last token and not on it; layers raised to the least budget do not add to the total (`policies.layer_budgets`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from vllm_kvcompress.calibration.tap import Heads, listening
from vllm_kvcompress.episodic import policies
from vllm_kvcompress.errors import UnsupportedModelError


@dataclass
class LayerCache:
    """What one layer holds: T slots in every KV head, ascending in position."""

    key: torch.Tensor
    """[Hkv, T, D], after RoPE at the token's own position"""
    value: torch.Tensor
    """[Hkv, T, D]"""
    position: torch.Tensor
    """[Hkv, T] int64"""
    scale: float
    """Of query times key before softmax"""
    accumulated: torch.Tensor | None = None
    """[Hkv, T] float32: scores of a policy that adds them up"""

    def keep(self, slots: torch.Tensor) -> None:
        """Evict all but `slots` [Hkv, M] int64."""
        rows = slots.unsqueeze(-1).expand(-1, -1, self.key.shape[-1])
        self.key, self.value = self.key.gather(1, rows), self.value.gather(1, rows)
        self.position = self.position.gather(1, slots)
        if self.accumulated is not None:
            self.accumulated = self.accumulated.gather(1, slots)


@dataclass
class Cache:
    """Keys and values of one sequence."""

    layers: dict[int, LayerCache] = field(default_factory=dict)
    length: int = 0
    """Tokens so far, evicted or not: the position of the next one."""

    def branch(self) -> Cache:
        """A copy that can go its own way. Tensors are shared: nothing writes into them."""
        return Cache({index: replace(layer) for index, layer in self.layers.items()}, self.length)

    def slots(self) -> list[int]:
        """Tokens each layer holds per KV head."""
        return [layer.key.shape[1] for layer in self.layers.values()]


Captured = dict[int, torch.Tensor]
"""Queries of a pass by layer: [Q, Hq, D] after RoPE."""

Guide = Callable[[Cache], Captured]
"""Queries to score a cache with, as if of a prompt that follows its last token."""


def attend(query: torch.Tensor, layer: LayerCache, new: int) -> torch.Tensor:
    """Attention of the tokens of the last `new` slots: [Hq, new, D] queries -> [Hq, new, D].

    They see all earlier slots and, causally, each other; earlier slots all have earlier positions.
    """
    slots = layer.key.shape[1]
    own = torch.arange(slots - new, slots, device=query.device)
    visible = torch.arange(slots, device=query.device) <= own[:, None]
    return torch.nn.functional.scaled_dot_product_attention(
        query.unsqueeze(0),
        layer.key.unsqueeze(0),
        layer.value.unsqueeze(0),
        attn_mask=visible,
        scale=layer.scale,
        enable_gqa=True,
    )[0]


@torch.no_grad()
def forward(model: Any, ids: torch.Tensor, cache: Cache) -> tuple[torch.Tensor, Captured]:
    """Run tokens after the cache and append their keys and values to it.

    Args:
        model: loaded by `calibration.model.load`.
        ids: [n] int64.

    Returns:
        Final hidden states [n, hidden], and every layer's queries.

    Raises:
        UnsupportedModelError: a layer with a sliding window or a soft cap.
    """
    device = next(model.parameters()).device
    position = torch.arange(cache.length, cache.length + len(ids), device=device)
    captured: Captured = {}

    def listen(heads: Heads) -> torch.Tensor:
        if heads.window is not None or heads.softcap is not None:
            raise UnsupportedModelError("the EpiCache reference knows full attention without soft cap only")
        own = position.expand(heads.key.shape[0], -1)
        layer = cache.layers.get(heads.layer_id)
        if layer is None:
            layer = LayerCache(heads.key.clone(), heads.value.clone(), own, heads.scaling)
            cache.layers[heads.layer_id] = layer
        else:
            layer.key = torch.cat([layer.key, heads.key], dim=1)
            layer.value = torch.cat([layer.value, heads.value], dim=1)
            layer.position = torch.cat([layer.position, own], dim=1)
        captured[heads.layer_id] = heads.query.transpose(0, 1).clone()
        return attend(heads.query, layer, len(ids))

    with listening(listen):
        found = model.base_model(
            input_ids=ids.unsqueeze(0).to(device), position_ids=position.unsqueeze(0), use_cache=False
        )
    cache.length += len(ids)
    return found.last_hidden_state[0], captured


def guide_every_block(model: Any, ids: torch.Tensor) -> Guide:
    """The paper's guide: the prompt `ids` [Q] int64 reads the cache as it is, and leaves nothing in it."""
    return lambda cache: forward(model, ids, cache.branch())[1]


def guide_captured(model: Any, queries: Captured, position: int, *, rephase: bool = True) -> Guide:
    """Queries captured once, used for every block.

    Args:
        queries: of a pass that began at `position`.
        rephase: turn them by RoPE to where the prompt would begin now; else they keep the phase of their capture.
    """
    return lambda cache: {
        layer: turn(model, part, cache.length - position) if rephase else part for layer, part in queries.items()
    }


def turn(model: Any, queries: torch.Tensor, distance: int) -> torch.Tensor:
    """Queries [Q, Hq, D] after RoPE, moved by `distance` positions.

    The angle grows linearly with the position, so moving is one more rotation, the same for every query.
    """
    angles = model.base_model.rotary_emb.inv_freq.double() * distance
    cos, sin = angles.cos().float(), angles.sin().float()
    first, second = queries.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(queries.dtype)


def evict(
    cache: Cache,
    policy: policies.Policy,
    budgets: Sequence[int],
    *,
    queries: Captured | None,
    protected: int = 0,
) -> None:
    """Score every layer and keep its budget. A layer that holds no more than it is scored only if scores add up.

    Args:
        budgets: tokens per KV head, in the order of the layers.
        queries: those the policy asks for (see `policies.Queries`).
        protected: first tokens of the sequence that are always kept.
    """
    for (index, layer), budget in zip(cache.layers.items(), budgets, strict=True):
        slots = layer.key.shape[1]
        if slots <= budget and not policy.accumulates:
            continue
        scores = policy.score(
            policies.Layer(
                keys=layer.key.transpose(0, 1),
                queries=None if queries is None else queries[index],
                scale=layer.scale,
                previous=layer.accumulated,
            )
        )
        layer.accumulated = scores if policy.accumulates else None
        kept = policies.always_kept(slots, budget, leading=protected, recent=policy.recent(budget))
        if slots > budget:
            layer.keep(policies.select(scores, budget, kept))


def prefill(
    model: Any,
    ids: torch.Tensor,
    policy: policies.Policy,
    budgets: Sequence[int],
    *,
    block: int,
    protected: int = 0,
    guide: Guide | None = None,
    cache: Cache | None = None,
) -> Cache:
    """Append tokens block by block, evicting after each: the cache never holds more than a budget and a block.

    Args:
        ids: [n] int64.
        budgets: tokens per KV head for each layer.
        block: tokens a block.
        protected: first tokens of the sequence that are always kept.
        guide: for a policy that scores with a guide prompt.
        cache: to go on from; not changed.

    Raises:
        ValueError: a policy that needs a guide has none, or a budget does not hold what is protected.
    """
    if policy.queries == "guide" and guide is None:
        raise ValueError("this policy needs a guide prompt")
    cache = Cache() if cache is None else cache.branch()
    for part in ids.split(block):
        queries: Captured | None = forward(model, part, cache)[1]
        if policy.queries == "guide" and guide is not None:
            queries = guide(cache) if any(n > m for n, m in zip(cache.slots(), budgets, strict=True)) else None
        evict(cache, policy, budgets, queries=queries, protected=protected)
    return cache


@torch.no_grad()
def answer_logprobs(model: Any, cache: Cache, question: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
    """ln p of every token of a given answer after the question: [len(answer)] float32. The cache is not changed.

    Args:
        question: [n] int64, at least one token; answer: [m] int64.
    """
    hidden, _ = forward(model, torch.cat([question, answer[:-1]]), cache.branch())
    logits = model.lm_head(hidden[len(question) - 1 :]).float()
    return logits.log_softmax(-1).gather(-1, answer.to(logits.device).unsqueeze(-1)).squeeze(-1)


@torch.no_grad()
def greedy_answer(model: Any, cache: Cache, question: torch.Tensor, *, tokens: int, stop: int | None) -> list[int]:
    """Up to `tokens` most likely tokens after the question, without `stop`. The cache is not changed."""
    cache, ids = cache.branch(), question
    found: list[int] = []
    while len(found) < tokens:
        hidden, _ = forward(model, ids, cache)
        token = int(model.lm_head(hidden[-1]).argmax())
        if token == stop:
            break
        found.append(token)
        ids = torch.tensor([token])
    return found
