# SPDX-License-Identifier: Apache-2.0
"""History out of pages and 16-bit windows as dense keys and values, for dense attention and for scoring. The torch
reference is `formats.base.read_pages` with the read rule of `kernels.reference`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_kvcompress.formats.base import PageLayout
from vllm_kvcompress.triton_kernels import _common, _paged
from vllm_kvcompress.triton_kernels._common import SIGN_UNIT, cast
from vllm_kvcompress.triton_kernels._paged import (
    BEND,
    BITS,
    CHANNEL,
    CHANNELS,
    CHUNK_ENTRIES,
    CODES,
    COLUMNS,
    POSITIONS,
    SCALES,
    UNIT,
    interleave,
    interleave_four,
    is_windowed,
    layer_pages,
    levels_at,
    load_halves,
    load_part,
    load_part_scales,
    load_scales,
    load_words,
    request_lengths,
    window_rows,
)


def gather_history(
    pages: torch.Tensor,
    layout: PageLayout,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    query_start_loc: torch.Tensor,
    cu_history: torch.Tensor,
    first_token: int,
    keys: torch.Tensor,
    values: torch.Tensor | None,
    *,
    tile_tokens: int,
    window_cache: torch.Tensor | None,
    window_table: torch.Tensor | None,
    window_dtype: torch.dtype,
    sink_tokens: int,
    recent_tokens: int,
    sketch: torch.Tensor | None = None,
    layer_offsets: torch.Tensor | None = None,
    aligned: int = 4,
) -> None:
    """Write history tokens first_token <= t < min(c, first_token + tile_tokens) of every request, c its history.

    Token t of request b goes to row cu_history[b] + t - first_token. Tokens of null pages become zeros, unless they are
    read in 16 bits (the rule of `attend.attend`). Finite values saturate in fp16. Never waits for the device.

    Args:
        pages: [num_pages, H, head_bytes] uint8; any stride of pages, each page contiguous.
        block_table: [R, max_pages] int32, 0 = null page.
        seq_lens: [R] int32: history plus new tokens; query_start_loc: [R + 1] int32.
        cu_history: [R + 1] int32. Rows from the capacity on are not written.
        first_token: a multiple of the page.
        keys: [capacity, H, D] float16, contiguous, written in cache space. values: the same, or None: left out.
        tile_tokens: a multiple of the page.
        window_cache: [num_blocks, H, block, 4 * D] uint8 or None; window_table: [R, max_blocks] int32, 0 = no block.
        window_dtype: bfloat16 or float16.
        sketch: S of `quantizers.qjl`, contiguous float16 [D, D], if the keys have signs; else None.
        layer_offsets: [R] int64: "request" r is layer r, whose pages lie so many bytes, a multiple of `aligned`, from
            `pages`; None: all are requests of one layer.
        aligned: 4, 8 or 16.

    Raises:
        ValueError: shapes, dtypes or strides do not fit.
    """
    constants = _paged.page_constants(pages, layout)
    _common.check_sketch(sketch, layout)
    windows, window_stride, window_table_stride, window_block = _paged.window_view(
        window_cache, window_table, window_dtype, layout
    )
    heads, requests = pages.shape[1], seq_lens.shape[0]
    dense = [keys] if values is None else [keys, values]
    for x in dense:
        if x.dtype != torch.float16 or x.shape[1:] != (heads, layout.head_dim) or not x.is_contiguous():
            raise ValueError(
                f"keys and values must be contiguous float16 [capacity, {heads}, {layout.head_dim}], got {x.dtype} "
                f"{list(x.shape)} with strides {x.stride()}"
            )
    if tile_tokens % layout.page_tokens or first_token % layout.page_tokens:
        raise ValueError(f"tiles are whole pages of {layout.page_tokens} tokens, got {first_token} + {tile_tokens}")
    if block_table.stride(1) != 1 or (window_table is not None and window_table.stride(1) != 1):
        raise ValueError("rows of block_table and window_table must be contiguous")
    capacity = min(x.shape[0] for x in dense)
    if requests == 0 or tile_tokens == 0 or capacity == 0:
        return
    block_t = 32
    # Programs of the heads of a token are neighbours, and so are the rows they write.
    _gather_kernel[(heads, tile_tokens // block_t, requests)](
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
        cu_history,
        keys,
        values,
        sketch,
        layer_offsets,
        capacity,
        first_token,
        sink_tokens,
        recent_tokens,
        TWO_BIT=layout.is_two_bit,
        WINDOW_BLOCK=window_block,
        BLOCK_T=block_t,
        ALIGNED=aligned,
        num_warps=4 if layout.head_dim <= 128 else 8,
        **constants,
    )


@triton.jit(do_not_specialize=["table_stride", "capacity", "first_position", "sink_tokens", "recent_tokens"])
def _gather_kernel(
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
    cu_history_ptr,
    keys_ptr,
    values_ptr,
    sketch_ptr,
    layer_offsets_ptr,
    capacity,
    first_position,
    sink_tokens,
    recent_tokens,
    NUM_KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    HEAD_BYTES: tl.constexpr,
    TWO_BIT: tl.constexpr,
    K_AFFINE: tl.constexpr,
    V_AFFINE: tl.constexpr,
    K_PARTS: tl.constexpr,
    V_PARTS: tl.constexpr,
    SIGNS: tl.constexpr,
    SIGN_NORMS: tl.constexpr,
    K_MEAN: tl.constexpr,
    WINDOW_BLOCK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Grid: KV heads x tiles of BLOCK_T tokens x requests.

    Args:
        window_ptr, K_MEAN: None without windows, without page means. sketch_ptr, SIGNS, SIGN_NORMS: without signs.
        values_ptr: None where keys are all that is wanted. layer_offsets_ptr: None in one layer.
        K_PARTS, V_PARTS: of `_paged.row_parts`.
    """
    kv_head = tl.program_id(0)
    in_tile = tl.program_id(1) * BLOCK_T
    request = tl.program_id(2)
    _, _, history = request_lengths(query_start_loc_ptr, seq_lens_ptr, request)
    begin = first_position + in_tile
    if begin >= history:
        return
    if layer_offsets_ptr is not None:
        pages_ptr = layer_pages(pages_ptr, layer_offsets_ptr, request, ALIGNED)
    lanes = tl.arange(0, BLOCK_T)
    positions = begin + lanes
    in_history = positions < history
    page = tl.load(table_ptr + request.to(tl.int64) * table_stride + begin // PAGE_TOKENS)
    exists = page != 0
    head_ptr = pages_ptr + page.to(tl.int64) * page_stride + kv_head * HEAD_BYTES
    in_page = begin % PAGE_TOKENS + lanes
    read = exists & in_history
    row = tl.load(cu_history_ptr + request) + in_tile + lanes
    offsets = (row.to(tl.int64) * NUM_KV_HEADS + kv_head) * D
    is_written = in_history & (row < capacity)
    touches_window = (begin < sink_tokens) | (begin + BLOCK_T > history - recent_tokens)
    window_row = table_ptr
    if window_ptr is not None:
        window_row = window_table_ptr + request.to(tl.int64) * window_table_stride
    if TWO_BIT:  # whole rows at once, tuned and measured; the others go by parts and chunks of them
        # Masked, all is zero, and so is what they make of it.
        k_scale, k_zero = load_scales(head_ptr, K_PARTS[0][SCALES], in_page, read)
        if values_ptr is not None:
            v_scale, v_zero = load_scales(head_ptr, V_PARTS[0][SCALES], in_page, read)
        quads = tl.arange(0, BLOCK_D // 4)
        codes = in_page[:, None] * (D // 4) + quads[None, :]
        code_mask = exists & (quads < D // 4)[None, :]
        k = _dequantise(tl.load(head_ptr + K_PARTS[0][CODES] + codes, mask=code_mask, other=0), k_scale, k_zero)
        if values_ptr is not None:
            v = _dequantise(tl.load(head_ptr + V_PARTS[0][CODES] + codes, mask=code_mask, other=0), v_scale, v_zero)
        channels = tl.arange(0, BLOCK_D)
        in_channels = channels < D
        if K_MEAN is not None:
            mean_ptr = (head_ptr + K_MEAN).to(tl.pointer_type(tl.float16), bitcast=True)
            mean = tl.load(mean_ptr + channels, mask=exists & in_channels, other=0.0)
            k += mean.to(tl.float32)[None, :]
        k = cast(k, tl.float16)
        if values_ptr is not None:
            v = cast(v, tl.float16)
        if window_ptr is not None and touches_window:
            windowed = is_windowed(positions, history, sink_tokens, recent_tokens)
            block = tl.load(window_row + positions // WINDOW_BLOCK, mask=windowed, other=0)
            kv = window_rows(window_ptr, window_stride, block, positions, kv_head, WINDOW_BLOCK, D)
            kv = kv[:, None] + channels[None, :]
            has_block = (block != 0)[:, None]
            kv_mask = has_block & in_channels[None, :]
            k = tl.where(has_block, cast(tl.load(kv, mask=kv_mask, other=0.0), tl.float16), k)
            if values_ptr is not None:
                v = tl.where(has_block, cast(tl.load(kv + D, mask=kv_mask, other=0.0), tl.float16), v)
        mask = _both(is_written, in_channels)
        tl.store(keys_ptr + offsets[:, None] + channels[None, :], k, mask=mask)
        if values_ptr is not None:
            tl.store(values_ptr + offsets[:, None] + channels[None, :], v, mask=mask)
    else:
        exact_rows = None
        has_block = None
        if window_ptr is not None:
            windowed = is_windowed(positions, history, sink_tokens, recent_tokens)
            block = tl.load(window_row + positions // WINDOW_BLOCK, mask=windowed, other=0)
            has_block = block != 0
            exact_rows = window_rows(window_ptr, window_stride, block, positions, kv_head, WINDOW_BLOCK, D)
        signs = None
        sign_norms = None
        if SIGNS is not None:
            SIGN_COLUMNS: tl.constexpr = BLOCK_D // 8 if BLOCK_D > 64 else 16
            sign_rows = head_ptr + SIGNS + in_page * (D // 8)
            signs = load_words(sign_rows, exists, 1, D, BLOCK_D // SIGN_COLUMNS, SIGN_COLUMNS)
            sign_norms = load_halves(head_ptr, SIGN_NORMS, in_page, read)
        mean_ptr = None
        if K_MEAN is not None:
            mean_ptr = (head_ptr + K_MEAN).to(tl.pointer_type(tl.float16), bitcast=True)
        for p in tl.static_range(len(K_PARTS)):
            words = load_part(head_ptr, in_page, exists, K_PARTS, p)
            scale, middle = load_part_scales(head_ptr, in_page, read, K_AFFINE, K_PARTS, p)
            for c in tl.static_range(len(words)):
                k = _values(words[c], scale, middle, K_PARTS, p, c)
                channels, in_chunk = _chunk_channels(K_PARTS, p, c)
                if K_MEAN is not None:
                    mean = tl.load(mean_ptr + channels, mask=exists & in_chunk, other=0.0)
                    k += mean.to(tl.float32)[None, :]
                if SIGNS is not None:
                    k += _residuals(signs, sign_norms, sketch_ptr, channels, in_chunk, D, BLOCK_D)
                k = cast(k, tl.float16)
                if window_ptr is not None and touches_window:
                    exact = tl.load(exact_rows[:, None] + channels[None, :], mask=_both(has_block, in_chunk), other=0.0)
                    k = tl.where(has_block[:, None], cast(exact, tl.float16), k)
                tl.store(keys_ptr + offsets[:, None] + channels[None, :], k, mask=_both(is_written, in_chunk))
        if values_ptr is not None:
            for p in tl.static_range(len(V_PARTS)):
                words = load_part(head_ptr, in_page, exists, V_PARTS, p)
                scale, middle = load_part_scales(head_ptr, in_page, read, V_AFFINE, V_PARTS, p)
                for c in tl.static_range(len(words)):
                    v = cast(_values(words[c], scale, middle, V_PARTS, p, c), tl.float16)
                    channels, in_chunk = _chunk_channels(V_PARTS, p, c)
                    if window_ptr is not None and touches_window:
                        exact = tl.load(
                            exact_rows[:, None] + D + channels[None, :], mask=_both(has_block, in_chunk), other=0.0
                        )
                        v = tl.where(has_block[:, None], cast(exact, tl.float16), v)
                    tl.store(values_ptr + offsets[:, None] + channels[None, :], v, mask=_both(is_written, in_chunk))


@triton.jit
def _dequantise(packed, scale, zero):
    """[N, C] bytes of 2-bit codes, [N] scale and zero -> [N, 4 * C] float32."""
    c0 = (packed & 3).to(tl.float32)
    c1 = ((packed >> 2) & 3).to(tl.float32)
    c2 = ((packed >> 4) & 3).to(tl.float32)
    c3 = (packed >> 6).to(tl.float32)
    return interleave_four(c0, c1, c2, c3) * scale[:, None] + zero[:, None]


@triton.jit
def _both(tokens, channels):
    return tokens[:, None] & channels[None, :]


@triton.jit
def _chunk_channels(PARTS: tl.constexpr, P: tl.constexpr, C: tl.constexpr):
    """Channels of a chunk in the row, padding included, and which of them it has."""
    FIRST: tl.constexpr = PARTS[P][CHANNEL + CHUNK_ENTRIES * C]
    COUNT: tl.constexpr = PARTS[P][CHANNELS + CHUNK_ENTRIES * C]
    WIDE: tl.constexpr = PARTS[P][POSITIONS + CHUNK_ENTRIES * C] * PARTS[P][COLUMNS + CHUNK_ENTRIES * C]
    lanes = tl.arange(0, WIDE)
    return FIRST + lanes, lanes < COUNT


@triton.jit
def _values(words, scale, middle, PARTS: tl.constexpr, P: tl.constexpr, C: tl.constexpr):
    """[N, width] float32 of a chunk, 0 where nothing is read, for there scale and middle are. words: of `load_part`."""
    WIDTH: tl.constexpr = PARTS[P][BITS]
    FACTOR: tl.constexpr = PARTS[P][UNIT]
    CURVE: tl.constexpr = PARTS[P][BEND]
    COUNT: tl.constexpr = PARTS[P][POSITIONS + CHUNK_ENTRIES * C]
    levels = ()
    for i in tl.static_range(COUNT):
        levels += (levels_at(words, i, WIDTH, CURVE),)
    return interleave(levels).to(tl.float32) * (scale * FACTOR)[:, None] + middle[:, None]


@triton.jit
def _residuals(signs, norms, sketch_ptr, channels, in_chunk, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """[N, width] float32 vectors that stand for the keys' residuals (`quantizers.qjl.dequantize`), at some channels.

    Args:
        signs: [N, columns] uint16 words, norms: [N] float32. sketch_ptr: S [D, D] fp16.
    """
    COUNT: tl.constexpr = BLOCK_D // signs.shape[1]
    columns = tl.arange(0, signs.shape[1])
    mask = (columns < D // COUNT)[:, None] & in_chunk[None, :]
    found = tl.zeros([signs.shape[0], channels.shape[0]], tl.float32)
    for i in tl.static_range(COUNT):
        rows = sketch_ptr + (columns * COUNT + i) * D
        sketch = tl.load(rows[:, None] + channels[None, :], mask=mask, other=0.0)
        found = tl.dot(levels_at((signs,), i, 1, 0.0), sketch, found)
    return found * (norms * (SIGN_UNIT / D))[:, None]
