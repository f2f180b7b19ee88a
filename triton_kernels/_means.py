# SPDX-License-Identifier: Apache-2.0
"""Mean keys of pages begun in a step, of formats that centre by page (the rule: `attention.plan.PageStarts`)."""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_kvcompress.triton_kernels._common import FP16_MAX, SIGN_UNIT, cast
from vllm_kvcompress.triton_kernels._rows import codes_by_lane, read_back_part


@triton.jit(do_not_specialize=["num_requests"])
def means_kernel(
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
                mean += (SIGN_UNIT / D) * tl.sum(signs[:, None] * sketch.to(tl.float32), axis=0)
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
            sums += read_back_part(page_ptr, tokens, tokens < length, lanes, K_ROWS, index)
    mean_ptr = (page_ptr + K_MEAN).to(tl.pointer_type(tl.float16))
    mean = tl.load(mean_ptr + lanes, mask=in_head, other=0.0).to(tl.float32)
    return tl.sum(sums, axis=0) + length * mean


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
        signs = codes_by_lane(page_ptr + K_ROWS.signs + tokens * (D // 8), lanes, mask, 1).to(tl.float32) * 2.0 - 1.0
        norm = tl.load(norm_ptr + tokens, mask=inside, other=0.0).to(tl.float32)
        sums += signs * norm[:, None]
    return tl.sum(sums, axis=0)
