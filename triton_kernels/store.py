# SPDX-License-Identifier: Apache-2.0
"""A step's keys and values into cache space, the pages, the 16-bit windows and the buffer of new tokens.

Two launches: the mean keys of pages begun in the step (formats that centre by page), then everything else. The torch
reference is `kernels.torch_attention.store`; what rows come to is in `_rows`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_kvcompress.attention.plan import MIN_TOKENS_FOR_OWN_MEAN
from vllm_kvcompress.formats.base import PageLayout
from vllm_kvcompress.triton_kernels import _common
from vllm_kvcompress.triton_kernels._common import cast, rotated_rows
from vllm_kvcompress.triton_kernels._means import means_kernel
from vllm_kvcompress.triton_kernels._rows import rows_constants, write_rows


def store(
    pages: torch.Tensor,
    layout: PageLayout,
    key: torch.Tensor,
    value: torch.Tensor,
    slot_mapping: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    block_table: torch.Tensor,
    *,
    k_rotation: torch.Tensor | None,
    v_rotation: torch.Tensor | None,
    k_mean: torch.Tensor | None,
    clip_k: torch.Tensor,
    clip_v: torch.Tensor,
    window_cache: torch.Tensor | None,
    window_slots: torch.Tensor | None,
    window_dtype: torch.dtype,
    new_kv: torch.Tensor | None,
    max_query_len: int,
    sketch: torch.Tensor | None = None,
) -> None:
    """Rotate, quantise and write a step's tokens. Never waits for the device.

    Keys are (key - k_mean) @ k_rotation, values value @ v_rotation; with a rotation, in fp16 operands and float32 sums.
    A slot below the first page (block) of its cache is not written: -1, or inside the null page 0.

    Args:
        pages: [num_pages, H, head_bytes] uint8; any stride of pages, each page contiguous.
        key, value: [T, H, D] float16, bfloat16 or float32; the last dimension is contiguous.
        slot_mapping: [T] int64, page * page_tokens + offset, below 2^31; offset = position % page_tokens.
        query_start_loc: [R + 1] int32; rows from query_start_loc[R] on are padding.
        seq_lens: [R] int32: history plus the step's tokens. block_table: [R, max_pages] int32, 0 = null page.
        k_rotation, v_rotation: [H, D, D] float16, contiguous, or None for the identity.
        k_mean: [H, D] float32 static mean key, contiguous, or None.
        clip_k, clip_v: [H] float32 shares of the range (quantizers/affine.py); Lloyd-Max codes have none.
        window_cache: [num_blocks, H, block, 4 * D] uint8, each block contiguous, or None; window_slots: [T] int64. Rows
            are K then V in `window_dtype`, bfloat16 or float16 (then saturated), keys not centred on the page.
        new_kv: [N, H, 2 * D] `window_dtype`, contiguous, or None: rows below N get the same K then V.
        max_query_len: most new tokens of a request, or more.
        sketch: S [D, D] float16, contiguous, of layouts whose keys have signs (quantizers/qjl.py), else None.

    Raises:
        ValueError: shapes, dtypes or strides do not fit, or a sketch is missing or of no use.
    """
    tokens, heads, head_dim = key.shape
    _check(pages, layout, key, value, slot_mapping, window_cache, window_slots, window_dtype, new_kv)
    _common.check_sketch(sketch, layout)
    _common.check_rotation(k_rotation, heads, head_dim)
    _common.check_rotation(v_rotation, heads, head_dim)
    requests = seq_lens.shape[0]
    if tokens == 0:
        return
    shape = {
        "D": head_dim,
        "PAGE_TOKENS": layout.page_tokens,
        "HEAD_BYTES": layout.head_bytes,
        "K_ROWS": rows_constants(layout.keys),
        "K_MEAN": layout.k_mean,
        "BLOCK_D": triton.next_power_of_2(head_dim),
    }
    if layout.k_mean is not None and requests:
        # A request of n tokens begins at most cdiv(n, page) pages.
        search = max_query_len > layout.page_tokens
        means_kernel[(tokens // layout.page_tokens + requests if search else requests, heads)](
            pages,
            pages.stride(0),
            key,
            key.stride(0),
            key.stride(1),
            slot_mapping,
            query_start_loc,
            seq_lens,
            block_table,
            block_table.stride(0),
            k_rotation,
            k_mean,
            sketch,
            requests,
            SEARCH=search,
            MIN_OWN=min(MIN_TOKENS_FOR_OWN_MEAN, layout.page_tokens),
            BLOCK_R=256,
            BLOCK_T=32,
            BLOCK_N=64 if head_dim <= 128 else 32,
            **shape,
            num_warps=4,
        )
    block_m, warps, registers = _tile(tokens, layout)
    window = None if window_cache is None else window_cache.view(window_dtype)
    _store_kernel[(heads, triton.cdiv(tokens, block_m), 2)](
        pages,
        pages.stride(0),
        key,
        key.stride(0),
        key.stride(1),
        value,
        value.stride(0),
        value.stride(1),
        slot_mapping,
        k_rotation,
        v_rotation,
        k_mean,
        clip_k,
        clip_v,
        sketch,
        window,
        0 if window is None else window.stride(0),
        window_slots,
        new_kv,
        tokens,
        0 if new_kv is None else min(tokens, new_kv.shape[0]),
        V_ROWS=rows_constants(layout.values),
        WINDOW_BLOCK=1 if window_cache is None else window_cache.shape[2],
        BLOCK_M=block_m,
        **shape,
        num_warps=warps,
        maxnreg=registers,
    )


def _tile(tokens: int, layout: PageLayout) -> tuple[int, int, int]:
    """Tokens of a tile, warps of a program, bound on registers.

    Few tokens want many programs, many tokens want few reads of the rotation; the bound keeps 12 to 16 warps on a
    multiprocessor at the price of a few spilled words. Codebooks and signs hold more beside a tile than fits in the
    bound of the largest.
    """
    head_dim = layout.head_dim
    if tokens <= 256:
        return 16, 4, 255
    if tokens <= 2048 or not layout.is_two_bit:
        return 64 if head_dim <= 128 else 32, 4, 168
    return 128 if head_dim <= 128 else 64, 8, 128


def _check(
    pages: torch.Tensor,
    layout: PageLayout,
    key: torch.Tensor,
    value: torch.Tensor,
    slot_mapping: torch.Tensor,
    window_cache: torch.Tensor | None,
    window_slots: torch.Tensor | None,
    window_dtype: torch.dtype,
    new_kv: torch.Tensor | None,
) -> None:
    tokens, heads, head_dim = key.shape
    if value.shape != key.shape or key.stride(2) != 1 or value.stride(2) != 1 or slot_mapping.shape != (tokens,):
        raise ValueError(
            f"keys {list(key.shape)} (strides {key.stride()}), values {list(value.shape)} (strides {value.stride()}) "
            f"and slots {list(slot_mapping.shape)} do not fit"
        )
    if head_dim != layout.head_dim or pages.shape[1:] != (heads, layout.head_bytes):
        raise ValueError(f"pages {list(pages.shape)} do not hold {heads} heads of {layout}")
    if pages.stride()[1:] != (layout.head_bytes, 1):
        raise ValueError(f"each page must be contiguous, got strides {pages.stride()}")
    if window_dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"windows are bfloat16 or float16, got {window_dtype}")
    if window_cache is not None:
        block = window_cache.shape[2]
        strides = (block * 4 * head_dim, 4 * head_dim, 1)
        if window_cache.shape[1:] != (heads, block, 4 * head_dim) or window_cache.stride()[1:] != strides:
            raise ValueError(
                f"windows {list(window_cache.shape)} (strides {window_cache.stride()}) do not fit {layout}"
            )
        if window_slots is None or window_slots.shape != (tokens,):
            raise ValueError("a window cache needs one window slot a token")
    if new_kv is not None and (
        new_kv.shape[1:] != (heads, 2 * head_dim) or new_kv.dtype != window_dtype or not new_kv.is_contiguous()
    ):
        raise ValueError(f"new_kv is contiguous [N, {heads}, {2 * head_dim}] {window_dtype}, got {list(new_kv.shape)}")


@triton.jit(do_not_specialize=["num_tokens", "num_new"])
def _store_kernel(
    pages_ptr,
    page_stride,
    key_ptr,
    key_stride_token,
    key_stride_head,
    value_ptr,
    value_stride_token,
    value_stride_head,
    slot_ptr,
    k_rotation_ptr,
    v_rotation_ptr,
    k_mean_ptr,
    clip_k_ptr,
    clip_v_ptr,
    sketch_ptr,
    window_ptr,
    window_stride,
    window_slot_ptr,
    new_kv_ptr,
    num_tokens,
    num_new,
    D: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    HEAD_BYTES: tl.constexpr,
    K_ROWS: tl.constexpr,
    K_MEAN: tl.constexpr,
    V_ROWS: tl.constexpr,
    WINDOW_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid: KV heads x tiles of tokens x (keys, values). Heads come first: neighbours in memory are read together."""
    head = tl.program_id(0)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_step = rows < num_tokens
    slots = tl.load(slot_ptr + rows, mask=in_step, other=-1).to(tl.int32)
    wanted = ((slots >= PAGE_TOKENS) | (rows < num_new)).to(tl.int32)
    if window_ptr is not None:
        in_window = tl.load(window_slot_ptr + rows, mask=in_step, other=-1) >= WINDOW_BLOCK
        wanted = tl.where(in_window, 2, wanted)
    most = tl.max(wanted, axis=0)
    if most == 0:
        return
    any_in_window = most == 2
    if tl.program_id(2) == 0:
        _store_tile(
            pages_ptr,
            page_stride,
            key_ptr,
            key_stride_token,
            key_stride_head,
            k_mean_ptr,
            k_rotation_ptr,
            clip_k_ptr,
            sketch_ptr,
            window_ptr,
            window_stride,
            new_kv_ptr,
            num_new,
            head,
            rows,
            slots,
            wanted > 0,
            window_slot_ptr,
            any_in_window,
            0,
            D,
            PAGE_TOKENS,
            HEAD_BYTES,
            K_ROWS,
            K_MEAN,
            WINDOW_BLOCK,
            BLOCK_M,
            BLOCK_D,
        )
    else:
        _store_tile(
            pages_ptr,
            page_stride,
            value_ptr,
            value_stride_token,
            value_stride_head,
            None,
            v_rotation_ptr,
            clip_v_ptr,
            None,
            window_ptr,
            window_stride,
            new_kv_ptr,
            num_new,
            head,
            rows,
            slots,
            wanted > 0,
            window_slot_ptr,
            any_in_window,
            D,
            D,
            PAGE_TOKENS,
            HEAD_BYTES,
            V_ROWS,
            None,
            WINDOW_BLOCK,
            BLOCK_M,
            BLOCK_D,
        )


