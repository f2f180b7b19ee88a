# SPDX-License-Identifier: Apache-2.0
"""Rows of pages inside a kernel: quantised and written, and read back as they were written.

The quantisers are `quantizers.affine`, `quantizers.lloyd_max` and, of what their codes leave over, `quantizers.qjl`,
step by step. Rows are read back by lane, where few are, or of any pages; what reads many is in `_paged`.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from vllm_kvcompress.formats.base import RowLayout
from vllm_kvcompress.quantizers import lloyd_max
from vllm_kvcompress.triton_kernels._common import FP16_MAX, SIGN_UNIT

_FP32_SMALLEST = tl.constexpr(2.0**-126)
"""Normal number, whose reciprocal is finite."""


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
def rows_constants(rows: RowLayout) -> _Rows:
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


@triton.jit
def write_rows(
    x,
    page_rows,
    offset,
    stored,
    clip,
    sketch_ptr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Quantise rows of x [BLOCK_M, BLOCK_D] float32, centred, and write what says them, where `stored` [BLOCK_M].

    Args:
        page_rows: [BLOCK_M] pointers to a head's share of the row's page; offset: [BLOCK_M], the row in it.
        clip: share of the range, of affine codes. sketch_ptr: None where rows have no signs.
    """
    in_head = (tl.arange(0, BLOCK_D) < D)[None, :]
    if ROWS.affine:
        PART: tl.constexpr = ROWS.parts[0]
        packed, codes, scale, zero = _quantise(x, in_head, clip, D, BLOCK_M, BLOCK_D)
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


@triton.jit
def read_back_part(page_ptr, tokens, inside, lanes, K_ROWS: tl.constexpr, INDEX: tl.constexpr):
    """[T, N] float32: what the codes of one part say of channels `lanes` [N] of tokens [T]; 0 in other parts' lanes and
    in tokens that are not `inside`."""
    PART: tl.constexpr = K_ROWS.parts[INDEX]
    channels = lanes - PART.first_channel
    mask = inside[:, None] & ((channels >= 0) & (channels < PART.channels))[None, :]
    code_rows = page_ptr + PART.codes + tokens * (PART.channels * PART.bits // 8)
    scale_ptr = (page_ptr + PART.scales).to(tl.pointer_type(tl.float16))
    if PART.bits == 3:
        codes = codes_by_lane(code_rows, channels, mask, 2)
        codes |= codes_by_lane(code_rows + PART.channels // 4, channels, mask, 1) << 2
    else:
        codes = codes_by_lane(code_rows, channels, mask, PART.bits)
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
def codes_by_lane(code_rows, channels, mask, BITS: tl.constexpr):
    """[T, N] int32: codes of 1, 2 or 4 bits of rows that begin at code_rows [T], at channels [N]."""
    PER_BYTE: tl.constexpr = 8 // BITS
    packed = tl.load(code_rows[:, None] + (channels // PER_BYTE)[None, :], mask=mask, other=0)
    return (packed.to(tl.int32) >> (BITS * (channels % PER_BYTE))[None, :]) & (2**BITS - 1)


@triton.jit
def read_back_rows(
    page_rows,
    offset,
    inside,
    sketch_ptr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """[BLOCK_M, BLOCK_D] float32 as `write_rows` got them, but for what quantising cost; 0 where not `inside`.

    Args:
        page_rows, offset: as for `write_rows`.
    """
    lanes = tl.arange(0, BLOCK_D)
    found = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    for index in tl.static_range(len(ROWS.parts)):
        found += read_back_part(page_rows, offset, inside, lanes, ROWS, index)
    if sketch_ptr is not None:
        norm_ptr = (page_rows + ROWS.sign_norms).to(tl.pointer_type(tl.float16))
        norm = tl.load(norm_ptr + offset, mask=inside, other=0.0).to(tl.float32) * (SIGN_UNIT / D)
        sign_rows = page_rows + ROWS.signs + offset * (D // 8)
        residual = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
        # Rows of S at a time; unrolled, all of S would be kept in shared memory over the caller's loop.
        for begin in tl.range(0, BLOCK_D, 32, num_stages=1):
            of = begin + tl.arange(0, 32)
            bits = codes_by_lane(sign_rows, of, inside[:, None] & (of < D)[None, :], 1)
            sketch = tl.load(
                sketch_ptr + of[:, None] * D + lanes[None, :], mask=(of < D)[:, None] & (lanes < D)[None, :], other=0.0
            )
            residual = tl.dot((2 * bits - 1).to(tl.float16), sketch, residual)
        found += residual * norm[:, None]
    return found
