# SPDX-License-Identifier: Apache-2.0
"""Rotation of queries into cache space, or of outputs out of it: one matrix a KV head."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vllm_kvcompress.triton_kernels import _common
from vllm_kvcompress.triton_kernels._common import cast, rotated_rows


def rotate(x: torch.Tensor, rotation: torch.Tensor | None, out: torch.Tensor) -> None:
    """out = x @ rotation of each head's KV head: queries with R_k, outputs with R_v^T.

    x is cast to fp16 and products are summed in float32. Finite values saturate in fp16; NaN and infinities become NaN.

    Args:
        x: [T, Hq, D] float16, bfloat16 or float32; the last dimension is contiguous.
        rotation: [H, D, D] float16, contiguous; head i of x uses rotation[i // (Hq / H)]. None: x is only cast.
        out: [T, Hq, D] float16, bfloat16 or float32, written; the last dimension is contiguous. Must not overlap x.

    Raises:
        ValueError: shapes, strides or the dtype of the rotation do not fit.
    """
    tokens, heads, head_dim = x.shape
    kv_heads = heads if rotation is None else rotation.shape[0]
    _common.check_rotation(rotation, kv_heads, head_dim)
    if out.shape != x.shape or heads % kv_heads or x.stride(2) != 1 or out.stride(2) != 1:
        raise ValueError(
            f"cannot rotate {list(x.shape)} (strides {x.stride()}) with {kv_heads} matrices into {list(out.shape)} "
            f"(strides {out.stride()})"
        )
    group = heads // kv_heads
    rows = tokens * group
    if rows == 0:
        return
    # Rows of a KV head share its matrix: many of them in a tile where there are many, many tiles where there are few.
    block_m = 16 if rows <= 512 else 64 if head_dim <= 128 else 32
    _rotate_kernel[(kv_heads, triton.cdiv(rows, block_m))](
        x,
        x.stride(0),
        x.stride(1),
        rotation,
        out,
        out.stride(0),
        out.stride(1),
        rows,
        GROUP=group,
        D=head_dim,
        BLOCK_M=block_m,
        BLOCK_D=triton.next_power_of_2(head_dim),
        num_warps=4,
    )


@triton.jit(do_not_specialize=["num_rows"])
def _rotate_kernel(
    x_ptr,
    x_stride_token,
    x_stride_head,
    rotation_ptr,
    out_ptr,
    out_stride_token,
    out_stride_head,
    num_rows,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid: KV heads x tiles of the (token, query head) rows of each."""
    kv_head = tl.program_id(0)
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < num_rows
    token = (rows // GROUP).to(tl.int64)
    head = kv_head * GROUP + rows % GROUP
    if rotation_ptr is not None:
        rotation_ptr += kv_head * D * D
    x_rows = x_ptr + token * x_stride_token + head * x_stride_head
    rotated = rotated_rows(x_rows, row_mask, None, rotation_ptr, D, BLOCK_M, BLOCK_D)
    lanes = tl.arange(0, BLOCK_D)
    out_rows = out_ptr + token * out_stride_token + head * out_stride_head
    mask = row_mask[:, None] & (lanes < D)[None, :]
    tl.store(out_rows[:, None] + lanes[None, :], cast(rotated, out_ptr.dtype.element_ty), mask=mask)
