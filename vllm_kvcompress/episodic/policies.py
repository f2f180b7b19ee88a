# SPDX-License-Identifier: Apache-2.0
"""Which tokens of a layer's cache survive: scores, selection and budgets, in plain torch: the oracles of the kernels.

**Slots.** A cache of T slots holds, in each KV head, T tokens in the order of their positions. After an eviction heads
hold different tokens ("pair-uniform": the same number in every head), so nothing here asks for positions: a later slot
is a later token, and the tokens of the block just appended are the last slots of every head.

**Adding a policy** is one subclass of `Policy` and one entry of `POLICIES`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

Queries = Literal["none", "guide", "window", "block"]
"""Whose queries a policy scores with. none; guide: of a prompt that follows the cache and is not in it; window: of the
last `window` slots; block: of all slots appended since the last eviction."""

_QUERIES_AT_ONCE = 256
"""Bounds the attention weights held at a time: [Hq, 256, T]."""


@dataclass(frozen=True)
class Layer:
    """What there is to score a layer's slots by."""

    keys: torch.Tensor
    """[T, Hkv, D] float, after RoPE"""
    queries: torch.Tensor | None = None
    """[Q, Hq, D] float, after RoPE; whose, see `Policy.queries`. Head h reads KV head h // (Hq / Hkv)."""
    scale: float | None = None
    """Of query times key before softmax; None is D^-0.5"""
    previous: torch.Tensor | None = None
    """[Hkv, T'] float32, T' <= T: accumulated scores of the first T' slots; None before the first block"""

    def queries_of(self, whose: str) -> torch.Tensor:
        if self.queries is None or len(self.queries) == 0:
            raise ValueError(f"this policy needs the queries of {whose}")
        return self.queries


class Policy(ABC):
    """Scores the slots of one layer's cache; the highest are kept."""

    queries: ClassVar[Queries]
    accumulates: ClassVar[bool] = False
    """Whether scores add up over blocks: those of the slots that were kept come back as `previous`."""

    @abstractmethod
    def score(self, layer: Layer) -> torch.Tensor:
        """Importance of every slot.

        Returns:
            [Hkv, T] float32. Input that is not finite gives scores that are not, which `select` refuses.

        Raises:
            ValueError: missing queries, or shapes that do not fit.
        """

    def recent(self, budget: int) -> int:
        """How many of the last slots are kept whatever their score."""
        return 0


@dataclass(frozen=True)
class EpiCache(Policy):
    """Largest attention weight that any guide query, in any query head of the group, gives the slot.

    EpiCache (arXiv 2509.17396, section 3). The softmax runs over the cache alone, without the guide's own keys, as in
    the authors' code.
    """

    queries = "guide"

    def score(self, layer: Layer) -> torch.Tensor:
        parts = layer.queries_of("a guide prompt").split(_QUERIES_AT_ONCE)
        largest = [attention_weights(layer.keys, part, scale=layer.scale).amax((1, 2)) for part in parts]
        return torch.stack(largest).amax(0)


