# SPDX-License-Identifier: Apache-2.0
"""Attention over pages, 16-bit windows and a step's own exact tokens, for decoding and for prefill. The torch reference
is `kernels.reference.attend_reference`.

A program serves a tile of query rows of one KV head of one request, and one of `num_splits` shares of what they see.
Pages are multiplied as codes and scaled afterwards, which is cheaper than dequantising and exact:

    q.k = scale * (q.code) + zero * sum(q) + q.mean        sum p v = sum (p * scale) code + sum p * zero

Codes at one position in their bytes are one operand: four products of depth D / 4 in place of one of depth D, so that
codes go from memory to tensor cores by masks alone. Softmax is in base 2.

That is of the 2-bit affine formats. Others go the same way with levels in place of codes and the parts of a row one by
one, each with a scale of its own (TurboQuant, arXiv 2504.19874, section 4.3). The signs of what a key's codes leave
over (section 3.2) are one more product, with the sketch of the query: q.k gains sqrt(pi / 2) / D * |r| * (S q).sign.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from vllm_kvcompress.formats.base import PageLayout
from vllm_kvcompress.triton_kernels import _common, _paged
from vllm_kvcompress.triton_kernels._common import BLOCK_K, cast
from vllm_kvcompress.triton_kernels._paged import (
    BEND,
    BITS,
    CHANNEL,
    CHANNELS,
    CHUNK_COUNT,
    CHUNK_ENTRIES,
    CODES,
    COLUMNS,
    POSITIONS,
    SCALES,
    UNIT,
    codes_at,
    interleave,
    interleave_four,
    is_windowed,
    levels_at,
    load_halves,
    load_part,
    load_part_scales,
    load_scales,
    load_words,
    request_lengths,
    split_four,
    window_rows,
)

# Maximum of rows that have seen nothing: below any score, and its difference from itself is 0, not NaN.
_NOTHING_SEEN = tl.constexpr(-1e30)
_SIGN_UNIT = tl.constexpr(math.sqrt(math.pi / 2))


def attend(
    q: torch.Tensor,
    new_kv: torch.Tensor,
    pages: torch.Tensor,
    layout: PageLayout,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    out: torch.Tensor,
    *,
    scale: float,
    window_cache: torch.Tensor | None,
    window_table: torch.Tensor | None,
    window_dtype: torch.dtype,
    sink_tokens: int,
    recent_tokens: int,
    max_query_len: int,
    num_splits: int,
    workspace: torch.Tensor | None,
    sketch: torch.Tensor | None = None,
) -> None:
    """Causal attention of every request's new tokens over its history and themselves. Never waits for the device.

    History token t of c is read in 16 bits if (t < sink_tokens or t >= c - recent_tokens) and its companion block is
    not 0; else from its page; not at all if that is page 0. Rows of `out` that belong to no request are not written.

    Args:
        q: [T, Hq, D] float16 in cache space; the last dimension is contiguous. Head i reads KV head i // (Hq / H).
        new_kv: [>= T, H, 2 * D] `window_dtype`, contiguous: K then V of the step's tokens in cache space.
        pages: [num_pages, H, head_bytes] uint8; any stride of pages, each page contiguous.
        block_table: [R, max_pages] int32, 0 = null page.
        query_start_loc: [R + 1] int32; rows from query_start_loc[R] on are padding.
        seq_lens: [R] int32: history plus new tokens.
        out: [T, Hq, D] float16, bfloat16 or float32, written in cache space of the values; last dimension contiguous.
        scale: softmax scale, positive.
        window_cache: [num_blocks, H, block, 4 * D] uint8 or None; window_table: [R, max_blocks] int32, 0 = no block.
        window_dtype: bfloat16 or float16.
        max_query_len: most new tokens of a request, or more.
        num_splits: shares into which what a tile of rows sees is cut, for programs enough where requests are few.
        workspace: 1-D float32 of `workspace_elements` elements, or None with one split.
        sketch: S of `quantizers.qjl`, contiguous float16 [D, D], if the keys have signs; else None.

    Raises:
        ValueError: shapes, dtypes or strides do not fit, or the workspace is too small.
    """
    tokens, query_heads, head_dim = q.shape
    heads, requests = pages.shape[1], seq_lens.shape[0]
    constants = _paged.page_constants(pages, layout)
    _common.check_sketch(sketch, layout)
    windows, window_stride, window_table_stride, window_block = _paged.window_view(
        window_cache, window_table, window_dtype, layout
    )
    if q.dtype != torch.float16 or head_dim != layout.head_dim or query_heads % heads or out.shape != q.shape:
        raise ValueError(
            f"q and out must be [T, n * {heads}, {layout.head_dim}], q float16; got {q.dtype} {list(q.shape)} and "
            f"{list(out.shape)}"
        )
    if q.stride(2) != 1 or out.stride(2) != 1:
        raise ValueError(f"heads of q and out must be contiguous, got strides {q.stride()} and {out.stride()}")
    if new_kv.dtype != window_dtype or new_kv.shape[1:] != (heads, 2 * head_dim) or not new_kv.is_contiguous():
        raise ValueError(
            f"new_kv must be a contiguous {window_dtype} [T, {heads}, {2 * head_dim}], got {new_kv.dtype} "
            f"{list(new_kv.shape)} with strides {new_kv.stride()}"
        )
    if block_table.stride(1) != 1 or (window_table is not None and window_table.stride(1) != 1):
        raise ValueError("rows of block_table and window_table must be contiguous")
    needed = workspace_elements(tokens, query_heads, head_dim, num_splits)
    if needed and (workspace is None or workspace.dtype != torch.float32 or workspace.numel() < needed):
        raise ValueError(f"{num_splits} splits of {tokens} tokens need a float32 workspace of {needed} elements")
    if tokens == 0 or requests == 0:
        return

    group = query_heads // heads
    block_d = constants["BLOCK_D"]
    tile = _tile(max_query_len * group, block_d, _paged.narrowest(constants["V_PARTS"]), layout.is_two_bit)
    row_tiles = triton.cdiv(max_query_len * group, tile["BLOCK_M"])
    _attend_kernel[(row_tiles * heads, num_splits, requests)](
        q,
        q.stride(0),
        q.stride(1),
        new_kv,
        pages,
        pages.stride(0),
        block_table,
        block_table.stride(0),
        windows,
        window_stride,
        window_table,
        window_table_stride,
        query_start_loc,
        seq_lens,
        out,
        out.stride(0),
        out.stride(1),
        workspace if num_splits > 1 else None,
        sketch,
        tokens,
        row_tiles,
        sink_tokens,
        recent_tokens,
        scale * math.log2(math.e),
        GROUP=group,
        WINDOW_BLOCK=window_block,
        TWO_BIT=layout.is_two_bit,
        V_RANGES=((0, head_dim, block_d),) if layout.is_two_bit else _paged.chunk_ranges(constants["V_PARTS"]),
        **constants,
        **tile,
    )
    if num_splits > 1:
        _reduce_kernel[(tokens, query_heads)](
            workspace,
            query_start_loc,
            requests,
            out,
            out.stride(0),
            out.stride(1),
            tokens,
            num_splits,
            NUM_HEADS=query_heads,
            D=head_dim,
            BLOCK_D=block_d,
            BLOCK_S=min(triton.next_power_of_2(num_splits), 16),
            num_warps=2,
        )


def workspace_elements(num_tokens: int, num_query_heads: int, head_dim: int, num_splits: int) -> int:
    """float32 elements of `attend`'s workspace: per split, token and query head an accumulator, a maximum and a sum."""
    return num_splits * num_tokens * num_query_heads * (head_dim + 2) if num_splits > 1 else 0


