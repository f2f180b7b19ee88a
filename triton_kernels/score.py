# SPDX-License-Identifier: Apache-2.0
"""Importance of a request's slots in one layer, by which eviction chooses. The torch references are
`episodic.policies`.

Keys are dequantised into a workspace, as many at a time as it holds, and multiplied as fp16 with float32 sums.
Attention weights take two passes over them: the log-sum-exp of every query and head, by shares of the slots, then each
slot's largest weight, or the sum of its weights, over all rows (query, head of the group) of its KV head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
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
    """A request's slots in one layer. Keys come a workspace at a time."""

    pages: torch.Tensor
    """[num_pages, H, head_bytes] uint8"""
    layout: PageLayout
    table: torch.Tensor
    """[n] int64, pages that are not null"""
    count: int
    """slots in them; all but the last page are full"""
    workspace: torch.Tensor
    """[N, H, D] float16, contiguous; N of a page or more"""
    sketch: torch.Tensor | None
    """as of `gather_history`"""
    _first: int | None = field(default=None, init=False)
    """Of the slots whose keys are in the workspace"""

    def tiles(self, backwards: bool = False) -> Iterator[tuple[int, int, torch.Tensor]]:
        """(number, first slot, keys [m, H, D] float16 in cache space), a view that lasts until the next.

        One pass forwards and one backwards dequantise what fits the workspace once.

        Raises:
            ValueError: the workspace does not hold a page.
        """
        page = self.layout.page_tokens
        size = self.workspace.shape[0] // page * page
        if size == 0:
            raise ValueError(f"a workspace of {self.workspace.shape[0]} tokens does not hold a page of {page}")
        firsts = range(0, self.count, size)
        for number in reversed(range(len(firsts))) if backwards else range(len(firsts)):
            first = firsts[number]
            rows = min(size, self.count - first)
            if self._first != first:
                dequantise_keys(
                    self.pages, self.layout, self.table, self.count, first, self.workspace[:size], self.sketch
                )
                self._first = first
            yield number, first, self.workspace[:rows]


