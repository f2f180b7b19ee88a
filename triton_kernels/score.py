# SPDX-License-Identifier: Apache-2.0
"""Importance of a request's slots in several layers, by which eviction chooses. The torch references are
`episodic.policies`.

Keys are dequantised into a workspace, of as many layers at a time as it holds, and multiplied as fp16 with float32
sums. Layers go in the same launches, for a launch takes the host longer than a layer's work the device.
Attention weights take two passes over them: the log-sum-exp of every query and head, by shares of the slots, then each
slot's largest weight, or the sum of its weights, over all rows (query, head of the group) of its KV head.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl

from vllm_kvcompress.episodic.policies import (
    H2O,
    EpiCache,
    EpiCacheKeyDiff,
    KeyDiff,
    Policy,
    SnapKV,
    Streaming,
    highest_rank,
)
from vllm_kvcompress.formats.base import PageLayout
from vllm_kvcompress.kernels.transfer import to_device
from vllm_kvcompress.triton_kernels import _paged
from vllm_kvcompress.triton_kernels._common import NOTHING_SEEN
from vllm_kvcompress.triton_kernels.gather import gather_history

_LN_2 = tl.constexpr(math.log(2))
_LOG2_E = tl.constexpr(math.log2(math.e))
_PROGRAMS = 512
"""Wanted in the first pass: some for every multiprocessor of a large GPU."""
_MIN_SHARE = 512
"""Slots of a share, unless there are fewer."""
_UNIT_EPSILON = tl.constexpr(1e-12)
"""Of torch.nn.functional.normalize."""


@dataclass
class Slots:
    """A request's slots in layers of one kind, in which the same pages are the request's."""

    pages: Sequence[torch.Tensor]
    """of every layer [num_pages, H, head_bytes] uint8, as of `compact.compact`"""
    layout: PageLayout
    table: torch.Tensor
    """[n] int64, pages that are not null"""
    count: int
    """slots in them; all but the last page are full"""
    workspace: torch.Tensor
    """[N, H, D] float16, contiguous; N of a page or more"""
    sketch: torch.Tensor | None
    """as of `gather_history`"""

    def turns(self) -> Iterator[Turn]:
        """Layers, as many at a time as the workspace holds all slots of, or one.

        Raises:
            ValueError: the layers are not of one kind.
        """
        device = self.table.device
        distances, aligned = _paged.layer_distances(self.pages)
        at_once = max(1, min(len(distances), self.workspace.shape[0] // self.count))
        table = self.table.int().expand(at_once, -1)
        lengths = torch.full((at_once,), self.count, dtype=torch.int32, device=device)
        nothing = torch.zeros(at_once + 1, dtype=torch.int32, device=device)
        starts = torch.arange(at_once + 1, dtype=torch.int32, device=device) * self.count
        for begin in range(0, len(distances), at_once):
            part = distances[begin : begin + at_once]
            offsets = to_device(part, torch.int64, device)
            count = len(part)
            gather = functools.partial(
                gather_history,
                self.pages[0],
                self.layout,
                table[:count],
                lengths[:count],
                nothing[: count + 1],
                starts[: count + 1],
                values=None,
                window_cache=None,
                window_table=None,
                window_dtype=torch.float16,
                sink_tokens=0,
                recent_tokens=0,
                sketch=self.sketch,
                layer_offsets=offsets,
                aligned=aligned,
            )
            yield Turn(self, slice(begin, begin + count), gather)


@dataclass
class Turn:
    """Layers that are scored in the same launches. Keys come a workspace at a time."""

    slots: Slots
    layers: slice
    _gather: Callable[..., None]
    """`gather_history` into rows that are in turn those of each layer"""
    _first: int | None = field(default=None, init=False)
    """Of the slots whose keys are in the workspace"""

    def tiles(self, backwards: bool = False) -> Iterator[tuple[int, torch.Tensor]]:
        """(first slot, keys [L, m, H, D] float16 in cache space, contiguous), a view that lasts until the next.

        One pass forwards and one backwards dequantise what fits the workspace once.

        Raises:
            ValueError: the workspace does not hold a page.
        """
        slots, layers = self.slots, self.layers.stop - self.layers.start
        page, held = slots.layout.page_tokens, slots.workspace.shape[0]
        if held < page:
            raise ValueError(f"a workspace of {held} tokens does not hold a page of {page}")
        # What does not fit is that of a single layer: rows of several begin where those of all slots would.
        size = slots.count if layers * slots.count <= held else held // page * page
        firsts = range(0, slots.count, size)
        for first in reversed(firsts) if backwards else firsts:
            count = min(size, slots.count - first)
            keys = slots.workspace[: layers * count]
            if self._first != first:
                self._gather(first_token=first, keys=keys, tile_tokens=-(-count // page) * page)
                self._first = first
            yield first, keys.unflatten(0, (layers, count))


def score(
    policy: Policy,
    slots: Slots,
    queries: torch.Tensor | None,
    key_offset: torch.Tensor | None,
    scale: float,
    previous: torch.Tensor | None = None,
) -> torch.Tensor:
    """`policy.score` of layers, as `kernels.compaction.score` gives it. Never waits for the device.

    Args:
        queries: [L, Q, Hq, D] float16 in cache space, the last dimension contiguous; None if the policy needs none.
        key_offset: [L, H, D] float32, contiguous, what static centring took from the keys, in cache space; None:
            nothing.
        scale: softmax scale, positive.
        previous: [L, H, T'] float32, scores so far of the first T' slots, where the policy adds them up.

    Returns:
        [L, H, slots.count] float32. A key or query that is not finite makes NaN of all scores that see it.

    Raises:
        ValueError: no kernel scores by the policy, or queries are missing or do not fit, or previous scores do not.
    """
    scorer = SCORERS.get(type(policy))
    if scorer is None:
        raise ValueError(f"no GPU kernel scores by {type(policy).__name__}, only by {', '.join(map(_name, SCORERS))}")
    for given in (queries, key_offset):
        if given is not None and len(given) != len(slots.pages):
            raise ValueError(f"queries or key offsets of {len(given)} layers, pages of {len(slots.pages)}")
    parts = []
    for turn in slots.turns():
        own_queries, own_offset = (None if x is None else x[turn.layers] for x in (queries, key_offset))
        parts.append(scorer(policy, turn, own_queries, own_offset, scale))
    found = torch.cat(parts)
    if previous is not None:
        if previous.shape[:2] != found.shape[:2] or previous.shape[2] > found.shape[2]:
            raise ValueError(f"previous scores {list(previous.shape)} do not fit those of {list(found.shape)} slots")
        found[..., : previous.shape[2]] += previous
    return found


def _name(kind: type[Policy]) -> str:
    return kind.__name__


def _by_largest_weight(
    policy: EpiCache, turn: Turn, queries: torch.Tensor | None, key_offset: torch.Tensor | None, scale: float
) -> torch.Tensor:
    # Static centring shifts all scores of a query alike, which its softmax does not see.
    return _weights(turn, _checked(queries, turn, "a guide prompt"), scale, is_causal=False)


def _by_window(
    policy: SnapKV, turn: Turn, queries: torch.Tensor | None, key_offset: torch.Tensor | None, scale: float
) -> torch.Tensor:
    queries = _checked(queries, turn, f"the last {policy.window} slots")[:, -policy.window :]
    mean = _weights(turn, queries, scale, is_causal=True)
    layers, heads, _ = mean.shape
    window, query_heads = queries.shape[1:3]
    mean /= window * (query_heads // heads)
    return policy.smooth(mean.flatten(0, 1), window).unflatten(0, (layers, heads))


def _by_sum(
    policy: H2O, turn: Turn, queries: torch.Tensor | None, key_offset: torch.Tensor | None, scale: float
) -> torch.Tensor:
    return _weights(turn, _checked(queries, turn, "the block"), scale, is_causal=True)


def _by_difference(
    policy: KeyDiff, turn: Turn, queries: torch.Tensor | None, key_offset: torch.Tensor | None, scale: float
) -> torch.Tensor:
    sums = torch.cat([_cosines(keys, key_offset, None) for _, keys in turn.tiles()], dim=2)
    anchor = torch.nn.functional.normalize(sums.sum(2), dim=-1)
    cosines = [_cosines(keys, key_offset, anchor) for _, keys in turn.tiles(backwards=True)]
    return -torch.cat(cosines[::-1], dim=2)


def _by_highest_rank(
    policy: EpiCacheKeyDiff, turn: Turn, queries: torch.Tensor | None, key_offset: torch.Tensor | None, scale: float
) -> torch.Tensor:
    weights = _by_largest_weight(EpiCache(), turn, queries, key_offset, scale)
    return highest_rank(weights, _by_difference(KeyDiff(), turn, queries, key_offset, scale))


def _by_age(
    policy: Streaming, turn: Turn, queries: torch.Tensor | None, key_offset: torch.Tensor | None, scale: float
) -> torch.Tensor:
    order = torch.arange(turn.slots.count, dtype=torch.float32, device=turn.slots.table.device)
    return order.expand(turn.layers.stop - turn.layers.start, turn.slots.workspace.shape[1], -1)


SCORERS: dict[type[Policy], Callable[[Any, Turn, torch.Tensor | None, torch.Tensor | None, float], torch.Tensor]] = {
    EpiCache: _by_largest_weight,
    EpiCacheKeyDiff: _by_highest_rank,
    SnapKV: _by_window,
    H2O: _by_sum,
    KeyDiff: _by_difference,
    Streaming: _by_age,
}


def _checked(queries: torch.Tensor | None, turn: Turn, whose: str) -> torch.Tensor:
    if queries is None or queries.shape[1] == 0:
        raise ValueError(f"this policy needs the queries of {whose}")
    heads, dim = turn.slots.workspace.shape[1:]
    if queries.dtype != torch.float16 or queries.shape[2] % heads or queries.shape[3] != dim or queries.stride(3) != 1:
        raise ValueError(
            f"queries must be float16 [L, Q, n * {heads}, {dim}], the last dimension contiguous, got {queries.dtype} "
            f"{list(queries.shape)} with strides {queries.stride()}"
        )
    return queries


def _weights(turn: Turn, queries: torch.Tensor, scale: float, is_causal: bool) -> torch.Tensor:
    """[L, H, T] float32: the largest softmax weight over queries [L, Q, Hq, D] and the group; if causal, their sum.

    Causal: the queries are those of the last Q slots, each sees the slots up to its own.
    """
    heads, num_slots = turn.slots.workspace.shape[1], turn.slots.count
    layers, count, query_heads, dim = queries.shape
    if is_causal and count > num_slots:
        raise ValueError(f"{count} queries of {num_slots} slots")
    rows, device = count * (query_heads // heads), queries.device
    tile = _tile(dim)
    row_tiles = triton.cdiv(rows, tile["BLOCK"])
    longest = min(num_slots, turn.slots.workspace.shape[0])
    shares = max(1, min(_PROGRAMS // (row_tiles * heads * layers), longest // _MIN_SHARE))
    common = {
        "NUM_KV_HEADS": heads,
        "GROUP": query_heads // heads,
        "D": dim,
        "BLOCK_D": triton.next_power_of_2(dim),
        "IS_CAUSAL": is_causal,
        **tile,
    }
    strides = queries.stride()[:3]
    own_slots = num_slots - count
    parts = []
    for first, keys in turn.tiles():
        part = torch.empty(shares, layers, heads, rows, device=device)
        _lse_kernel[(layers * heads, row_tiles, shares)](
            queries, *strides, keys, part, rows, keys.shape[1], first, own_slots, scale * math.log2(math.e), **common
        )
        parts.append(part)
    lse = torch.cat(parts).logsumexp(0)
    found = torch.empty(layers, heads, num_slots, device=device)
    for first, keys in turn.tiles(backwards=True):
        _weights_kernel[(layers * heads, triton.cdiv(keys.shape[1], tile["BLOCK"]))](
            queries, *strides, keys, lse, found, num_slots, rows, keys.shape[1], first, own_slots,
            scale * math.log2(math.e), **common,
        )  # fmt: skip
    return found


def _tile(head_dim: int) -> dict[str, int]:
    """Rows (first pass) or slots (second) that a program keeps, and those of the others that stream past them.

    Head size 256 keeps to 32 rows: as warpgroup products (`attend._tile`) it needs 61 of 63 uniform registers.
    """
    if head_dim <= 128:
        return {"BLOCK": 128, "STREAM": 64, "num_warps": 8, "num_stages": 3}
    return {"BLOCK": 32, "STREAM": 64, "num_warps": 4, "num_stages": 2}


@triton.jit
def _query_tile(
    q_ptr,
    stride_token,
    stride_head,
    kv_head,
    rows,
    num_rows,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """[N, BLOCK_D] fp16 of rows (query, head of the group), zeros from `num_rows` on."""
    lanes = tl.arange(0, BLOCK_D)
    token = (rows // GROUP).to(tl.int64)
    starts = q_ptr + token * stride_token + (kv_head * GROUP + rows % GROUP) * stride_head
    return tl.load(starts[:, None] + lanes[None, :], mask=(rows < num_rows)[:, None] & (lanes < D)[None, :], other=0.0)


@triton.jit
def _key_tile(keys_ptr, kv_head, slots, num_keys, HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """[N, BLOCK_D] fp16 of slots of keys [num_keys, H, D], zeros from `num_keys` on."""
    lanes = tl.arange(0, BLOCK_D)
    starts = keys_ptr + (slots.to(tl.int64) * HEADS + kv_head) * D
    mask = (slots < num_keys)[:, None] & (lanes < D)[None, :]
    return tl.load(starts[:, None] + lanes[None, :], mask=mask, other=0.0)


@triton.jit(do_not_specialize=["num_rows", "num_keys", "first_slot", "own_slots"])
def _lse_kernel(
    q_ptr,
    q_stride_layer,
    q_stride_token,
    q_stride_head,
    keys_ptr,
    lse_ptr,
    num_rows,
    num_keys,
    first_slot,
    own_slots,
    scale_log2,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    BLOCK: tl.constexpr,
    STREAM: tl.constexpr,
):
    """Log-sum-exp [shares, L, H, rows] float32 of what rows see of a share of the keys; -inf: nothing.

    Grid: layers * KV heads x tiles of rows x shares. own_slots: slots before that of the first query, where causal.
    """
    number = tl.program_id(0)
    layer, kv_head = number // NUM_KV_HEADS, number % NUM_KV_HEADS
    q_ptr += layer.to(tl.int64) * q_stride_layer
    keys_ptr += layer.to(tl.int64) * num_keys * (NUM_KV_HEADS * D)
    rows = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    query = _query_tile(q_ptr, q_stride_token, q_stride_head, kv_head, rows, num_rows, GROUP, D, BLOCK_D)
    share = tl.cdiv(tl.cdiv(num_keys, STREAM), tl.num_programs(2)) * STREAM
    begin = tl.program_id(2) * share
    end = tl.minimum(begin + share, num_keys)
    top = tl.full([BLOCK], NOTHING_SEEN, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(begin, end, STREAM):
        slots = start + tl.arange(0, STREAM)
        keys = _key_tile(keys_ptr, kv_head, slots, num_keys, NUM_KV_HEADS, D, BLOCK_D)
        scores = tl.dot(query, tl.trans(keys)) * scale_log2
        seen = (slots < end)[None, :]
        if IS_CAUSAL:
            seen = seen & ((first_slot + slots)[None, :] <= (own_slots + rows // GROUP)[:, None])
        scores = tl.where(seen, scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, axis=1))
        total = total * tl.exp2(top - new_top) + tl.sum(tl.exp2(scores - new_top[:, None]), axis=1)
        top = new_top
    lse = tl.where(total == 0, -float("inf"), (top + tl.log2(total)) * _LN_2)
    out = lse_ptr + (tl.program_id(2) * tl.num_programs(0) + number).to(tl.int64) * num_rows
    tl.store(out + rows, lse, mask=rows < num_rows)


@triton.jit(do_not_specialize=["out_stride", "num_rows", "num_keys", "first_slot", "own_slots"])
def _weights_kernel(
    q_ptr,
    q_stride_layer,
    q_stride_token,
    q_stride_head,
    keys_ptr,
    lse_ptr,
    out_ptr,
    out_stride,
    num_rows,
    num_keys,
    first_slot,
    own_slots,
    scale_log2,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    BLOCK: tl.constexpr,
    STREAM: tl.constexpr,
):
    """Of the slots first_slot + 0 .. num_keys, into [L, H, T] float32. lse: [L, H, rows] float32.

    Grid: layers * KV heads x tiles of slots. A slot's largest weight is that of its largest exponent: one exponential.
    """
    number = tl.program_id(0)
    layer, kv_head = number // NUM_KV_HEADS, number % NUM_KV_HEADS
    q_ptr += layer.to(tl.int64) * q_stride_layer
    keys_ptr += layer.to(tl.int64) * num_keys * (NUM_KV_HEADS * D)
    slots = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    keys = _key_tile(keys_ptr, kv_head, slots, num_keys, NUM_KV_HEADS, D, BLOCK_D)
    lse_ptr += number.to(tl.int64) * num_rows
    best = tl.full([BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    broken = tl.zeros([STREAM], tl.float32)
    for start in tl.range(0, num_rows, STREAM):
        rows = start + tl.arange(0, STREAM)
        query = _query_tile(q_ptr, q_stride_token, q_stride_head, kv_head, rows, num_rows, GROUP, D, BLOCK_D)
        lse = tl.load(lse_ptr + rows, mask=rows < num_rows, other=float("inf")) * _LOG2_E
        exponents = tl.dot(keys, tl.trans(query)) * scale_log2 - lse[None, :]
        if IS_CAUSAL:
            seen = (first_slot + slots)[:, None] <= (own_slots + rows // GROUP)[None, :]
            total += tl.sum(tl.exp2(tl.where(seen, exponents, -float("inf"))), axis=1)
        else:
            best = tl.maximum(best, tl.max(exponents, axis=1))
            broken += tl.where(rows < num_rows, lse, 0.0) * 0  # a maximum passes over NaN
    found = total if IS_CAUSAL else tl.exp2(best) + tl.sum(broken, axis=0)
    tl.store(out_ptr + number.to(tl.int64) * out_stride + first_slot + slots, found, mask=slots < num_keys)


def _cosines(keys: torch.Tensor, offset: torch.Tensor | None, anchor: torch.Tensor | None) -> torch.Tensor:
    """Of unit keys (keys [L, m, H, D] + offset [L, H, D]) / length.

    Returns:
        float32: their cosine with unit vectors anchor [L, H, D], [L, H, m]; without those, sums of a few keys each,
        [L, H, tiles, D].
    """
    layers, count, heads, dim = keys.shape
    block = 64
    tiles = triton.cdiv(count, block)
    found = torch.empty(layers, heads, *((tiles, dim) if anchor is None else (count,)), device=keys.device)
    _cosine_kernel[(layers * heads, tiles)](
        keys, offset, anchor, found, count, NUM_KV_HEADS=heads, D=dim, BLOCK_D=triton.next_power_of_2(dim), BLOCK=block
    )
    return found


@triton.jit(do_not_specialize=["num_keys"])
def _cosine_kernel(
    keys_ptr,
    offset_ptr,
    anchor_ptr,
    out_ptr,
    num_keys,
    NUM_KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: layers * KV heads x tiles of keys."""
    number = tl.program_id(0)
    layer, kv_head = number // NUM_KV_HEADS, number % NUM_KV_HEADS
    keys_ptr += layer.to(tl.int64) * num_keys * (NUM_KV_HEADS * D)
    rows = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    lanes = tl.arange(0, BLOCK_D)
    keys = _key_tile(keys_ptr, kv_head, rows, num_keys, NUM_KV_HEADS, D, BLOCK_D).to(tl.float32)
    if offset_ptr is not None:
        offset = tl.load(offset_ptr + number * D + lanes, mask=lanes < D, other=0.0)
        keys = tl.where((rows < num_keys)[:, None], keys + offset[None, :], 0.0)
    length = tl.sqrt(tl.sum(keys * keys, axis=1))
    # A NaN is not above: it stays in the keys.
    unit = keys / tl.where(length > _UNIT_EPSILON, length, _UNIT_EPSILON)[:, None]
    if anchor_ptr is None:
        out = out_ptr + (number * tl.num_programs(1) + tl.program_id(1)) * D
        tl.store(out + lanes, tl.sum(unit, axis=0), mask=lanes < D)
    else:
        anchor = tl.load(anchor_ptr + number * D + lanes, mask=lanes < D, other=0.0)
        out = out_ptr + number.to(tl.int64) * num_keys
        tl.store(out + rows, tl.sum(unit * anchor[None, :], axis=1), mask=rows < num_keys)