@dataclass(frozen=True)
class SnapKV(Policy):
    """Attention of the last queries, averaged over them and the group, smoothed along the slots before the window.

    SnapKV (arXiv 2404.14469, section 4), whose LongBench setting pools with a maximum over 7; window of 64 as in
    EpiCache's comparison. The paper has a head of its own for every query; here the group's mean. After evictions the
    pooled neighbours are neighbours in the cache and not in the text.
    """

    queries = "window"
    window: int = 64
    kernel: int = 7
    """Slots pooled over, odd."""
    pooling: Literal["max", "mean"] = "max"

    def __post_init__(self) -> None:
        if self.window < 1 or self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"a window of {self.window} slots, a kernel of {self.kernel}: need 1 or more, and odd")

    def score(self, layer: Layer) -> torch.Tensor:
        queries = layer.queries_of(f"the last {self.window} slots")[-self.window :]
        mean = attention_weights(layer.keys, queries, scale=layer.scale, causal=True).mean((1, 2))
        return self.smooth(mean, len(queries))

    def smooth(self, mean: torch.Tensor, window: int) -> torch.Tensor:
        """Mean weights [H, T], written in place, smoothed along the slots before the last `window`."""
        before = mean.shape[1] - window
        if before:
            pool = torch.nn.functional.max_pool1d if self.pooling == "max" else torch.nn.functional.avg_pool1d
            mean[:, :before] = pool(mean[:, :before], self.kernel, stride=1, padding=self.kernel // 2)
        return mean

    def recent(self, budget: int) -> int:
        return self.window


@dataclass(frozen=True)
class H2O(Policy):
    """Attention a slot has drawn so far, summed over all queries and the group; half the budget is the most recent.

    Heavy-hitter oracle (arXiv 2306.14048, section 4), evicting at the end of a block instead of after every token. No
    attention kernel writes its weights down, so the engine reads every block a second time for them: a baseline.
    """

    queries = "block"
    accumulates = True
    recent_share: float = 0.5
    """Share of the budget, as in the paper's evaluation."""

    def score(self, layer: Layer) -> torch.Tensor:
        keys, queries = layer.keys, layer.queries_of("the block")
        total = torch.zeros(keys.shape[1], keys.shape[0], device=keys.device)
        if layer.previous is not None:
            if layer.previous.shape[0] != total.shape[0] or layer.previous.shape[1] > total.shape[1]:
                raise ValueError(f"previous scores {list(layer.previous.shape)} do not fit keys {list(keys.shape)}")
            total[:, : layer.previous.shape[1]] += layer.previous
        seen = len(keys) - len(queries)
        if seen < 0:
            raise ValueError(f"{len(queries)} queries of {len(keys)} slots")
        for part in queries.split(_QUERIES_AT_ONCE):
            seen += len(part)  # later keys are hidden from all of the part
            total[:, :seen] += attention_weights(keys[:seen], part, scale=layer.scale, causal=True).sum((1, 2))
        return total

    def recent(self, budget: int) -> int:
        return int(budget * self.recent_share)


@dataclass(frozen=True)
class KeyDiff(Policy):
    """Least like the others: minus the cosine between a key and the mean of the normalised keys.

    KeyDiff (arXiv 2504.15364, section 3), keys after RoPE.
    """

    queries = "none"

    def score(self, layer: Layer) -> torch.Tensor:
        unit = torch.nn.functional.normalize(layer.keys.float(), dim=-1)
        anchor = torch.nn.functional.normalize(unit.mean(0), dim=-1)
        return -(unit * anchor).sum(-1).T.contiguous()


@dataclass(frozen=True)
class EpiCacheKeyDiff(Policy):
    """High by either: the larger of a slot's ranks by `EpiCache` and by `KeyDiff` among the slots of its head.

    Attention of a guide finds what is near the episode's subject, unlike keys whatever is said once; each misses what
    the other has. Ranks, because the two scores have no unit in common.
    """

    queries = "guide"

    def score(self, layer: Layer) -> torch.Tensor:
        return highest_rank(EpiCache().score(layer), KeyDiff().score(layer))


@dataclass(frozen=True)
class Streaming(Policy):
    """Most recent; with protected sinks StreamingLLM (arXiv 2309.17453, section 3), but at the original positions."""

    queries = "none"

    def score(self, layer: Layer) -> torch.Tensor:
        slots, heads, _ = layer.keys.shape
        return torch.arange(slots, dtype=torch.float32, device=layer.keys.device).repeat(heads, 1)


POLICIES: dict[str, Policy] = {
    "epicache": EpiCache(),
    "epicache-keydiff": EpiCacheKeyDiff(),
    "snapkv": SnapKV(),
    "h2o": H2O(),
    "keydiff": KeyDiff(),
    "streaming": Streaming(),
}


def highest_rank(*scores: torch.Tensor) -> torch.Tensor:
    """The largest of a slot's ranks, 0 the lowest, by scores that are each [..., T]; of equal ones, the later slot's.

    Returns:
        [..., T] float32, NaN where a score is.
    """
    stacked = torch.stack(scores)
    order = stacked.argsort(dim=-1, stable=True)
    places = torch.arange(stacked.shape[-1], dtype=torch.float32, device=stacked.device).expand_as(stacked)
    ranks = torch.empty_like(stacked, dtype=torch.float32).scatter_(-1, order, places)
    return ranks.masked_fill_(stacked.isnan(), torch.nan).amax(0)


def attention_weights(
    keys: torch.Tensor, queries: torch.Tensor, *, scale: float | None = None, causal: bool = False
) -> torch.Tensor:
    """Softmax over the slots, computed in float32.

    Args:
        keys: [T, Hkv, D] float; queries: [Q, Hq, D] float, both after RoPE.
        scale: None is D^-0.5.
        causal: the queries are those of the last Q slots, each sees the slots up to its own; else every query sees all.

    Returns:
        [Hkv, G, Q, T] float32, G = Hq / Hkv.

    Raises:
        ValueError: shapes that do not fit.
    """
    slots, heads, dim = keys.shape
    count, query_heads, query_dim = queries.shape
    if query_dim != dim or query_heads % heads:
        raise ValueError(f"queries {list(queries.shape)} do not fit keys {list(keys.shape)}")
    if causal and count > slots:
        raise ValueError(f"{count} queries of {slots} slots")
    scale = dim**-0.5 if scale is None else scale
    grouped = queries.float().transpose(0, 1).unflatten(0, (heads, -1))
    scores = (grouped * scale) @ keys.float().permute(1, 2, 0).unsqueeze(1)
    if causal:
        own = torch.arange(slots - count, slots, device=keys.device)
        scores.masked_fill_(torch.arange(slots, device=keys.device) > own[:, None], -torch.inf)
    return scores.softmax(-1)


def always_kept(
    slots: int, budget: int, *, leading: int = 0, recent: int = 0, device: torch.device | None = None
) -> torch.Tensor:
    """[T] bool: the first `leading` slots (sinks, system prompt) and as many of the last `recent` as the budget holds.

    Leading slots are the same tokens in every head, as nothing before them was ever evicted.
    """
    slot = torch.arange(slots, device=device)
    return (slot < leading) | (slot >= slots - max(0, min(recent, budget - leading)))


def protected_slots(
    policy: Policy, num_slots: int, sources: int, budget: int, leading: int, device: torch.device
) -> torch.Tensor:
    """[sources] bool: what a policy keeps of the first `sources` of `num_slots` slots; the rest stays, being latest.

    Raises:
        ValueError: a budget that is no part of the sources, or does not hold the `leading` slots.
    """
    if min(leading, sources) > budget or not 0 < budget <= sources:
        raise ValueError(f"a budget of {budget} of {sources} slots does not hold the {leading} that are always kept")
    recent = max(0, policy.recent(budget) - (num_slots - sources))
    return always_kept(sources, budget, leading=leading, recent=recent, device=device)


def select(scores: torch.Tensor, budget: int, protected: torch.Tensor | None = None) -> torch.Tensor:
    """The slots to keep: those protected, then the highest scores of each head; of equal ones, the later slot.

    Args:
        scores: [Hkv, T] float.
        budget: slots to keep in every head.
        protected: [T] bool, see `always_kept`; None protects nothing.

    Returns:
        [Hkv, min(budget, T)] int64, ascending in every head.

    Raises:
        ValueError: a score is NaN, the budget is below 1 or the number of protected slots, or shapes do not fit.
    """
    if scores.ndim != 2:
        raise ValueError(f"scores must be [Hkv, T], got {list(scores.shape)}")
    slots = scores.shape[1]
    protected = torch.zeros(slots, dtype=torch.bool, device=scores.device) if protected is None else protected
    if protected.shape != (slots,) or protected.dtype != torch.bool:
        raise ValueError(f"protected must be [{slots}] bool, got {list(protected.shape)} {protected.dtype}")
    least = max(1, int(protected.sum()))
    if budget < least:
        raise ValueError(f"a budget of {budget} slots is below the {least} that are always kept")
    if torch.isnan(scores).any():
        raise ValueError(f"scores of {int(torch.isnan(scores).any(-1).sum())} heads hold NaN")
    # Two stable sorts, the second by the more important criterion; from the last slot to the first.
    order = scores.flip(-1).argsort(dim=-1, descending=True, stable=True)
    order = slots - 1 - order
    first = protected[order].to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    return order.gather(-1, first)[:, :budget].sort(dim=-1).values


def select_without_waiting(scores: torch.Tensor, budget: int, protected: torch.Tensor) -> torch.Tensor:
    """`select` without its checks, which wait for the device: a NaN counts as the lowest score.

    To tell the host of one would mean to wait too, and an assertion on the device ends the engine for every request.
    What makes it has made NaN of a model's output before, for this request alone.

    Args:
        scores: [Hkv, T] float32. protected: [T] bool, no more than `budget`, itself at most T.
    """
    limit = torch.finfo(scores.dtype).max
    ranked = scores.nan_to_num(nan=-torch.inf, posinf=limit, neginf=-limit).masked_fill(protected, torch.inf)
    from_the_end = ranked.flip(-1).sort(dim=-1, descending=True, stable=True).indices[:, :budget]
    return (scores.shape[1] - 1 - from_the_end).sort(dim=-1).values


def layer_sensitivity(full: torch.Tensor, masked: torch.Tensor) -> float:
    """How much a layer's keys depend on distant context: 1 - mean cosine; 0 = not at all, at most 2.

    EpiCache (arXiv 2509.17396, section 3) calls the mean cosine s and gives a layer weight (1 - s)^alpha. RoPE turns
    both keys of a token alike, so it may be applied or not.

    Args:
        full: [..., T, D] float keys of a text; masked: the same under a mask that shows nearby blocks and sinks only.

    Raises:
        ValueError: shapes differ, or a key is not finite.
    """
    if full.shape != masked.shape:
        raise ValueError(f"keys {list(full.shape)} and {list(masked.shape)} are not of the same tokens")
    found = float(1 - torch.nn.functional.cosine_similarity(masked.float(), full.float(), dim=-1).double().mean())
    if not math.isfinite(found):
        raise ValueError("keys that are not finite")
    return found


def layer_budgets(sensitivity: Sequence[float], budget: int, alpha: float, floor: float = 0.25) -> list[int]:
    """Tokens each layer keeps per KV head: in proportion to min-max normalised sensitivity^alpha, above a floor.

    EpiCache (arXiv 2509.17396, section 3): alpha 1.1 for Llama, 1.3 for Qwen, floor 1/4. There, layers lifted to the
    floor come on top of the total; here the others make room for them, so the total holds. For budgets in pages, give
    pages.

    Args:
        sensitivity: [L], see `layer_sensitivity`. All equal: every layer gets the budget.
        budget: mean tokens a layer.
        alpha: sharpness; 0 gives every layer the same.
        floor: least tokens of a layer as a share of the budget, rounded down but at least one token.

    Returns:
        [L] integers that sum to L * budget.

    Raises:
        ValueError: no layers, a sensitivity that is not finite, budget < 1, alpha < 0 or floor outside 0..1.
    """
    if not sensitivity or not all(math.isfinite(value) for value in sensitivity):
        raise ValueError(f"sensitivities must be finite, one a layer, got {list(sensitivity)}")
    if budget < 1:
        raise ValueError(f"a budget of {budget} tokens")
    if not (math.isfinite(alpha) and alpha >= 0):
        raise ValueError(f"sharpness alpha must be at least 0, got {alpha}")
    if not 0 <= floor <= 1:
        raise ValueError(f"the floor must be a share of the budget in 0..1, got {floor}")
    low, high = min(sensitivity), max(sensitivity)
    if low == high:
        return [budget] * len(sensitivity)
    weights = [((value - low) / (high - low)) ** alpha for value in sensitivity]
    least = max(1, int(budget * floor))
    total = budget * len(weights)
    # Layers fall to the floor in the order of their weights; the rest share what is left.
    rising = sorted(range(len(weights)), key=lambda layer: weights[layer])
    floored = 0
    while True:
        free, rest = total - floored * least, sum(weights[layer] for layer in rising[floored:])
        if weights[rising[floored]] * free >= least * rest:
            break
        floored += 1
    shares = {layer: weights[layer] * free / rest for layer in rising[floored:]}
    found = [least] * len(weights)
    for layer, share in shares.items():
        found[layer] = int(share)
    # Largest remainders first make up for what rounding down left over.
    missing = total - sum(found)
    for layer in sorted(shares, key=lambda layer: int(shares[layer]) - shares[layer])[:missing]:
        found[layer] += 1
    return found


def budget_classes(sensitivity: Sequence[float], alpha: float) -> list[float]:
    """What share of the budget each layer keeps where only three or two different ones may be: [L], mean 1.

    The layers in the order of their own budgets (`layer_budgets`) are cut in classes of equally many, which keep the
    mean of their own. Equally many, because a block of vLLM's pool serves the same number of layers whatever they are:
    classes of 11 and 19 layers would come to blocks of 11, 19 of which take two.

    Raises:
        ValueError: as `layer_budgets`, or L is no multiple of 3 or 2.
    """
    layers = len(sensitivity)
    size = next((layers // count for count in (3, 2) if layers and layers % count == 0), 0)
    if not size:
        raise ValueError(f"{layers} layers are no multiple of 3 or 2, so classes of budgets cannot be equally large")
    fine = 1 << 20
    own = layer_budgets(sensitivity, fine, alpha)
    rising = sorted(range(layers), key=lambda layer: own[layer])
    found = [0.0] * layers
    for begin in range(0, layers, size):
        members = rising[begin : begin + size]
        for layer in members:
            found[layer] = sum(own[member] for member in members) / (size * fine)
    return found