def dequantise_keys(
    pages: torch.Tensor,
    layout: PageLayout,
    table: torch.Tensor,
    num_slots: int,
    first: int,
    keys: torch.Tensor,
    sketch: torch.Tensor | None,
) -> None:
    """Keys of slots first <= i < min(num_slots, first + m) of one request, as its pages have them.

    Args:
        table: [n] int64 pages. first: a multiple of the page.
        keys: [m, H, D] float16, contiguous, written; m whole pages.
    """
    nothing = torch.zeros(2, dtype=torch.int32, device=pages.device)
    left = -(-(num_slots - first) // layout.page_tokens) * layout.page_tokens
    gather_history(
        pages,
        layout,
        table.int().unsqueeze(0),
        torch.full((1,), num_slots, dtype=torch.int32, device=pages.device),
        nothing,
        nothing,
        first,
        keys,
        None,
        tile_tokens=min(len(keys), left),
        window_cache=None,
        window_table=None,
        window_dtype=torch.float16,
        sink_tokens=0,
        recent_tokens=0,
        sketch=sketch,
    )


def score(
    policy: Policy,
    slots: Slots,
    queries: torch.Tensor | None,
    key_offset: torch.Tensor | None,
    scale: float,
    previous: torch.Tensor | None = None,
) -> torch.Tensor:
    """`policy.score` of a layer, as `kernels.compaction.score` gives it. Never waits for the device.

    Args:
        queries: [Q, Hq, D] float16 in cache space, the last dimension contiguous; None if the policy needs none.
        key_offset: [H, D] float32, what static centring took from the keys, in cache space; None: nothing.
        scale: softmax scale, positive.
        previous: [H, T'] float32, scores so far of the first T' slots, where the policy adds them up.

    Returns:
        [H, slots.count] float32. A key or query that is not finite makes NaN of all scores that see it.

    Raises:
        ValueError: no kernel scores by the policy, or queries are missing or do not fit, or previous scores do not.
    """
    scorer = SCORERS.get(type(policy))
    if scorer is None:
        raise ValueError(f"no GPU kernel scores by {type(policy).__name__}, only by {', '.join(map(_name, SCORERS))}")
    found = scorer(policy, slots, queries, key_offset, scale)
    if previous is not None:
        if previous.shape[0] != found.shape[0] or previous.shape[1] > found.shape[1]:
            raise ValueError(f"previous scores {list(previous.shape)} do not fit those of {list(found.shape)} slots")
        found[:, : previous.shape[1]] += previous
    return found


def _name(kind: type[Policy]) -> str:
    return kind.__name__


def _by_largest_weight(
    policy: EpiCache, slots: Slots, queries: torch.Tensor | None, key_offset: torch.Tensor | None, scale: float
) -> torch.Tensor:
    # Static centring shifts all scores of a query alike, which its softmax does not see.
    return _weights(slots, _checked(queries, slots, "a guide prompt"), scale, is_causal=False)


def _by_window(
    policy: SnapKV, slots: Slots, queries: torch.Tensor | None, key_offset: torch.Tensor | None, scale: float
) -> torch.Tensor:
    queries = _checked(queries, slots, f"the last {policy.window} slots")[-policy.window :]
    rows = len(queries) * (queries.shape[1] // slots.pages.shape[1])
    return policy.smooth(_weights(slots, queries, scale, is_causal=True) / rows, len(queries))


def _by_sum(
    policy: H2O, slots: Slots, queries: torch.Tensor | None, key_offset: torch.Tensor | None, scale: float
) -> torch.Tensor:
    return _weights(slots, _checked(queries, slots, "the block"), scale, is_causal=True)


def _by_difference(
    policy: KeyDiff, slots: Slots, queries: torch.Tensor | None, key_offset: torch.Tensor | None, scale: float
) -> torch.Tensor:
    sums = [_cosines(keys, key_offset, None).sum(1) for _, _, keys in slots.tiles()]
    anchor = torch.nn.functional.normalize(torch.stack(sums).sum(0), dim=-1)
    cosines = [_cosines(keys, key_offset, anchor) for _, _, keys in slots.tiles(backwards=True)]
    return -torch.cat(cosines[::-1], dim=1)


def _by_highest_rank(
    policy: EpiCacheKeyDiff, slots: Slots, queries: torch.Tensor | None, key_offset: torch.Tensor | None, scale: float
) -> torch.Tensor:
    weights = _by_largest_weight(EpiCache(), slots, queries, key_offset, scale)
    return highest_rank(weights, _by_difference(KeyDiff(), slots, queries, key_offset, scale))


def _by_age(
    policy: Streaming, slots: Slots, queries: torch.Tensor | None, key_offset: torch.Tensor | None, scale: float
) -> torch.Tensor:
    order = torch.arange(slots.count, dtype=torch.float32, device=slots.pages.device)
    return order.expand(slots.pages.shape[1], -1)


SCORERS: dict[type[Policy], Callable[[Any, Slots, torch.Tensor | None, torch.Tensor | None, float], torch.Tensor]] = {
    EpiCache: _by_largest_weight,
    EpiCacheKeyDiff: _by_highest_rank,
    SnapKV: _by_window,
    H2O: _by_sum,
    KeyDiff: _by_difference,
    Streaming: _by_age,
}


def _checked(queries: torch.Tensor | None, slots: Slots, whose: str) -> torch.Tensor:
    if queries is None or len(queries) == 0:
        raise ValueError(f"this policy needs the queries of {whose}")
    heads, dim = slots.pages.shape[1], slots.layout.head_dim
    if queries.dtype != torch.float16 or queries.shape[1] % heads or queries.shape[2] != dim or queries.stride(2) != 1:
        raise ValueError(
            f"queries must be float16 [Q, n * {heads}, {dim}], the last dimension contiguous, got {queries.dtype} "
            f"{list(queries.shape)} with strides {queries.stride()}"
        )
    return queries


def _weights(slots: Slots, queries: torch.Tensor, scale: float, is_causal: bool) -> torch.Tensor:
    """[H, T] float32: the largest softmax weight over queries [Q, Hq, D] and the group; if causal, the sum of weights.

    Causal: the queries are those of the last Q slots, each sees the slots up to its own.
    """
    heads, dim = slots.pages.shape[1], slots.layout.head_dim
    count, query_heads, _ = queries.shape
    if is_causal and count > slots.count:
        raise ValueError(f"{count} queries of {slots.count} slots")
    rows, device = count * (query_heads // heads), queries.device
    tile = _tile(dim)
    row_tiles = triton.cdiv(rows, tile["BLOCK"])
    longest = min(slots.count, slots.workspace.shape[0])
    shares = max(1, min(_PROGRAMS // (row_tiles * heads), longest // _MIN_SHARE))
    common = {
        "NUM_KV_HEADS": heads,
        "GROUP": query_heads // heads,
        "D": dim,
        "BLOCK_D": triton.next_power_of_2(dim),
        "IS_CAUSAL": is_causal,
        **tile,
    }
    strides = queries.stride(0), queries.stride(1)
    own_slots = slots.count - count
    parts = []
    for _, first, keys in slots.tiles():
        part = torch.empty(shares, heads, rows, device=device)
        _lse_kernel[(heads, row_tiles, shares)](
            queries, *strides, keys, part, rows, len(keys), first, own_slots, scale * math.log2(math.e), **common
        )
        parts.append(part)
    lse = torch.cat(parts).logsumexp(0)
    found = torch.empty(heads, slots.count, device=device)
    for _, first, keys in slots.tiles(backwards=True):
        _weights_kernel[(heads, triton.cdiv(len(keys), tile["BLOCK"]))](
            queries, *strides, keys, lse, found, slots.count, rows, len(keys), first, own_slots,
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
    """Log-sum-exp [shares, H, rows] float32 of what rows see of a share of the keys; -inf: nothing.

    Grid: KV heads x tiles of rows x shares. own_slots: slots before that of the first query, where causal.
    """
    kv_head = tl.program_id(0)
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
    out = lse_ptr + (tl.program_id(2) * NUM_KV_HEADS + kv_head).to(tl.int64) * num_rows
    tl.store(out + rows, lse, mask=rows < num_rows)


@triton.jit(do_not_specialize=["out_stride", "num_rows", "num_keys", "first_slot", "own_slots"])
def _weights_kernel(
    q_ptr,
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
    """Of the slots first_slot + 0 .. num_keys, into [H, T] float32. lse: [H, rows] float32.

    Grid: KV heads x tiles of slots. The largest weight is that of the largest exponent: one exponential a slot.
    """
    kv_head = tl.program_id(0)
    slots = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    keys = _key_tile(keys_ptr, kv_head, slots, num_keys, NUM_KV_HEADS, D, BLOCK_D)
    best = tl.full([BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    broken = tl.zeros([STREAM], tl.float32)
    for start in tl.range(0, num_rows, STREAM):
        rows = start + tl.arange(0, STREAM)
        query = _query_tile(q_ptr, q_stride_token, q_stride_head, kv_head, rows, num_rows, GROUP, D, BLOCK_D)
        lse = tl.load(lse_ptr + kv_head * num_rows + rows, mask=rows < num_rows, other=float("inf")) * _LOG2_E
        exponents = tl.dot(keys, tl.trans(query)) * scale_log2 - lse[None, :]
        if IS_CAUSAL:
            seen = (first_slot + slots)[:, None] <= (own_slots + rows // GROUP)[None, :]
            total += tl.sum(tl.exp2(tl.where(seen, exponents, -float("inf"))), axis=1)
        else:
            best = tl.maximum(best, tl.max(exponents, axis=1))
            broken += tl.where(rows < num_rows, lse, 0.0) * 0  # a maximum passes over NaN
    found = total if IS_CAUSAL else tl.exp2(best) + tl.sum(broken, axis=0)
    tl.store(out_ptr + kv_head.to(tl.int64) * out_stride + first_slot + slots, found, mask=slots < num_keys)


def _cosines(keys: torch.Tensor, offset: torch.Tensor | None, anchor: torch.Tensor | None) -> torch.Tensor:
    """Of unit keys (keys [m, H, D] + offset [H, D]) / length.

    Returns:
        float32: their cosine with unit vectors anchor [H, D], [H, m]; without those, sums of a few keys each,
        [H, tiles, D].
    """
    count, heads, dim = keys.shape
    block = 64
    tiles = triton.cdiv(count, block)
    found = torch.empty((heads, tiles, dim) if anchor is None else (heads, count), device=keys.device)
    _cosine_kernel[(heads, tiles)](
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
    """Grid: KV heads x tiles of keys."""
    kv_head = tl.program_id(0)
    rows = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    lanes = tl.arange(0, BLOCK_D)
    keys = _key_tile(keys_ptr, kv_head, rows, num_keys, NUM_KV_HEADS, D, BLOCK_D).to(tl.float32)
    if offset_ptr is not None:
        offset = tl.load(offset_ptr + kv_head * D + lanes, mask=lanes < D, other=0.0)
        keys = tl.where((rows < num_keys)[:, None], keys + offset[None, :], 0.0)
    length = tl.sqrt(tl.sum(keys * keys, axis=1))
    # A NaN is not above: it stays in the keys.
    unit = keys / tl.where(length > _UNIT_EPSILON, length, _UNIT_EPSILON)[:, None]
    if anchor_ptr is None:
        out = out_ptr + (kv_head * tl.num_programs(1) + tl.program_id(1)) * D
        tl.store(out + lanes, tl.sum(unit, axis=0), mask=lanes < D)
    else:
        anchor = tl.load(anchor_ptr + kv_head * D + lanes, mask=lanes < D, other=0.0)
        tl.store(out_ptr + kv_head * num_keys + rows, tl.sum(unit * anchor[None, :], axis=1), mask=rows < num_keys)
