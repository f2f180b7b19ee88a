# SPDX-License-Identifier: Apache-2.0
"""What `attend` does with a part of a row's channels, with signs, with exact tokens, and with shares of a request."""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_kvcompress.triton_kernels._common import BLOCK_K, NOTHING_SEEN, SIGN_UNIT, cast
from vllm_kvcompress.triton_kernels._paged import (
    BEND,
    BITS,
    CHANNEL,
    CHANNELS,
    CHUNK_COUNT,
    CHUNK_ENTRIES,
    COLUMNS,
    POSITIONS,
    UNIT,
    interleave,
    levels_at,
    load_halves,
    load_words,
    split_four,
)


@triton.jit
def part_queries(q_rows, row_mask, boost, PARTS: tl.constexpr, P: tl.constexpr):
    """Queries for a part of the keys: for each chunk a tuple, by position, of [BLOCK_M, columns] fp16, times boost."""
    COUNT: tl.constexpr = PARTS[P][CHUNK_COUNT]
    queries = ()
    for c in tl.static_range(COUNT):
        queries += (_chunk_queries(q_rows, row_mask, boost, PARTS, P, c),)
    return queries


@triton.jit
def _chunk_queries(q_rows, row_mask, boost, PARTS: tl.constexpr, P: tl.constexpr, C: tl.constexpr):
    FIRST: tl.constexpr = PARTS[P][CHANNEL + CHUNK_ENTRIES * C]
    COUNT: tl.constexpr = PARTS[P][POSITIONS + CHUNK_ENTRIES * C]
    WIDE: tl.constexpr = PARTS[P][COLUMNS + CHUNK_ENTRIES * C]
    USED: tl.constexpr = PARTS[P][CHANNELS + CHUNK_ENTRIES * C] // COUNT
    columns = tl.arange(0, WIDE)
    mask = row_mask[:, None] & (columns < USED)[None, :]
    queries = ()
    for i in tl.static_range(COUNT):
        query = tl.load(q_rows[:, None] + (FIRST + i + COUNT * columns)[None, :], mask=mask, other=0.0)
        queries += ((query.to(tl.float32) * boost[:, None]).to(tl.float16),)
    return queries


