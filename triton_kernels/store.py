# SPDX-License-Identifier: Apache-2.0
"""A step's keys and values into cache space, the pages, the 16-bit windows and the buffer of new tokens.

Two launches: the mean keys of pages begun in the step (formats that centre by page), then everything else. The torch
reference is `kernels.torch_attention.store`; the quantisers are `quantizers.affine`, `quantizers.lloyd_max` and, of
what their codes leave over, `quantizers.qjl`, step by step.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from vllm_kvcompress.attention.plan import MIN_TOKENS_FOR_OWN_MEAN
from vllm_kvcompress.formats.base import PageLayout, RowLayout
from vllm_kvcompress.quantizers import lloyd_max
from vllm_kvcompress.triton_kernels import _common
from vllm_kvcompress.triton_kernels._common import FP16_MAX, cast, rotated_rows

_FP32_SMALLEST = tl.constexpr(2.0**-126)
"""Normal number, whose reciprocal is finite."""
_SIGN_MEAN = tl.constexpr(math.sqrt(math.pi / 2))
"""1 / E[(s . q) sign(s . r)] of unit q = r (quantizers/qjl.py)."""


class _Part(NamedTuple):
    """`formats.base.Part` as a compile-time argument, with the codebook of its quantiser."""

    first_channel: int
    channels: int
    bits: int
    codes: int
    scales: int
    a: float
    """Lloyd-Max levels are a / 2 * x * (1 + bend * x^2) in fp16 arithmetic, x = 2 * code - (2**bits - 1)."""
    bend: float
    edges: tuple[float, ...]
    """Lloyd-Max: the 2**(bits - 1) - 1 positive boundaries. Passed, as `a` and `bend` are, so that compiled kernels
    are kept apart when the codebook changes."""


class _Rows(NamedTuple):
    """`formats.base.RowLayout` as a compile-time argument."""

    affine: bool
    parts: tuple[_Part, ...]
    signs: int | None
    sign_norms: int | None


@functools.cache
def _rows_constants(rows: RowLayout) -> _Rows:
    parts = []
    for part in rows.parts:
        a, bend = 0.0, 0.0
        edges: tuple[float, ...] = ()
        if rows.quantizer == "lloyd-max":
            a, b = lloyd_max.cubic(part.channels, part.bits)
            bend = float(torch.tensor(b / 4).half())
            edges = tuple(lloyd_max.boundaries(part.channels, part.bits)[2 ** (part.bits - 1) :].tolist())
        parts.append(_Part(part.first_channel, part.channels, part.bits, part.codes, part.scales, a, bend, edges))
    return _Rows(rows.quantizer == "affine", tuple(parts), rows.signs, rows.sign_norms)


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
        "K_ROWS": _rows_constants(layout.keys),
        "K_MEAN": layout.k_mean,
        "BLOCK_D": triton.next_power_of_2(head_dim),
    }
    if layout.k_mean is not None and requests:
        # A request of n tokens begins at most cdiv(n, page) pages.
        search = max_query_len > layout.page_tokens
        _means_kernel[(tokens // layout.page_tokens + requests if search else requests, heads)](
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
        V_ROWS=_rows_constants(layout.values),
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


@triton.jit(do_not_specialize=["num_requests"])
def _means_kernel(
    pages_ptr,
    page_stride,
    key_ptr,
    key_stride_token,
    key_stride_head,
    slot_ptr,
    query_start_ptr,
    seq_len_ptr,
    table_ptr,
    table_stride,
    rotation_ptr,
    centre_ptr,
    sketch_ptr,
    num_requests,
    SEARCH: tl.constexpr,
    MIN_OWN: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    D: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    HEAD_BYTES: tl.constexpr,
    K_ROWS: tl.constexpr,
    K_MEAN: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Mean key of each page begun in the step (the rule: attention/plan.py, PageStarts).

    Grid: items x KV heads. An item is a page that a request may begin: item i is request i's first such page or, with
    SEARCH, request b owns the items from query_start[b] // PAGE_TOKENS + b on, at least cdiv(n_b, PAGE_TOKENS) of them.
    """
    item = tl.program_id(0)
    head = tl.program_id(1)
    request = item
    candidate = 0
    if SEARCH:
        request = -1
        for begin in range(0, num_requests, BLOCK_R):
            requests = begin + tl.arange(0, BLOCK_R)
            starts = tl.load(query_start_ptr + requests, mask=requests < num_requests, other=0)
            owned = (requests < num_requests) & (starts // PAGE_TOKENS + requests <= item)
            request += tl.sum(owned.to(tl.int32))
        candidate = item - (tl.load(query_start_ptr + request) // PAGE_TOKENS + request)
    start = tl.load(query_start_ptr + request)
    seq_len = tl.load(seq_len_ptr + request)
    history = seq_len - (tl.load(query_start_ptr + request + 1) - start)
    position = (tl.cdiv(history, PAGE_TOKENS) + candidate) * PAGE_TOKENS  # where the page begins
    if position >= seq_len:
        return
    row = start + position - history
    slot = tl.load(slot_ptr + row)
    if slot < PAGE_TOKENS:
        return

    key_ptr += head * key_stride_head
    if centre_ptr is not None:
        centre_ptr += head * D
    if rotation_ptr is not None:
        rotation_ptr += head * D * D
    head_offset = head * HEAD_BYTES
    fp16_keys: tl.constexpr = rotation_ptr is not None  # the mean of what is rotated and stored
    length = tl.minimum(seq_len - position, PAGE_TOKENS)
    total, count = _stored_sum(
        key_ptr, key_stride_token, slot_ptr, row, length, centre_ptr, fp16_keys, D, PAGE_TOKENS, BLOCK_T, BLOCK_D
    )
    table_entry = table_ptr + request.to(tl.int64) * table_stride + position // PAGE_TOKENS - 1
    previous = tl.load(table_entry, mask=position >= PAGE_TOKENS, other=0).to(tl.int64)
    old = 0  # tokens of the previous page from before the step
    if (count < MIN_OWN) & (previous > 0):
        old = tl.maximum(history - (position - PAGE_TOKENS), 0)
        new = PAGE_TOKENS - old
        total, new_count = _stored_sum(
            key_ptr,
            key_stride_token,
            slot_ptr,
            row - new,
            new,
            centre_ptr,
            fp16_keys,
            D,
            PAGE_TOKENS,
            BLOCK_T,
            BLOCK_D,
        )
        count = old + new_count
    count = tl.maximum(count, 1).to(tl.float32)

    out_ptr = pages_ptr + (slot // PAGE_TOKENS) * page_stride + head_offset + K_MEAN
    previous_ptr = pages_ptr + previous * page_stride + head_offset
    rows = tl.arange(0, BLOCK_D)
    if sketch_ptr is not None:
        signs = tl.zeros([BLOCK_D], dtype=tl.float32)
        if old > 0:
            signs = _sign_sum(previous_ptr, old, D, K_ROWS, BLOCK_T, BLOCK_D)
    BLOCK: tl.constexpr = BLOCK_D if rotation_ptr is None else BLOCK_N
    for begin in tl.static_range(0, BLOCK_D, BLOCK):
        lanes = begin + tl.arange(0, BLOCK)
        in_head = lanes < D
        # Rotating is linear: the rotated mean is the mean of the rotated keys.
        if rotation_ptr is None:
            mean = total
        else:
            mask = (rows < D)[:, None] & in_head[None, :]
            rotation = tl.load(rotation_ptr + rows[:, None] * D + lanes[None, :], mask=mask, other=0.0)
            mean = tl.sum(total[:, None] * rotation.to(tl.float32), axis=0)
        if old > 0:
            mean += _read_back_sum(previous_ptr, old, lanes, D, K_ROWS, K_MEAN, BLOCK_T, BLOCK)
            if sketch_ptr is not None:
                mask = (rows < D)[:, None] & in_head[None, :]
                sketch = tl.load(sketch_ptr + rows[:, None] * D + lanes[None, :], mask=mask, other=0.0)
                mean += (_SIGN_MEAN / D) * tl.sum(signs[:, None] * sketch.to(tl.float32), axis=0)
        mean = tl.clamp(mean / count, -FP16_MAX, FP16_MAX, propagate_nan=tl.PropagateNan.ALL)
        tl.store(out_ptr.to(tl.pointer_type(tl.float16)) + lanes, mean.to(tl.float16), mask=in_head)


@triton.jit
def _stored_sum(
    key_ptr,
    key_stride_token,
    slot_ptr,
    first,
    length,
    centre_ptr,
    FP16_KEYS: tl.constexpr,
    D: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sum of one head's centred keys of rows first <= t < first + length that are stored, not yet rotated; their count.

    Returns:
        [BLOCK_D] float32, int32.
    """
    lanes = tl.arange(0, BLOCK_D)
    sums = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
    counts = tl.zeros([BLOCK_T], dtype=tl.int32)
    if centre_ptr is not None:
        centre = tl.load(centre_ptr + lanes, mask=lanes < D, other=0.0)
    for begin in range(0, length, BLOCK_T):
        offsets = begin + tl.arange(0, BLOCK_T)
        rows = first + offsets
        inside = offsets < length
        stored = tl.load(slot_ptr + rows, mask=inside, other=-1) >= PAGE_TOKENS
        key_rows = key_ptr + rows.to(tl.int64) * key_stride_token
        # Loaded before it is known what is stored: one wait for memory, not two.
        x = tl.load(key_rows[:, None] + lanes[None, :], mask=inside[:, None] & (lanes < D)[None, :], other=0.0)
        if centre_ptr is not None:
            x = x.to(tl.float32) - centre[None, :]
        if FP16_KEYS:
            x = cast(x, tl.float16)
        sums += tl.where(stored[:, None], x.to(tl.float32), 0.0)
        counts += stored.to(tl.int32)
    return tl.sum(sums, axis=0), tl.sum(counts, axis=0)


@triton.jit
def _read_back_sum(
    page_ptr,
    length,
    lanes,
    D: tl.constexpr,
    K_ROWS: tl.constexpr,
    K_MEAN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """[BLOCK_N] float32: sum over a page's first tokens of their dequantised keys, channels `lanes` of one head.

    Without what signs add: `_sign_sum`.
    """
    in_head = lanes < D
    sums = tl.zeros([BLOCK_T, BLOCK_N], dtype=tl.float32)
    for begin in range(0, length, BLOCK_T):
        tokens = begin + tl.arange(0, BLOCK_T)
        for index in tl.static_range(len(K_ROWS.parts)):
            sums += _read_back_part(page_ptr, tokens, tokens < length, lanes, K_ROWS, index)
    mean_ptr = (page_ptr + K_MEAN).to(tl.pointer_type(tl.float16))
    mean = tl.load(mean_ptr + lanes, mask=in_head, other=0.0).to(tl.float32)
    return tl.sum(sums, axis=0) + length * mean


@triton.jit
def _read_back_part(page_ptr, tokens, inside, lanes, K_ROWS: tl.constexpr, INDEX: tl.constexpr):
    """[T, N] float32: what the codes of one part say of channels `lanes` [N] of tokens [T]; 0 in other parts' lanes and
    in tokens that are not `inside`."""
    PART: tl.constexpr = K_ROWS.parts[INDEX]
    channels = lanes - PART.first_channel
    mask = inside[:, None] & ((channels >= 0) & (channels < PART.channels))[None, :]
    code_rows = page_ptr + PART.codes + tokens * (PART.channels * PART.bits // 8)
    scale_ptr = (page_ptr + PART.scales).to(tl.pointer_type(tl.float16))
    if PART.bits == 3:
        codes = _codes_at(code_rows, channels, mask, 2)
        codes |= _codes_at(code_rows + PART.channels // 4, channels, mask, 1) << 2
    else:
        codes = _codes_at(code_rows, channels, mask, PART.bits)
    codes = codes.to(tl.float32)
    if K_ROWS.affine:
        scale = tl.load(scale_ptr + 2 * tokens, mask=inside, other=0.0).to(tl.float32)
        zero = tl.load(scale_ptr + 2 * tokens + 1, mask=inside, other=0.0).to(tl.float32)
        found = codes * scale[:, None] + zero[:, None]
    else:
        level = _level(2 * codes - (2**PART.bits - 1), PART.bend)
        norm = tl.load(scale_ptr + tokens, mask=inside, other=0.0).to(tl.float32) * (PART.a / 2)
        found = tl.where(mask, level * norm[:, None], 0.0)
    return found


@triton.jit
def _level(x, BEND: tl.constexpr):
    """x * (1 + BEND * x^2) of odd integers in float32, rounded where fp16 arithmetic rounds (`lloyd_max.levels`)."""
    bent = (x * x * BEND).to(tl.float16).to(tl.float32)
    return (bent * x + x).to(tl.float16).to(tl.float32)


@triton.jit
def _codes_at(code_rows, channels, mask, BITS: tl.constexpr):
    """[T, N] int32: codes of 1, 2 or 4 bits of rows that begin at code_rows [T], at channels [N]."""
    PER_BYTE: tl.constexpr = 8 // BITS
    packed = tl.load(code_rows[:, None] + (channels // PER_BYTE)[None, :], mask=mask, other=0)
    return (packed.to(tl.int32) >> (BITS * (channels % PER_BYTE))[None, :]) & (2**BITS - 1)


@triton.jit
def _sign_sum(
    page_ptr,
    length,
    D: tl.constexpr,
    K_ROWS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """[BLOCK_D] float32: sum over a page's first tokens of sign(S r) |r|, for one product with S (quantizers/qjl.py).

    |r| is the norm of a token's residual r.
    """
    lanes = tl.arange(0, BLOCK_D)
    sums = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
    norm_ptr = (page_ptr + K_ROWS.sign_norms).to(tl.pointer_type(tl.float16))
    for begin in range(0, length, BLOCK_T):
        tokens = begin + tl.arange(0, BLOCK_T)
        inside = tokens < length
        mask = inside[:, None] & (lanes < D)[None, :]
        signs = _codes_at(page_ptr + K_ROWS.signs + tokens * (D // 8), lanes, mask, 1).to(tl.float32) * 2.0 - 1.0
        norm = tl.load(norm_ptr + tokens, mask=inside, other=0.0).to(tl.float32)
        sums += signs * norm[:, None]
    return tl.sum(sums, axis=0)


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
    if ROWS.affine:
        PART: tl.constexpr = ROWS.parts[0]
        packed, codes, scale, zero = _quantise(x, in_head, tl.load(clip_ptr + head), D, BLOCK_M, BLOCK_D)
        places = tl.arange(0, BLOCK_D // 4)[None, :]
        code_rows = page_rows + PART.codes + offset * (D // 4)
        tl.store(code_rows[:, None] + places, packed, mask=stored[:, None] & (places < D // 4))
        # Scale and zero as one word, low half first.
        low = scale.to(tl.uint16, bitcast=True).to(tl.uint32)
        high = zero.to(tl.uint16, bitcast=True).to(tl.uint32)
        scale_rows = (page_rows + PART.scales).to(tl.pointer_type(tl.uint32)) + offset
        tl.store(scale_rows, low | (high << 16), mask=stored)
        if sketch_ptr is not None:
            read_back = codes.to(tl.float32) * scale.to(tl.float32)[:, None] + zero.to(tl.float32)[:, None]
            residual = tl.where(in_head, x - read_back, 0.0)
    else:
        residual = _store_lloyd_max(x, page_rows, offset, stored, ROWS, BLOCK_M, BLOCK_D)
    if sketch_ptr is not None:
        _store_signs(residual, sketch_ptr, page_rows, offset, stored, D, ROWS, BLOCK_M, BLOCK_D)


@triton.jit
def _store_lloyd_max(x, page_rows, offset, stored, ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """quantizers/lloyd_max.py of rows of x [BLOCK_M, BLOCK_D] float32, each part of the channels for itself.

    Parts are lanes of the whole tile, not tiles of their own: an accumulator cannot be cut, and the compiler knows the
    lanes of a register up to their last bits, so that what lies outside of a part costs little.

    Returns:
        [BLOCK_M, BLOCK_D] float32: what the codes leave over, 0 outside of all parts; of use if the rows have signs.
    """
    codes = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.int32)
    residual = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    for index in tl.static_range(len(ROWS.parts)):
        in_part, part_codes, norm, part_residual = _quantise_part(x, ROWS, index, BLOCK_M, BLOCK_D)
        codes = tl.where(in_part, part_codes, codes)
        residual = tl.where(in_part, part_residual, residual)
        norm_rows = (page_rows + ROWS.parts[index].scales).to(tl.pointer_type(tl.float16))
        tl.store(norm_rows + offset, norm, mask=stored)
    for index in tl.static_range(len(ROWS.parts)):
        _store_part(codes, page_rows, offset, stored, ROWS, index, BLOCK_M, BLOCK_D)
    return residual


@triton.jit
def _quantise_part(x, ROWS: tl.constexpr, INDEX: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """One part of the channels of rows of x [BLOCK_M, BLOCK_D] float32.

    Returns:
        which lanes are the part's [1, BLOCK_D]; there alone codes [BLOCK_M, BLOCK_D] int32; stored norm [BLOCK_M] fp16;
        there alone what the codes leave over [BLOCK_M, BLOCK_D] float32.
    """
    PART: tl.constexpr = ROWS.parts[INDEX]
    LEVELS: tl.constexpr = 2 ** (PART.bits - 1)  # that are positive
    lanes = tl.arange(0, BLOCK_D)
    in_part = ((lanes >= PART.first_channel) & (lanes < PART.first_channel + PART.channels))[None, :]
    unit, norm = _split_norm(tl.where(in_part, x, 0.0))
    size = tl.abs(unit)
    above = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.int32)
    for edge in tl.static_range(LEVELS - 1):
        above += (size > PART.edges[edge]).to(tl.int32)
    codes = tl.where(unit > 0, LEVELS + above, LEVELS - 1 - above)
    # Magnitudes of the levels, divided by a.
    level = _level(2 * above.to(tl.float32) + 1, PART.bend) * 0.5
    if ROWS.signs is None:
        # So that the row read back has the norm of x. Signs correct the codes' bias themselves.
        length = tl.sqrt_rn(tl.sum(tl.where(in_part, level * level, 0.0), axis=1))
        norm = tl.div_rn(norm, length * PART.a)
    norm = _saturated_half(norm)
    read_back = tl.where(unit > 0, level, -level) * (norm.to(tl.float32) * PART.a)[:, None]
    return in_part, codes, norm, x - read_back


@triton.jit
def _store_part(
    codes,
    page_rows,
    offset,
    stored,
    ROWS: tl.constexpr,
    INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Codes [BLOCK_M, BLOCK_D] int32 of one part to their bytes."""
    PART: tl.constexpr = ROWS.parts[INDEX]
    FIRST: tl.constexpr = PART.first_channel
    CHANNELS: tl.constexpr = PART.channels
    code_rows = page_rows + PART.codes + offset * (CHANNELS * PART.bits // 8)
    if PART.bits == 3:
        _store_packed(codes & 3, code_rows, stored, FIRST, CHANNELS, 2, BLOCK_M, BLOCK_D)
        _store_packed(codes >> 2, code_rows + CHANNELS // 4, stored, FIRST, CHANNELS, 1, BLOCK_M, BLOCK_D)
    elif PART.bits == 2:
        # Masked like the low bits of 3: with both widths in a row, one packing serves both.
        _store_packed(codes & 3, code_rows, stored, FIRST, CHANNELS, 2, BLOCK_M, BLOCK_D)
    else:
        _store_packed(codes, code_rows, stored, FIRST, CHANNELS, PART.bits, BLOCK_M, BLOCK_D)


@triton.jit
def _split_norm(x):
    """lloyd_max.split_norm of rows of x [M, N] float32.

    Rows of which all is subnormal lose precision, not more: their norm is 0 in fp16.

    Returns:
        x / |x| [M, N], |x| [M], float32.
    """
    peak = tl.max(tl.abs(x), axis=1)
    # An infinite peak has the reciprocal 0, which makes NaN of it, as subtracting does.
    scaled = x * tl.div_rn(1.0, tl.maximum(peak, _FP32_SMALLEST))[:, None]
    length = tl.sqrt_rn(tl.sum(scaled * scaled, axis=1))
    return scaled * tl.div_rn(1.0, tl.where(length == 0, 1.0, length))[:, None], length * peak


@triton.jit
def _saturated_half(norm):
    """float32 >= 0 or NaN -> fp16, as lloyd_max.saturated_half."""
    return tl.minimum(norm, FP16_MAX, propagate_nan=tl.PropagateNan.ALL).to(tl.float16)


@triton.jit
def _store_signs(
    residual,
    sketch_ptr,
    page_rows,
    offset,
    stored,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """quantizers/qjl.py of residual [BLOCK_M, BLOCK_D] float32, which is 0 in lanes from D on.

    Signs are those of products of fp16 operands, summed in float32.
    """
    unit, norm = _split_norm(residual)
    norm_rows = (page_rows + ROWS.sign_norms).to(tl.pointer_type(tl.float16)) + offset
    tl.store(norm_rows, _saturated_half(norm), mask=stored)
    unit = unit.to(tl.float16)
    lanes = tl.arange(0, BLOCK_D)
    BLOCK_S: tl.constexpr = min(BLOCK_D, 8192 // BLOCK_D)  # rows of S at a time, as many as registers hold
    for begin in tl.static_range(0, BLOCK_D, BLOCK_S):
        rows = begin + tl.arange(0, BLOCK_S)
        mask = (rows < D)[:, None] & (lanes < D)[None, :]
        sketch = tl.load(sketch_ptr + rows[:, None] * D + lanes[None, :], mask=mask, other=0.0)
        signs = (tl.dot(unit, tl.trans(sketch)) >= 0).to(tl.int32)
        sign_rows = page_rows + ROWS.signs + offset * (D // 8) + begin // 8
        _store_packed(signs, sign_rows, stored, 0, D - begin, 1, BLOCK_M, BLOCK_S)


@triton.jit
def _store_packed(
    codes,
    code_rows,
    stored,
    FIRST: tl.constexpr,
    CHANNELS: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Pack lanes FIRST <= lane < FIRST + CHANNELS, whole bytes, of codes [BLOCK_M, BLOCK_N] int32 as packing.pack_bits.

    Args:
        code_rows: [BLOCK_M] pointers to where the bytes of each row begin; not written where `stored` is false.
        BITS: 1, 2 or 4. Codes of other lanes may be of any width.
    """
    PER_BYTE: tl.constexpr = 8 // BITS
    weights = 1 << (BITS * tl.arange(0, PER_BYTE))
    runs = tl.reshape(codes, [BLOCK_M, BLOCK_N // PER_BYTE, PER_BYTE])
    packed = tl.sum(runs * weights[None, None, :], axis=2).to(tl.uint8)
    places = tl.arange(0, BLOCK_N // PER_BYTE)[None, :] - FIRST // PER_BYTE
    inside = (places >= 0) & (places < CHANNELS // PER_BYTE)
    tl.store(code_rows[:, None] + places, packed, mask=stored[:, None] & inside)


@triton.jit
def _quantise(x, in_head, clip, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """quantizers/affine.py for rows of x [BLOCK_M, BLOCK_D] float32, of which the first D lanes count.

    Returns:
        codes packed [BLOCK_M, BLOCK_D / 4] uint8 and as they are [BLOCK_M, BLOCK_D] int32, scale and zero [BLOCK_M]
        fp16.
    """
    x = tl.clamp(x, -FP16_MAX, FP16_MAX, propagate_nan=tl.PropagateNan.ALL)
    if BLOCK_D == D:
        low, high, total = tl.min(x, axis=1), tl.max(x, axis=1), tl.sum(x, axis=1)
    else:
        low = tl.min(tl.where(in_head, x, float("inf")), axis=1)
        high = tl.max(tl.where(in_head, x, -float("inf")), axis=1)
        total = tl.sum(tl.where(in_head, x, 0.0), axis=1)
    middle = low + (high - low) * 0.5
    scale = tl.div_rn((high - low) * clip, 3.0).to(tl.float16)
    step = scale.to(tl.float32)
    inverse = tl.where(step > 0, tl.div_rn(1.0, tl.where(step > 0, step, 1.0)), 0.0)
    codes = x * inverse[:, None] + (2.0 - middle * inverse)[:, None]
    codes = tl.clamp(codes, 0.0, 3.5).to(tl.int32)
    if BLOCK_D != D:
        codes = tl.where(in_head, codes, 0)
    # One sum gives a byte's four codes in its low byte and, above, the sum of these codes.
    weights = (1 << (2 * tl.arange(0, 4))) + 256
    quads = tl.sum(tl.reshape(codes, [BLOCK_M, BLOCK_D // 4, 4]) * weights[None, None, :], axis=2)
    sum_of_codes = tl.sum(quads >> 8, axis=1).to(tl.float32)
    mean = total / D
    zero = tl.where(step > 0, mean - step * (sum_of_codes / D), middle)
    zero = tl.clamp(zero, -FP16_MAX, FP16_MAX, propagate_nan=tl.PropagateNan.ALL)
    # Minimum and maximum pass over NaN, the mean does not: such a row reads as NaN.
    broken = mean != mean
    scale = tl.where(broken, mean, step).to(tl.float16)
    zero = tl.where(broken, mean, zero).to(tl.float16)
    return quads.to(tl.uint8), codes, scale, zero
