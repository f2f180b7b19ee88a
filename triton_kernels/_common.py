# SPDX-License-Identifier: Apache-2.0
"""Rotating rows of keys, values or queries inside a kernel, and checks: what the launchers share.

Rotations are fp16: a tensor core takes them with 10 bits of mantissa. Activations are cast to fp16 beside them, and
products are summed in float32.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from vllm_kvcompress.formats.base import PageLayout

FP16_MAX = tl.constexpr(65504.0)
BLOCK_K = tl.constexpr(32)
"""Channels multiplied at a time."""
SIGN_UNIT = tl.constexpr(math.sqrt(math.pi / 2))
"""1 / E[(s . q) sign(s . r)] of unit q = r (quantizers/qjl.py)."""
NOTHING_SEEN = tl.constexpr(-1e30)
"""Maximum of rows that have seen nothing: below any score, and its difference from itself is 0, not NaN."""


@triton.jit
def cast(x, dtype: tl.constexpr):
    """Float of any width to `dtype`. Where that is fp16, finite values saturate and all else becomes NaN.

    An overflow is survivable; an activation that is not finite is the caller's error and stays visible.
    """
    if dtype == tl.float16:
        if x.dtype != tl.float16:
            x = x.to(tl.float32)
        # NaN for NaN and infinities: one fused multiply-add instead of a comparison and a selection.
        broken = x * 0.0
        if x.dtype != tl.float16:
            x = tl.clamp(x, -FP16_MAX, FP16_MAX)
        x += broken
    return x.to(dtype)


@triton.jit
def rotated_rows(
    x_rows,
    row_mask,
    centre_ptr,
    rotation_ptr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """(x - centre) @ rotation for BLOCK_M rows; zero where `row_mask` is false and in lanes from D on.

    Args:
        x_rows: [BLOCK_M] pointers to the rows, whose D elements are contiguous.
        centre_ptr: [D] float32, or None.
        rotation_ptr: [D, D] fp16, or None: then x - centre in float32, never cast to fp16.
        BLOCK_D: D rounded up to a power of two.

    Returns:
        [BLOCK_M, BLOCK_D] float32.
    """
    if rotation_ptr is None:
        lanes = tl.arange(0, BLOCK_D)
        out = _centred_rows(x_rows, row_mask, lanes, centre_ptr, D).to(tl.float32)
    else:
        columns = tl.arange(0, BLOCK_D)
        out = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
        # A pipelined loop, though a short one: its loads go to shared memory past the registers, all at once.
        for begin in tl.range(0, BLOCK_D, BLOCK_K, num_stages=4):
            lanes = begin + tl.arange(0, BLOCK_K)
            x = cast(_centred_rows(x_rows, row_mask, lanes, centre_ptr, D), tl.float16)
            in_rotation = (lanes < D)[:, None] & (columns < D)[None, :]
            rotation = tl.load(rotation_ptr + lanes[:, None] * D + columns[None, :], mask=in_rotation, other=0.0)
            out = tl.dot(x, rotation, out)
    return out


@triton.jit
def _centred_rows(x_rows, row_mask, lanes, centre_ptr, D: tl.constexpr):
    """Channels `lanes` of rows less the centre, in the dtype of x without one, else float32."""
    mask = row_mask[:, None] & (lanes < D)[None, :]
    x = tl.load(x_rows[:, None] + lanes[None, :], mask=mask, other=0.0)
    if centre_ptr is not None:
        centre = tl.load(centre_ptr + lanes, mask=lanes < D, other=0.0)
        x = tl.where(mask, x.to(tl.float32) - centre[None, :], 0.0)
    return x


def check_rotation(rotation: torch.Tensor | None, num_kv_heads: int, head_dim: int) -> None:
    """
    Raises:
        ValueError: the rotation is not a contiguous fp16 [H, D, D].
    """
    if rotation is None:
        return
    expected = (num_kv_heads, head_dim, head_dim)
    if rotation.shape != expected or rotation.dtype != torch.float16 or not rotation.is_contiguous():
        raise ValueError(
            f"rotations are contiguous float16 {list(expected)}, got {rotation.dtype} {list(rotation.shape)} "
            f"with strides {rotation.stride()}"
        )


def check_sketch(sketch: torch.Tensor | None, layout: PageLayout) -> None:
    """
    Raises:
        ValueError: the sketch is missing, superfluous or not a contiguous fp16 [D, D].
    """
    if (sketch is None) != (layout.keys.signs is None):
        raise ValueError("a sketch matrix goes with keys that have signs, and only with those")
    if sketch is None:
        return
    expected = (layout.head_dim, layout.head_dim)
    if sketch.shape != expected or sketch.dtype != torch.float16 or not sketch.is_contiguous():
        raise ValueError(
            f"sketches are contiguous float16 {list(expected)}, got {sketch.dtype} {list(sketch.shape)} "
            f"with strides {sketch.stride()}"
        )