@triton.jit
def _store_tile(
    pages_ptr,
    page_stride,
    x_ptr,
    x_stride_token,
    x_stride_head,
    centre_ptr,
    rotation_ptr,
    clip_ptr,
    sketch_ptr,
    window_ptr,
    window_stride,
    new_kv_ptr,
    num_new,
    head,
    rows,
    slots,
    wanted,
    window_slot_ptr,
    any_in_window,
    ROW_OFFSET: tl.constexpr,
    D: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    HEAD_BYTES: tl.constexpr,
    ROWS: tl.constexpr,
    MEAN: tl.constexpr,
    WINDOW_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One tensor of BLOCK_M tokens of a head. ROW_OFFSET: where it lies in rows of windows and new_kv, in elements."""
    lanes = tl.arange(0, BLOCK_D)
    in_head = (lanes < D)[None, :]
    if centre_ptr is not None:
        centre_ptr += head * D
    if rotation_ptr is not None:
        rotation_ptr += head * D * D
    x_rows = x_ptr + rows.to(tl.int64) * x_stride_token + head * x_stride_head
    stored = slots >= PAGE_TOKENS
    page_rows = pages_ptr + (slots // PAGE_TOKENS).to(tl.int64) * page_stride + head * HEAD_BYTES
    offset = slots % PAGE_TOKENS
    if MEAN is not None:
        # Loaded before the product: beside its operands, and the compiler keeps the product's layout for what follows.
        mean_rows = (page_rows + MEAN).to(tl.pointer_type(tl.float16))
        mean = tl.load(mean_rows[:, None] + lanes[None, :], mask=stored[:, None] & in_head, other=0.0)
    x = rotated_rows(x_rows, wanted, centre_ptr, rotation_ptr, D, BLOCK_M, BLOCK_D)

    if window_ptr is not None:
        window_dtype: tl.constexpr = window_ptr.dtype.element_ty
        if any_in_window:  # in a long prefill, few tiles
            window_slots = tl.load(window_slot_ptr + rows, mask=wanted, other=-1)
            window_rows = window_ptr + (window_slots // WINDOW_BLOCK) * window_stride + ROW_OFFSET
            window_rows += (head * WINDOW_BLOCK + window_slots % WINDOW_BLOCK) * (2 * D)
            mask = (window_slots >= WINDOW_BLOCK)[:, None] & in_head
            tl.store(window_rows[:, None] + lanes[None, :], cast(x, window_dtype), mask=mask)
    if new_kv_ptr is not None:
        new_dtype: tl.constexpr = new_kv_ptr.dtype.element_ty
        if tl.program_id(1) * BLOCK_M < num_new:
            new_rows = new_kv_ptr + (rows.to(tl.int64) * tl.num_programs(0) + head) * (2 * D) + ROW_OFFSET
            mask = (rows < num_new)[:, None] & in_head
            tl.store(new_rows[:, None] + lanes[None, :], cast(x, new_dtype), mask=mask)
    if MEAN is not None:
        x -= mean.to(tl.float32)
    clip = tl.load(clip_ptr + head) if ROWS.affine else 0.0
    write_rows(x, page_rows, offset, stored, clip, sketch_ptr, D, ROWS, BLOCK_M, BLOCK_D)
