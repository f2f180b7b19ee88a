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
from vllm_kvcompress.triton_kernels._attend_parts import (
    attend_exact,
    exact_values,
    part_queries,
    part_rows,
    part_zeros,
    range_channels,
    reduce_kernel,
    scores_of_part,
    sign_scores,
    sketched_queries,
    sums_of_part,
)
from vllm_kvcompress.triton_kernels._common import NOTHING_SEEN, cast
from vllm_kvcompress.triton_kernels._paged import (
    CODES,
    SCALES,
    codes_at,
    interleave_four,
    is_windowed,
    load_part,
    load_part_scales,
    load_scales,
    request_lengths,
    split_four,
    window_rows,
)


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
        new_kv: [>= T, H, 2 * D] `window_dtype`, bfloat16 or float16, contiguous: the step's K then V in cache space.
        pages: [num_pages, H, head_bytes] uint8; any stride of pages, each page contiguous.
        block_table: [R, max_pages] int32, 0 = null page.
        query_start_loc: [R + 1] int32; rows from query_start_loc[R] on are padding.
        seq_lens: [R] int32: history plus new tokens.
        out: [T, Hq, D] float16, bfloat16 or float32, written in cache space of the values; last dimension contiguous.
        scale: softmax scale, positive.
        window_cache: [num_blocks, H, block, 4 * D] uint8 or None; window_table: [R, max_blocks] int32, 0 = no block.
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
        *q.stride()[:2],
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
        *out.stride()[:2],
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
        reduce_kernel[(tokens, query_heads)](
            workspace,
            query_start_loc,
            requests,
            out,
            *out.stride()[:2],
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
            queries += (part_queries(q_rows, row_mask, boost, K_PARTS, p),)
        if SIGNS is not None:
            sketched = sketched_queries(q_rows, row_mask, boost, sketch_ptr, D, BLOCK_M, BLOCK_D)
    unboost = scale_log2 / boost
    q_sum = tl.sum(query.to(tl.float32), axis=1) * boost

    top = tl.full([BLOCK_M], NOTHING_SEEN, tl.float32)
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
            sums += (part_zeros(V_PARTS, p, BLOCK_M),)
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
                    part_scores = scores_of_part(queries[p], k_words[p], k_scale, K_PARTS, p)
                    scores = part_scores if p == 0 else scores + part_scores
                if SIGNS is not None:
                    scores += sign_scores(sketched, head_ptr, in_page, exists, read, SIGNS, SIGN_NORMS, D, BLOCK_D)
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
                    part_sums, part_unit = sums_of_part(
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
            accs += part_rows(sums[p], units[p], middles, V_PARTS, p)

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
            v = exact_values(kv_rows + D, exists, V_RANGES)
            top, total, accs = attend_exact(query, k, v, exists[None, :], scale_log2, top, total, accs)

    first_new_unit = page_units + window_units
    begin = tl.maximum(unit_begin - first_new_unit, 0)
    for unit in tl.range(begin, tl.minimum(unit_end - first_new_unit, new_units), num_stages=2):
        keys = unit * BLOCK_E + exact_lanes
        is_new = keys < visible
        kv_rows = new_ptr + (first_token + keys).to(tl.int64) * (NUM_KV_HEADS * 2 * D) + kv_head * (2 * D)
        kv = kv_rows[:, None] + channels[None, :]
        kv_mask = is_new[:, None] & in_channels[None, :]
        k = tl.load(kv, mask=kv_mask, other=0.0)
        v = exact_values(kv_rows + D, is_new, V_RANGES)
        causal = is_new[None, :] & (keys[None, :] <= own_token[:, None])
        top, total, accs = attend_exact(query, k, v, causal, scale_log2, top, total, accs)

    if partial_ptr is None:
        out_rows = out_ptr + token * out_stride_token + head * out_stride_head
        # Every row has seen at least its own token.
        divisor = tl.where(row_mask, total, 1.0)[:, None]
        for r in tl.static_range(len(V_RANGES)):
            of_range, in_range = range_channels(V_RANGES, r)
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
            of_range, in_range = range_channels(V_RANGES, r)
            partial_rows = partial_ptr + index[:, None] * D + of_range[None, :]
            tl.store(partial_rows, accs[r], mask=seen[:, None] & in_range[None, :])
