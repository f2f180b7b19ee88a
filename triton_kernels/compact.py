# SPDX-License-Identifier: Apache-2.0
"""Eviction in place: gather the survivors' bytes of a request's slots in one layer, write them to the kept pages.

The torch reference is `kernels.compaction`. Survivors are gathered into scratch pages first, as many as the budget has:
kept pages are among those they are gathered from. Nothing here waits for the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_kvcompress.formats.base import PageLayout, RowLayout, page_fields
from vllm_kvcompress.triton_kernels import _common, _paged
from vllm_kvcompress.triton_kernels.score import dequantise_keys
from vllm_kvcompress.triton_kernels.store import store


def compact(
    pages: torch.Tensor,
    layout: PageLayout,
    table: torch.Tensor,
    num_sources: int,
    targets: torch.Tensor,
    scores: torch.Tensor,
    protected: torch.Tensor,
    is_first: bool,
    clip_k: torch.Tensor,
    *,
    sketch: torch.Tensor | None = None,
) -> torch.Tensor:
    """`kernels.compaction.compact`, whose arguments and result these are, but for scores that are not finite.

    A NaN counts as the lowest score: to tell the host of it would mean to wait for the device, and an assertion there
    ends the engine for every request. What makes it has made NaN of a model's output before, for this request alone.

    Args:
        clip_k: [H] float32, contiguous.
        protected: no more than the budget, itself no more than the sources.
        sketch: S of `quantizers.qjl`, contiguous float16 [D, D], if the keys have signs; else None.

    Raises:
        ValueError: shapes, dtypes or strides do not fit.
    """
    _paged.page_constants(pages, layout)
    _common.check_sketch(sketch, layout)
    kept = select(scores[:, : len(protected)], len(targets) * layout.page_tokens, protected)
    # Page 0 stays empty: to the store kernel it is the null page.
    staged = pages.new_zeros(len(targets) + 1, *pages.shape[1:])
    _gather_rows(pages, layout, table, kept, staged, None)
    fields = page_fields(staged, layout)
    if fields.k_mean is not None:
        all_means = page_fields(pages, layout).k_mean
        assert all_means is not None
        means = all_means[table[:num_sources]]
        common, own = means[0], means.transpose(0, 1)
        keys = _survivors(staged, layout, own, kept, sketch)
        if is_first:
            limit = torch.finfo(torch.float16).max
            common = keys.mean(0).clamp(-limit, limit).half()
        fields.k_mean[1:] = common
        _requantise(staged, layout, keys, clip_k, sketch)
        same = (own == common.unsqueeze(1)).all(-1)  # [H, num_sources]
        unchanged = same.gather(1, kept // layout.page_tokens)
        _gather_rows(pages, layout, table, kept, staged, unchanged)
    pages[targets] = staged[1:]
    return kept


def select(scores: torch.Tensor, budget: int, protected: torch.Tensor) -> torch.Tensor:
    """`policies.select` without its checks, which wait for the device: a NaN counts as the lowest score.

    Args:
        scores: [H, T] float32. protected: [T] bool, no more than `budget`, itself at most T.

    Returns:
        [H, budget] int64, ascending in every head; of equal scores the later slots.
    """
    limit = torch.finfo(scores.dtype).max
    ranked = scores.nan_to_num(nan=-torch.inf, posinf=limit, neginf=-limit).masked_fill(protected, torch.inf)
    from_the_end = ranked.flip(-1).sort(dim=-1, descending=True, stable=True).indices[:, :budget]
    return (scores.shape[1] - 1 - from_the_end).sort(dim=-1).values


def _survivors(
    staged: torch.Tensor, layout: PageLayout, means: torch.Tensor, kept: torch.Tensor, sketch: torch.Tensor | None
) -> torch.Tensor:
    """Keys [M, H, D] float32 of rows gathered to pages 1.. of `staged`, whose means are zero.

    Args:
        means: [H, num_sources, D] float16 of the pages that slots `kept` [H, M] come from.
    """
    heads, count = kept.shape
    keys = torch.empty(count, heads, layout.head_dim, device=staged.device)
    dequantise_keys(staged, layout, torch.arange(1, len(staged), device=staged.device), count, 0, keys, sketch)
    page = (kept // layout.page_tokens).unsqueeze(-1).expand(-1, -1, layout.head_dim)
    return keys.add_(means.gather(1, page).transpose(0, 1))


def _requantise(
    staged: torch.Tensor, layout: PageLayout, keys: torch.Tensor, clip_k: torch.Tensor, sketch: torch.Tensor | None
) -> None:
    """Write keys [M, H, D] float32 to pages 1.. around the means that are there.

    The rows' values are overwritten too: the caller has yet to put them there.
    """
    count = len(keys)
    nothing = torch.zeros(0, dtype=torch.int32, device=keys.device)  # no request begins a page: means stay
    store(
        staged,
        layout,
        keys,
        keys,
        torch.arange(layout.page_tokens, layout.page_tokens + count, device=keys.device),
        nothing,
        nothing,
        nothing,
        k_rotation=None,
        v_rotation=None,
        k_mean=None,
        clip_k=clip_k,
        clip_v=clip_k,
        window_cache=None,
        window_slots=None,
        window_dtype=torch.float16,
        new_kv=None,
        max_query_len=1,
        sketch=sketch,
    )


def _gather_rows(
    pages: torch.Tensor,
    layout: PageLayout,
    table: torch.Tensor,
    kept: torch.Tensor,
    staged: torch.Tensor,
    with_keys: torch.Tensor | None,
) -> None:
    """Bytes of slots `kept` [H, M] of pages `table` to pages 1.. of `staged`, in that order.

    Args:
        with_keys: [H, M] bool: of others the values alone. None: of all both.
    """
    heads, count = kept.shape
    block = 32
    _rows_kernel[(heads, count // block)](
        pages,
        pages.stride(0),
        table,
        kept,
        with_keys,
        staged,
        staged.stride(0),
        count,
        KEYS=_regions(layout.keys, layout),
        VALUES=_regions(layout.values, layout),
        PAGE_TOKENS=layout.page_tokens,
        HEAD_BYTES=layout.head_bytes,
        BLOCK=block,
        num_warps=4,
    )


def _regions(rows: RowLayout, layout: PageLayout) -> tuple[tuple[int, int], ...]:
    """(offset in a head's share of a page, bytes of a token) of all that is stored of keys or of values."""
    scale_bytes = 4 if rows.quantizer == "affine" else 2
    found = [(part.codes, part.code_bytes) for part in rows.parts]
    found += [(part.scales, scale_bytes) for part in rows.parts]
    if rows.signs is not None and rows.sign_norms is not None:
        found += [(rows.signs, layout.head_dim // 8), (rows.sign_norms, 2)]
    return tuple(found)


@triton.jit(do_not_specialize=["num_rows"])
def _rows_kernel(
    pages_ptr,
    page_stride,
    table_ptr,
    kept_ptr,
    with_keys_ptr,
    staged_ptr,
    staged_stride,
    num_rows,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    HEAD_BYTES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: KV heads x tiles of BLOCK rows, a divisor of the page."""
    head = tl.program_id(0)
    rows = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    slots = tl.load(kept_ptr + head * num_rows + rows)
    page = tl.load(table_ptr + slots // PAGE_TOKENS)
    source = pages_ptr + page * page_stride + head * HEAD_BYTES
    target = staged_ptr + (1 + rows // PAGE_TOKENS).to(tl.int64) * staged_stride + head * HEAD_BYTES
    before = slots % PAGE_TOKENS
    after = rows % PAGE_TOKENS
    for r in tl.static_range(len(VALUES)):
        _copy(source, before, target, after, None, VALUES[r][0], VALUES[r][1])
    wanted = None
    if with_keys_ptr is not None:
        wanted = tl.load(with_keys_ptr + head * num_rows + rows)
    for r in tl.static_range(len(KEYS)):
        _copy(source, before, target, after, wanted, KEYS[r][0], KEYS[r][1])


@triton.jit
def _copy(source, before, target, after, wanted, OFFSET: tl.constexpr, WIDTH: tl.constexpr):
    """WIDTH bytes of each row of a region, which begins OFFSET bytes from `source` and `target` [N]."""
    WIDE: tl.constexpr = triton.next_power_of_2(WIDTH)
    places = tl.arange(0, WIDE)[None, :]
    mask = places < WIDTH
    if wanted is not None:
        mask = mask & (wanted != 0)[:, None]
    data = tl.load((source + OFFSET + before * WIDTH)[:, None] + places, mask=mask, other=0)
    tl.store((target + OFFSET + after * WIDTH)[:, None] + places, data, mask=mask)