@triton.jit
def sketched_queries(
    q_rows, row_mask, boost, sketch_ptr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr
):
    """S q * boost / D as fp16, a tuple by position of tensors [BLOCK_M, columns] for words of signs.

    At most the largest of q * boost, for rows of S have length sqrt(D).

    Args:
        sketch_ptr: S [D, D] fp16, a row for each column of the result.
    """
    columns = tl.arange(0, BLOCK_D)
    out = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for begin in tl.range(0, BLOCK_D, BLOCK_K):
        lanes = begin + tl.arange(0, BLOCK_K)
        mask = row_mask[:, None] & (lanes < D)[None, :]
        query = tl.load(q_rows[:, None] + lanes[None, :], mask=mask, other=0.0)
        query = (query.to(tl.float32) * boost[:, None]).to(tl.float16)
        in_sketch = (columns < D)[:, None] & (lanes < D)[None, :]
        sketch = tl.load(sketch_ptr + columns[:, None] * D + lanes[None, :], mask=in_sketch, other=0.0)
        out = tl.dot(query, tl.trans(sketch), out)
    x0, x1, x2, x3 = split_four((out * (1.0 / D)).to(tl.float16))
    if BLOCK_D == 64:
        return x0, x1, x2, x3
    else:
        # Bytes of signs, whole: column j of the i-th is column 8j + i.
        x0, x4 = tl.split(x0.reshape(BLOCK_M, BLOCK_D // 8, 2))
        x1, x5 = tl.split(x1.reshape(BLOCK_M, BLOCK_D // 8, 2))
        x2, x6 = tl.split(x2.reshape(BLOCK_M, BLOCK_D // 8, 2))
        x3, x7 = tl.split(x3.reshape(BLOCK_M, BLOCK_D // 8, 2))
        return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def scores_of_part(queries, words, scale, PARTS: tl.constexpr, P: tl.constexpr):
    """[BLOCK_M, BLOCK_N] products of queries with a part of the keys, but for what `load_part_scales` calls middle."""
    WIDTH: tl.constexpr = PARTS[P][BITS]
    FACTOR: tl.constexpr = PARTS[P][UNIT]
    CURVE: tl.constexpr = PARTS[P][BEND]
    scores = tl.zeros([queries[0][0].shape[0], scale.shape[0]], tl.float32)
    for c in tl.static_range(len(queries)):
        for i in tl.static_range(len(queries[c])):
            scores = tl.dot(queries[c][i], tl.trans(levels_at(words[c], i, WIDTH, CURVE)), scores)
    return scores * (scale * FACTOR)[None, :]


@triton.jit
def sign_scores(
    sketched,
    head_ptr,
    tokens,
    exists,
    read,
    SIGNS: tl.constexpr,
    SIGN_NORMS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """[BLOCK_M, BLOCK_N] estimates of the products with the keys' residuals.

    Args:
        sketched: of `sketched`.
    """
    rows = head_ptr + SIGNS + tokens * (D // 8)
    COUNT: tl.constexpr = len(sketched)
    words = (load_words(rows, exists, 1, D, COUNT, sketched[0].shape[1]),)
    norms = load_halves(head_ptr, SIGN_NORMS, tokens, read)
    scores = tl.zeros([sketched[0].shape[0], norms.shape[0]], tl.float32)
    for i in tl.static_range(COUNT):
        scores = tl.dot(sketched[i], tl.trans(levels_at(words, i, 1, 0.0)), scores)
    return scores * (norms * SIGN_UNIT)[None, :]


@triton.jit
def part_zeros(PARTS: tl.constexpr, P: tl.constexpr, BLOCK_M: tl.constexpr):
    COUNT: tl.constexpr = PARTS[P][CHUNK_COUNT]
    sums = ()
    for c in tl.static_range(COUNT):
        sums += (_chunk_zeros(PARTS, P, c, BLOCK_M),)
    return sums


@triton.jit
def _chunk_zeros(PARTS: tl.constexpr, P: tl.constexpr, C: tl.constexpr, BLOCK_M: tl.constexpr):
    COUNT: tl.constexpr = PARTS[P][POSITIONS + CHUNK_ENTRIES * C]
    WIDE: tl.constexpr = PARTS[P][COLUMNS + CHUNK_ENTRIES * C]
    sums = ()
    for _ in tl.static_range(COUNT):
        sums += (tl.zeros([BLOCK_M, WIDE], tl.float32),)
    return sums


@triton.jit
def sums_of_part(sums, unit, weights, decay, words, scale, PARTS: tl.constexpr, P: tl.constexpr):
    """A tile's values of a part, weighted, added to `sums`, which decay.

    Args:
        sums: for each chunk a tuple, by position, of [BLOCK_M, columns] float32 in units of `unit`.

    Returns:
        The sums and their unit, the largest scale of the tile.
    """
    WIDTH: tl.constexpr = PARTS[P][BITS]
    CURVE: tl.constexpr = PARTS[P][BEND]
    largest_scale = tl.max(scale, axis=0)
    tile_unit = tl.where(largest_scale > 0, largest_scale, unit)
    scaled = (weights * (scale / tile_unit)[None, :]).to(tl.float16)
    decay = (decay * (unit / tile_unit))[:, None]
    new_sums = ()
    for c in tl.static_range(len(sums)):
        chunk_sums = ()
        for i in tl.static_range(len(sums[c])):
            levels = levels_at(words[c], i, WIDTH, CURVE)
            chunk_sums += (tl.dot(scaled, levels, sums[c][i] * decay),)
        new_sums += (chunk_sums,)
    return new_sums, tile_unit


@triton.jit
def part_rows(sums, unit, middles, PARTS: tl.constexpr, P: tl.constexpr):
    """Accumulators of a part's chunks in the order of the channels and in units of 1."""
    FACTOR: tl.constexpr = PARTS[P][UNIT]
    accs = ()
    for c in tl.static_range(len(sums)):
        accs += (interleave(sums[c]) * (unit * FACTOR) + middles[:, None],)
    return accs


@triton.jit
def range_channels(RANGES: tl.constexpr, R: tl.constexpr):
    """Channels of an accumulator in the row, and which of them it has."""
    FIRST: tl.constexpr = RANGES[R][0]
    COUNT: tl.constexpr = RANGES[R][1]
    WIDE: tl.constexpr = RANGES[R][2]
    lanes = tl.arange(0, WIDE)
    return FIRST + lanes, lanes < COUNT


@triton.jit
def exact_values(rows, mask, RANGES: tl.constexpr):
    """16-bit values of tokens, [BLOCK_E, width] for each accumulator. rows: [BLOCK_E] pointers."""
    values = ()
    for r in tl.static_range(len(RANGES)):
        channels, in_range = range_channels(RANGES, r)
        found = tl.load(rows[:, None] + channels[None, :], mask=mask[:, None] & in_range[None, :], other=0.0)
        values += (found,)
    return values


@triton.jit
def attend_exact(query, k, values, mask, scale_log2, top, total, accs):
    """One step of the online softmax over exact keys [BLOCK_E, BLOCK_D] and values, of `exact_values`.

    Args:
        query: [BLOCK_M, BLOCK_D] fp16. mask: broadcasts to [BLOCK_M, BLOCK_E].
        top, total: [BLOCK_M] maximum of the scores and sum of the weights so far, accs: tuple of [BLOCK_M, width];
            float32.
    """
    scores = tl.dot(query, tl.trans(cast(k, tl.float16))) * scale_log2
    scores = tl.where(mask, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, axis=1))
    weights = tl.exp2(scores - new_top[:, None])
    decay = tl.exp2(top - new_top)
    new_accs = ()
    for r in tl.static_range(len(values)):
        acc = accs[r] * decay[:, None]
        new_accs += (tl.dot(weights.to(tl.float16), cast(values[r], tl.float16), acc),)
    return new_top, total * decay + tl.sum(weights, axis=1), new_accs


@triton.jit(do_not_specialize=["num_requests", "num_tokens", "num_splits"])
def reduce_kernel(
    partial_ptr,
    query_start_loc_ptr,
    num_requests,
    out_ptr,
    out_stride_token,
    out_stride_head,
    num_tokens,
    num_splits,
    NUM_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Sum of the splits of one row. Grid: tokens x query heads. BLOCK_S: splits read at a time."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    if token >= tl.load(query_start_loc_ptr + num_requests):
        return
    channels = tl.arange(0, BLOCK_D)
    in_channels = channels < D
    row_stride = num_tokens.to(tl.int64) * NUM_HEADS
    row = token * NUM_HEADS + head
    statistics_ptr = partial_ptr + num_splits * row_stride * D + 2 * row
    partial_ptr += row * D + channels
    top = tl.full([], NOTHING_SEEN, tl.float32)
    total = tl.zeros([], tl.float32)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for begin in range(0, num_splits, BLOCK_S):
        splits = begin + tl.arange(0, BLOCK_S)
        statistics = statistics_ptr + 2 * splits * row_stride
        tops = tl.load(statistics, mask=splits < num_splits, other=NOTHING_SEEN)
        totals = tl.load(statistics + 1, mask=splits < num_splits, other=0.0)
        mask = (totals > 0)[:, None] & in_channels[None, :]
        parts = tl.load(partial_ptr[None, :] + splits[:, None] * row_stride * D, mask=mask, other=0.0)
        new_top = tl.maximum(top, tl.max(tops, axis=0))
        weights = tl.exp2(tops - new_top)
        decay = tl.exp2(top - new_top)
        top = new_top
        total = total * decay + tl.sum(totals * weights, axis=0)
        acc = acc * decay + tl.sum(parts * weights[:, None], axis=0)
    out_row = out_ptr + token * out_stride_token + head * out_stride_head
    tl.store(out_row + channels, cast(acc / total, out_ptr.dtype.element_ty), mask=in_channels)
