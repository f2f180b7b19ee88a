# SPDX-License-Identifier: Apache-2.0
"""Eviction in place: gather the survivors of a request's slots in several layers, write them to the kept pages.

The torch reference is `kernels.compaction`. Survivors are gathered into scratch pages first, as many as the budget has:
kept pages are among those they are gathered from. All layers of a group go in the same launches, for a launch takes
the host longer than a layer's work the device. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from vllm_kvcompress.formats.base import PageLayout, RowLayout
from vllm_kvcompress.kernels.transfer import to_device
from vllm_kvcompress.triton_kernels import _common, _paged
from vllm_kvcompress.triton_kernels._paged import layer_pages
from vllm_kvcompress.triton_kernels._rows import read_back_rows, rows_constants, write_rows

_SCRATCH_BYTES = 64 << 20
"""Of scratch pages at a time: layers take turns where all together need more."""
_BLOCK = 32
"""Rows of a program, a divisor of the page."""


def compact(
    pages: Sequence[torch.Tensor],
    layout: PageLayout,
    table: torch.Tensor,
    targets: torch.Tensor,
    kept: torch.Tensor,
    is_first: bool,
    clip_k: torch.Tensor,
    *,
    sketch: torch.Tensor | None = None,
) -> None:
    """`kernels.compaction.compact` of several layers, in which the same pages are the request's.

    Args:
        pages: of every layer [num_pages, H, head_bytes] uint8, all with the same strides, at addresses that differ by
            multiples of 4.
        kept: [L, H, M] int64, contiguous; clip_k: [L, H] float32, contiguous.
        sketch: S of `quantizers.qjl`, contiguous float16 [D, D], if the keys have signs; else None.

    Raises:
        ValueError: shapes, dtypes or strides do not fit.
    """
    first = pages[0]
    heads, head_bytes = first.shape[1:]
    _paged.page_constants(first, layout)
    distances, aligned = _paged.layer_distances(pages)
    _common.check_sketch(sketch, layout)
    layers, count = len(pages), len(targets) * layout.page_tokens
    if kept.shape != (layers, heads, count) or not kept.is_contiguous():
        raise ValueError(f"kept slots {list(kept.shape)} are not {[layers, heads, count]}, contiguous")
    if clip_k.shape != (layers, heads) or not clip_k.is_contiguous():
        raise ValueError(f"shares of the range {list(clip_k.shape)} are not {[layers, heads]}, contiguous")
    at_once = max(1, _SCRATCH_BYTES // (len(targets) * heads * head_bytes))
    for begin in range(0, layers, at_once):
        part = slice(begin, begin + at_once)
        offsets = to_device(distances[part], torch.int64, first.device)
        _compact_some(first, offsets, aligned, layout, table, targets, kept[part], is_first, clip_k[part], sketch)


def _compact_some(
    pages: torch.Tensor,
    offsets: torch.Tensor,
    aligned: int,
    layout: PageLayout,
    table: torch.Tensor,
    targets: torch.Tensor,
    kept: torch.Tensor,
    is_first: bool,
    clip_k: torch.Tensor,
    sketch: torch.Tensor | None,
) -> None:
    """Layers whose pages lie `offsets` [L] int64 bytes, multiples of `aligned`, from `pages`."""
    layers, heads, count = kept.shape
    head_bytes = layout.head_bytes
    where = (pages, offsets, pages.stride(0), table, kept)
    shape = {
        "D": layout.head_dim,
        "BLOCK_D": triton.next_power_of_2(layout.head_dim),
        "PAGE_TOKENS": layout.page_tokens,
        "HEAD_BYTES": head_bytes,
        "K_ROWS": rows_constants(layout.keys),
        "K_MEAN": layout.k_mean,
        "BLOCK": _BLOCK,
        "ALIGNED": aligned,
    }
    common = None
    if layout.k_mean is not None and is_first:
        sums = torch.empty(layers, len(targets), heads, layout.head_dim, device=pages.device)
        _sum_kernel[(heads, len(targets), layers)](*where, sums, sketch, **shape, num_warps=4)
        limit = torch.finfo(torch.float16).max
        common = (sums.sum(1) / count).clamp_(-limit, limit).half()
    staged = torch.empty(layers, len(targets), heads, head_bytes, dtype=torch.uint8, device=pages.device)
    _compact_kernel[(heads, count // _BLOCK, layers)](
        *where,
        common,
        clip_k,
        sketch,
        staged,
        count,
        KEYS=_regions(layout.keys, layout),
        VALUES=_regions(layout.values, layout),
        **shape,
        num_warps=4,
    )
    block = 1024
    words = heads * head_bytes // 4
    _place_kernel[(triton.cdiv(words, block), len(targets), layers)](
        staged, pages, offsets, pages.stride(0), targets, words, ALIGNED=aligned, BLOCK=block, num_warps=4
    )


def _regions(rows: RowLayout, layout: PageLayout) -> tuple[tuple[int, int], ...]:
    """(offset in a head's share of a page, bytes of a token) of all that is stored of keys or of values."""
    scale_bytes = 4 if rows.quantizer == "affine" else 2
    found = [(part.codes, part.code_bytes) for part in rows.parts]
    found += [(part.scales, scale_bytes) for part in rows.parts]
    if rows.signs is not None and rows.sign_norms is not None:
        found += [(rows.signs, layout.head_dim // 8), (rows.sign_norms, 2)]
    return tuple(found)


@triton.jit
def _survivors(
    pages_ptr, page_stride, table_ptr, kept_ptr, head, rows, PAGE_TOKENS: tl.constexpr, HEAD_BYTES: tl.constexpr
):
    """Where rows of a head come from: pointers [N] to its share of their pages, their places [N] there."""
    slots = tl.load(kept_ptr + rows)
    page = tl.load(table_ptr + slots // PAGE_TOKENS)
    return pages_ptr + page * page_stride + head * HEAD_BYTES, slots % PAGE_TOKENS


@triton.jit
def _means(page_rows, K_MEAN: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """[N, BLOCK_D] fp16, the means of pages that rows are of."""
    lanes = tl.arange(0, BLOCK_D)
    mean_rows = (page_rows + K_MEAN).to(tl.pointer_type(tl.float16))
    return tl.load(mean_rows[:, None] + lanes[None, :], mask=(lanes < D)[None, :], other=0.0)


@triton.jit
def _sum_kernel(
    pages_ptr,
    offsets_ptr,
    page_stride,
    table_ptr,
    kept_ptr,
    sums_ptr,
    sketch_ptr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    HEAD_BYTES: tl.constexpr,
    K_ROWS: tl.constexpr,
    K_MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Sums [L, pages, H, D] float32 of the keys that come to a page. Grid: KV heads x pages x layers."""
    head, page, layer = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads, count = tl.num_programs(0), tl.num_programs(1)
    pages_ptr = layer_pages(pages_ptr, offsets_ptr, layer, ALIGNED)
    kept_ptr += (layer * heads + head) * count * PAGE_TOKENS
    sums = tl.zeros([BLOCK, BLOCK_D], dtype=tl.float32)
    for begin in range(0, PAGE_TOKENS, BLOCK):
        rows = page * PAGE_TOKENS + begin + tl.arange(0, BLOCK)
        source, before = _survivors(pages_ptr, page_stride, table_ptr, kept_ptr, head, rows, PAGE_TOKENS, HEAD_BYTES)
        sums += _means(source, K_MEAN, D, BLOCK_D).to(tl.float32)
        sums += read_back_rows(source, before, before >= 0, sketch_ptr, D, K_ROWS, BLOCK, BLOCK_D)
    lanes = tl.arange(0, BLOCK_D)
    out = sums_ptr + ((layer * count + page) * heads + head) * D
    tl.store(out + lanes, tl.sum(sums, axis=0), mask=lanes < D)


@triton.jit(do_not_specialize=["num_rows"])
def _compact_kernel(
    pages_ptr,
    offsets_ptr,
    page_stride,
    table_ptr,
    kept_ptr,
    common_ptr,
    clip_ptr,
    sketch_ptr,
    staged_ptr,
    num_rows,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    HEAD_BYTES: tl.constexpr,
    K_ROWS: tl.constexpr,
    K_MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Survivors to pages [L, pages, H, head_bytes] of `staged`. Grid: KV heads x tiles of BLOCK rows x layers.

    Args:
        common_ptr: [L, H, D] fp16, the mean that keys get; None: that of the request's first page.
    """
    head, layer = tl.program_id(0), tl.program_id(2)
    heads = tl.num_programs(0)
    number = layer * heads + head
    first = tl.program_id(1) * BLOCK
    rows = first + tl.arange(0, BLOCK)
    pages_ptr = layer_pages(pages_ptr, offsets_ptr, layer, ALIGNED)
    kept_ptr += number * num_rows
    source, before = _survivors(pages_ptr, page_stride, table_ptr, kept_ptr, head, rows, PAGE_TOKENS, HEAD_BYTES)
    page = layer * (num_rows // PAGE_TOKENS) + first // PAGE_TOKENS
    target = staged_ptr + (page.to(tl.int64) * heads + head) * HEAD_BYTES
    after = rows % PAGE_TOKENS
    for r in tl.static_range(len(VALUES)):
        _copy(source, before, target, after, None, VALUES[r][0], VALUES[r][1])
    wanted = None
    if K_MEAN is not None:
        lanes = tl.arange(0, BLOCK_D)
        if common_ptr is not None:
            mean_ptr = common_ptr + number * D
        else:
            shared = pages_ptr + tl.load(table_ptr) * page_stride + head * HEAD_BYTES
            mean_ptr = (shared + K_MEAN).to(tl.pointer_type(tl.float16))
        common = tl.load(mean_ptr + lanes, mask=lanes < D, other=0.0)
        if first % PAGE_TOKENS == 0:
            tl.store((target + K_MEAN).to(tl.pointer_type(tl.float16)) + lanes, common, mask=lanes < D)
        own = _means(source, K_MEAN, D, BLOCK_D)
        wanted = tl.min((own == common[None, :]).to(tl.int32), axis=1)
        if tl.min(wanted, axis=0) == 0:
            # Once a row's own mean is another, its codes say something else: quantised again.
            keys = read_back_rows(source, before, wanted == 0, sketch_ptr, D, K_ROWS, BLOCK, BLOCK_D)
            keys += own.to(tl.float32) - common.to(tl.float32)[None, :]
            clip = tl.load(clip_ptr + number)
            # Pointers as many as rows, as `write_rows` takes them.
            write_rows(keys, target + before * 0, after, wanted == 0, clip, sketch_ptr, D, K_ROWS, BLOCK, BLOCK_D)
    for r in tl.static_range(len(KEYS)):
        _copy(source, before, target, after, wanted, KEYS[r][0], KEYS[r][1])


@triton.jit
def _copy(source, before, target, after, wanted, OFFSET: tl.constexpr, WIDTH: tl.constexpr):
    """WIDTH bytes of each row of a region, which begins OFFSET bytes from `source` and `target`; where `wanted` [N]."""
    WIDE: tl.constexpr = triton.next_power_of_2(WIDTH)
    places = tl.arange(0, WIDE)[None, :]
    mask = places < WIDTH
    if wanted is not None:
        mask = mask & (wanted != 0)[:, None]
    data = tl.load((source + OFFSET + before * WIDTH)[:, None] + places, mask=mask, other=0)
    tl.store((target + OFFSET + after * WIDTH)[:, None] + places, data, mask=mask)


@triton.jit(do_not_specialize=["num_words"])
def _place_kernel(
    staged_ptr, pages_ptr, offsets_ptr, page_stride, targets_ptr, num_words, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):
    """Scratch pages [L, pages, words of 4 bytes] to pages `targets` of every layer. Grid: blocks x pages x layers."""
    words = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    page, layer = tl.program_id(1), tl.program_id(2)
    number = layer * tl.num_programs(1) + page
    source = staged_ptr.to(tl.pointer_type(tl.int32)) + number.to(tl.int64) * num_words
    target = layer_pages(pages_ptr, offsets_ptr, layer, ALIGNED) + tl.load(targets_ptr + page) * page_stride
    mask = words < num_words
    tl.store(target.to(tl.pointer_type(tl.int32)) + words, tl.load(source + words, mask=mask, other=0), mask=mask)