def _tile(rows: int, block_d: int, columns: int, two_bit: bool) -> dict[str, int]:
    """Tile and launch options for so many query rows a KV head and request.

    Chosen by the machine code's instructions, registers and shared memory (less than 99 KiB). Warps divide a product's
    rows, 16 each, unless it is wider than high: more warps than that would do the same work twice. Registers of the
    decoding tiles are capped so that enough programs share a multiprocessor to hide each other's waiting.

    Args:
        columns: fewest of a product with values. Warps divide them too, 8 each.
    """
    if rows <= 16:
        if block_d == 64:
            return {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_E": 32, "num_warps": 1, "num_stages": 3, "maxnreg": 168}
        if columns < 32:
            return {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_E": 32, "num_warps": 1, "num_stages": 2, "maxnreg": 168}
        maxnreg = 128 if block_d == 128 else 168
        return {"BLOCK_M": 16, "BLOCK_N": 128, "BLOCK_E": 32, "num_warps": 4, "num_stages": 3, "maxnreg": maxnreg}
    if block_d == 256:
        return {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_E": 32, "num_warps": 4, "num_stages": 3}
    # Tiles of 64 rows become warpgroup products (sm_90), each with its operands' descriptors in uniform registers. The
    # kernels of chunked formats need more of those than there are, and ptxas (12.8, as Triton 3.6 brings it) then gives
    # a loop's counter the register of a descriptor: an illegal memory access, seen with turboquant-3.5 at head size 64.
    if rows <= 32 or not two_bit:
        return {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_E": 32, "num_warps": 2, "num_stages": 3}
    return {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_E": 64, "num_warps": 4, "num_stages": 3}


@triton.jit(do_not_specialize=["num_tokens", "row_tiles", "sink_tokens", "recent_tokens"])
def _attend_kernel(
    q_ptr,
    q_stride_token,
    q_stride_head,
    new_ptr,
    pages_ptr,
    page_stride,
    table_ptr,
    table_stride,
    window_ptr,
    window_stride,
    window_table_ptr,
    window_table_stride,
    query_start_loc_ptr,
    seq_lens_ptr,
    out_ptr,
    out_stride_token,
    out_stride_head,
    partial_ptr,
    sketch_ptr,
    num_tokens,
    row_tiles,
    sink_tokens,
    recent_tokens,
    scale_log2,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    HEAD_BYTES: tl.constexpr,
    K_AFFINE: tl.constexpr,
    V_AFFINE: tl.constexpr,
    K_PARTS: tl.constexpr,
    V_PARTS: tl.constexpr,
    SIGNS: tl.constexpr,
    SIGN_NORMS: tl.constexpr,
    K_MEAN: tl.constexpr,
    WINDOW_BLOCK: tl.constexpr,
    TWO_BIT: tl.constexpr,
    V_RANGES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Grid: (tiles of rows x KV heads) x splits x requests.

    Args:
        window_ptr, K_MEAN: None without windows, without page means. partial_ptr: None with one split. sketch_ptr,
            SIGNS, SIGN_NORMS: None without signs.
        K_PARTS, V_PARTS: of `_paged.row_parts`. V_RANGES: (first channel, channels, width) of the accumulators.
        BLOCK_M: rows; BLOCK_N: tokens of a page read at a time; BLOCK_E: exact tokens at a time.
    """
    kv_head = tl.program_id(0) // row_tiles
    first_row = (tl.program_id(0) % row_tiles) * BLOCK_M
    split = tl.program_id(1)
    request = tl.program_id(2)
    first_token, new, history = request_lengths(query_start_loc_ptr, seq_lens_ptr, request)
    if first_row >= new * GROUP:
        return

    # Rows are (token, query head of this KV head): a tile never meets another KV head, however odd the group.
    rows = first_row + tl.arange(0, BLOCK_M)
    row_mask = rows < new * GROUP
    own_token = rows // GROUP
    token = (first_token + own_token).to(tl.int64)
    head = kv_head * GROUP + rows % GROUP
    q_rows = q_ptr + token * q_stride_token + head * q_stride_head
    # New tokens that the last row sees.
    visible = tl.minimum((first_row + BLOCK_M - 1) // GROUP + 1, new)

    # What the tile sees, in units of about as many bytes: tiles of pages, of windows (sinks, then recent tokens) and of
    # the step's own tokens. Splits take equal runs of units.
    page_units = tl.cdiv(history, BLOCK_N)
    sinks = 0
    recent_begin = history
    if window_ptr is not None:
        sinks = tl.minimum(sink_tokens, history)
        recent_begin = tl.maximum(sinks, history - recent_tokens)
    sink_units = tl.cdiv(sinks, BLOCK_E)
    window_units = sink_units + tl.cdiv(history - recent_begin, BLOCK_E)
    new_units = tl.cdiv(visible, BLOCK_E)
    share = tl.cdiv(page_units + window_units + new_units, tl.num_programs(1))
    unit_begin = split * share
    unit_end = unit_begin + share

    channels = tl.arange(0, BLOCK_D)
    in_channels = channels < D
    out_mask = row_mask[:, None] & in_channels[None, :]
    query = tl.load(q_rows[:, None] + channels[None, :], mask=out_mask, other=0.0)
    # Queries take the power of 4 off the codes. Before that a power of two, exact, takes each row's largest to 2^13 or
    # more: over 4^3, a channel down to 2^-21 of it still keeps all its bits.
    largest = tl.max(tl.abs(query), axis=1).to(tl.float32)
    power = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    boost = 8192.0 / tl.where(largest > 0, power, 8192.0)
    if TWO_BIT:
        q0, q1, q2, q3 = split_four(query.to(tl.float32) * boost[:, None])
        q0 = q0.to(tl.float16)
        q1 = (q1 * 0.25).to(tl.float16)
        q2 = (q2 * 0.0625).to(tl.float16)
        q3 = (q3 * 0.015625).to(tl.float16)
        # A product with codes, which are in units of 2^-24, is `boost` times the true one.
        boost = boost * 2.0**-24
    else:
        queries = ()
        for p in tl.static_range(len(K_PARTS)):
            queries += (_part_queries(q_rows, row_mask, boost, K_PARTS, p),)
        if SIGNS is not None:
            sketched = _sketched(q_rows, row_mask, boost, sketch_ptr, D, BLOCK_M, BLOCK_D)
    unboost = scale_log2 / boost
    q_sum = tl.sum(query.to(tl.float32), axis=1) * boost

    top = tl.full([BLOCK_M], _NOTHING_SEEN, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    middles = tl.zeros([BLOCK_M], tl.float32)
    # Accumulators are in units of the last tile's largest value scale: fp16 then holds weight times scale well,
    # whatever the size of the values.
    if TWO_BIT:
        acc0 = tl.zeros([BLOCK_M, BLOCK_D // 4], tl.float32)
        acc1 = tl.zeros([BLOCK_M, BLOCK_D // 4], tl.float32)
        acc2 = tl.zeros([BLOCK_M, BLOCK_D // 4], tl.float32)
        acc3 = tl.zeros([BLOCK_M, BLOCK_D // 4], tl.float32)
        acc_unit = 1.0
    else:
        sums = ()
        units = ()
        for p in tl.static_range(len(V_PARTS)):
            sums += (_part_zeros(V_PARTS, p, BLOCK_M),)
            units += (tl.full([], 1.0, tl.float32),)
    head_offset = kv_head * HEAD_BYTES
    table_row = table_ptr + request.to(tl.int64) * table_stride
    window_row = table_row
    if window_ptr is not None:
        window_row = window_table_ptr + request.to(tl.int64) * window_table_stride
    # Most tiles are read whole. The others, of the windows' zones and of the end, are those before and after them.
    page_begin = tl.minimum(unit_begin, page_units)
    page_end = tl.minimum(unit_end, page_units)
    whole_begin = tl.minimum(tl.maximum(tl.cdiv(sinks, BLOCK_N), page_begin), page_end)
    whole_end = tl.maximum(tl.minimum(recent_begin // BLOCK_N, page_end), whole_begin)
    lanes = tl.arange(0, BLOCK_N)
    quads = tl.arange(0, BLOCK_D // 4)
    for PARTIAL in tl.static_range(2):
        loop_begin = page_begin if PARTIAL else whole_begin
        loop_end = page_end - (whole_end - whole_begin) if PARTIAL else whole_end
        for i in tl.range(loop_begin, loop_end, num_stages=2 if PARTIAL else None):
            unit = tl.where(i < whole_begin, i, i + (whole_end - whole_begin)) if PARTIAL else i
            begin = unit * BLOCK_N
            page = tl.load(table_row + begin // PAGE_TOKENS)
            exists = page != 0
            head_ptr = pages_ptr + page.to(tl.int64) * page_stride + head_offset
            in_page = begin % PAGE_TOKENS + lanes
            read = exists
            if PARTIAL:
                positions = begin + lanes
                read &= positions < history
                if window_ptr is not None:
                    windowed = is_windowed(positions, history, sink_tokens, recent_tokens)
                    read &= tl.load(window_row + positions // WINDOW_BLOCK, mask=windowed, other=0) == 0
            if TWO_BIT:
                codes = in_page[:, None] * (D // 4) + quads[None, :]
                code_mask = exists & (quads < D // 4)[None, :]
                k = tl.trans(tl.load(head_ptr + K_PARTS[0][CODES] + codes, mask=code_mask, other=0))
                v = tl.load(head_ptr + V_PARTS[0][CODES] + codes, mask=code_mask, other=0)
                k_scale, k_zero = load_scales(head_ptr, K_PARTS[0][SCALES], in_page, read)
                v_scale, v_zero = load_scales(head_ptr, V_PARTS[0][SCALES], in_page, read)

                scores = tl.dot(q0, codes_at(k, 0))
                scores = tl.dot(q1, codes_at(k, 1), scores)
                scores = tl.dot(q2, codes_at(k, 2), scores)
                scores = tl.dot(q3, codes_at(k, 3), scores)
            else:
                k_words = ()
                for p in tl.static_range(len(K_PARTS)):
                    k_words += (load_part(head_ptr, in_page, exists, K_PARTS, p),)
                v_words = ()
                v_scales = ()
                for p in tl.static_range(len(V_PARTS)):
                    v_words += (load_part(head_ptr, in_page, exists, V_PARTS, p),)
                    v_scales += (load_part_scales(head_ptr, in_page, read, V_AFFINE, V_PARTS, p),)
                for p in tl.static_range(len(K_PARTS)):
                    k_scale, k_zero = load_part_scales(head_ptr, in_page, read, K_AFFINE, K_PARTS, p)
                    part_scores = _part_scores(queries[p], k_words[p], k_scale, K_PARTS, p)
                    scores = part_scores if p == 0 else scores + part_scores
                if SIGNS is not None:
                    scores += _sign_scores(sketched, head_ptr, in_page, exists, read, SIGNS, SIGN_NORMS, D, BLOCK_D)
            row_shift = tl.where(exists, tl.zeros([BLOCK_M], tl.float32), float("-inf"))
            if K_MEAN is not None:
                mean_ptr = (head_ptr + K_MEAN).to(tl.pointer_type(tl.float16), bitcast=True)
                mean = tl.load(mean_ptr + channels, mask=exists & in_channels, other=0.0).to(tl.float32)
                row_shift += tl.sum(query.to(tl.float32) * mean[None, :], axis=1) * boost
            if TWO_BIT:
                scores = scores * k_scale[None, :] + (q_sum[:, None] * k_zero[None, :] + row_shift[:, None])
            elif K_AFFINE:
                scores += q_sum[:, None] * k_zero[None, :] + row_shift[:, None]
            else:
                scores += row_shift[:, None]
            if PARTIAL:
                scores = tl.where(read[None, :], scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, axis=1) * unboost)
            weights = tl.exp2(scores * unboost[:, None] - new_top[:, None])
            decay = tl.exp2(top - new_top)
            top = new_top
            total = total * decay + tl.sum(weights, axis=1)
            if TWO_BIT:
                largest_scale = tl.max(v_scale, axis=0)
                tile_unit = tl.where(largest_scale > 0, largest_scale, acc_unit)
                scaled = (weights * (v_scale / tile_unit)[None, :]).to(tl.float16)
                # Codes are taken about 1.5, their middle: the rounding of the weights then meets what varies between
                # tokens, not the offset that all codes share.
                middle = weights * (v_zero + 1.5 * v_scale)[None, :] - scaled.to(tl.float32) * (1.5 * tile_unit)
                middles = middles * decay + tl.sum(middle, axis=1)
                decay = decay * (acc_unit / tile_unit)
                acc_unit = tile_unit
                acc0 = tl.dot(scaled, codes_at(v, 0), acc0 * decay[:, None])
                acc1 = tl.dot(scaled, codes_at(v, 1), acc1 * decay[:, None])
                acc2 = tl.dot(scaled, codes_at(v, 2), acc2 * decay[:, None])
                acc3 = tl.dot(scaled, codes_at(v, 3), acc3 * decay[:, None])
            else:
                tile_sums = ()
                tile_units = ()
                for p in tl.static_range(len(V_PARTS)):
                    v_scale, v_middle = v_scales[p]
                    part_sums, part_unit = _part_sums(
                        sums[p], units[p], weights, decay, v_words[p], v_scale, V_PARTS, p
                    )
                    tile_sums += (part_sums,)
                    tile_units += (part_unit,)
                    if V_AFFINE:
                        middles = middles * decay + tl.sum(weights * v_middle[None, :], axis=1)
                sums = tile_sums
                units = tile_units
    if TWO_BIT:
        acc = interleave_four(acc0, acc1 * 0.25, acc2 * 0.0625, acc3 * 0.015625) * (acc_unit * 2.0**24)
        acc += middles[:, None]
        accs = (acc,)
    else:
        accs = ()
        for p in tl.static_range(len(V_PARTS)):
            accs += _part_rows(sums[p], units[p], middles, V_PARTS, p)

    exact_lanes = tl.arange(0, BLOCK_E)
    if window_ptr is not None:
        begin = tl.maximum(unit_begin - page_units, 0)
        for unit in tl.range(begin, tl.minimum(unit_end - page_units, window_units), num_stages=2):
            is_sink = unit < sink_units
            first = tl.where(is_sink, unit * BLOCK_E, recent_begin + (unit - sink_units) * BLOCK_E)
            positions = first + exact_lanes
            inside = positions < tl.where(is_sink, sinks, history)
            block = tl.load(window_row + positions // WINDOW_BLOCK, mask=inside, other=0)
            exists = block != 0
            kv_rows = window_rows(window_ptr, window_stride, block, positions, kv_head, WINDOW_BLOCK, D)
            kv = kv_rows[:, None] + channels[None, :]
            kv_mask = exists[:, None] & in_channels[None, :]
            k = tl.load(kv, mask=kv_mask, other=0.0)
            v = _exact_values(kv_rows + D, exists, V_RANGES)
            top, total, accs = _attend_exact(query, k, v, exists[None, :], scale_log2, top, total, accs)

    first_new_unit = page_units + window_units
    begin = tl.maximum(unit_begin - first_new_unit, 0)
    for unit in tl.range(begin, tl.minimum(unit_end - first_new_unit, new_units), num_stages=2):
        keys = unit * BLOCK_E + exact_lanes
        is_new = keys < visible
        kv_rows = new_ptr + (first_token + keys).to(tl.int64) * (NUM_KV_HEADS * 2 * D) + kv_head * (2 * D)
        kv = kv_rows[:, None] + channels[None, :]
        kv_mask = is_new[:, None] & in_channels[None, :]
        k = tl.load(kv, mask=kv_mask, other=0.0)
        v = _exact_values(kv_rows + D, is_new, V_RANGES)
        causal = is_new[None, :] & (keys[None, :] <= own_token[:, None])
        top, total, accs = _attend_exact(query, k, v, causal, scale_log2, top, total, accs)

    if partial_ptr is None:
        out_rows = out_ptr + token * out_stride_token + head * out_stride_head
        # Every row has seen at least its own token.
        divisor = tl.where(row_mask, total, 1.0)[:, None]
        for r in tl.static_range(len(V_RANGES)):
            of_range, in_range = _range_channels(V_RANGES, r)
            result = cast(accs[r] / divisor, out_ptr.dtype.element_ty)
            tl.store(out_rows[:, None] + of_range[None, :], result, mask=row_mask[:, None] & in_range[None, :])
    else:
        heads = NUM_KV_HEADS * GROUP
        index = (split * num_tokens + token) * heads + head
        statistics_ptr = partial_ptr + tl.num_programs(1).to(tl.int64) * num_tokens * (heads * D) + 2 * index
        tl.store(statistics_ptr, top, mask=row_mask)
        tl.store(statistics_ptr + 1, total, mask=row_mask)
        # What a share without any token leaves is not read.
        seen = row_mask & (total > 0)
        for r in tl.static_range(len(V_RANGES)):
            of_range, in_range = _range_channels(V_RANGES, r)
            partial_rows = partial_ptr + index[:, None] * D + of_range[None, :]
            tl.store(partial_rows, accs[r], mask=seen[:, None] & in_range[None, :])


@triton.jit
def _part_queries(q_rows, row_mask, boost, PARTS: tl.constexpr, P: tl.constexpr):
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
def _sketched(q_rows, row_mask, boost, sketch_ptr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
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
def _part_scores(queries, words, scale, PARTS: tl.constexpr, P: tl.constexpr):
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
def _sign_scores(
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
        sketched: of `_sketched`.
    """
    rows = head_ptr + SIGNS + tokens * (D // 8)
    COUNT: tl.constexpr = len(sketched)
    words = (load_words(rows, exists, 1, D, COUNT, sketched[0].shape[1]),)
    norms = load_halves(head_ptr, SIGN_NORMS, tokens, read)
    scores = tl.zeros([sketched[0].shape[0], norms.shape[0]], tl.float32)
    for i in tl.static_range(COUNT):
        scores = tl.dot(sketched[i], tl.trans(levels_at(words, i, 1, 0.0)), scores)
    return scores * (norms * _SIGN_UNIT)[None, :]


@triton.jit
def _part_zeros(PARTS: tl.constexpr, P: tl.constexpr, BLOCK_M: tl.constexpr):
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
def _part_sums(sums, unit, weights, decay, words, scale, PARTS: tl.constexpr, P: tl.constexpr):
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
def _part_rows(sums, unit, middles, PARTS: tl.constexpr, P: tl.constexpr):
    """Accumulators of a part's chunks in the order of the channels and in units of 1."""
    FACTOR: tl.constexpr = PARTS[P][UNIT]
    accs = ()
    for c in tl.static_range(len(sums)):
        accs += (interleave(sums[c]) * (unit * FACTOR) + middles[:, None],)
    return accs


@triton.jit
def _range_channels(RANGES: tl.constexpr, R: tl.constexpr):
    """Channels of an accumulator in the row, and which of them it has."""
    FIRST: tl.constexpr = RANGES[R][0]
    COUNT: tl.constexpr = RANGES[R][1]
    WIDE: tl.constexpr = RANGES[R][2]
    lanes = tl.arange(0, WIDE)
    return FIRST + lanes, lanes < COUNT


@triton.jit
def _exact_values(rows, mask, RANGES: tl.constexpr):
    """16-bit values of tokens, [BLOCK_E, width] for each accumulator. rows: [BLOCK_E] pointers."""
    values = ()
    for r in tl.static_range(len(RANGES)):
        channels, in_range = _range_channels(RANGES, r)
        found = tl.load(rows[:, None] + channels[None, :], mask=mask[:, None] & in_range[None, :], other=0.0)
        values += (found,)
    return values


@triton.jit
def _attend_exact(query, k, values, mask, scale_log2, top, total, accs):
    """One step of the online softmax over exact keys [BLOCK_E, BLOCK_D] and values, of `_exact_values`.

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
def _reduce_kernel(
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
    top = tl.full([], _NOTHING_SEEN, tl.float32)
    total = tl.zeros([], tl.float32)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for begin in range(0, num_splits, BLOCK_S):
        splits = begin + tl.arange(0, BLOCK_S)
        statistics = statistics_ptr + 2 * splits * row_stride
        tops = tl.load(statistics, mask=splits < num_splits, other=_NOTHING_SEEN)
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
