# SPDX-License-Identifier: Apache-2.0
"""The 2-bit quantiser against its own promises, in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_kvcompress.quantizers import affine

FP16_MAX = 65504.0


def rows(seed: int, heads: int, dim: int, spread: float, offset: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(5, heads, dim, generator=generator) * spread + offset


def half_ulp(value: torch.Tensor) -> torch.Tensor:
    """Largest rounding error of a number of that size in fp16: 2^-11 of it, or 2^-25 below the normal range."""
    return value.double().abs() * 2.0**-11 + 2.0**-25


def round_trip(x: torch.Tensor, clip: torch.Tensor | float | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    codes, scale, zero = affine.quantize(x, clip)
    assert codes.dtype == torch.uint8 and scale.dtype == zero.dtype == torch.float16
    assert int(codes.max()) <= 3
    read = affine.dequantize(codes, scale, zero)
    assert torch.isfinite(read).all()
    return read.double(), scale.double(), zero.double()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    dim=st.sampled_from([64, 96, 128, 256]),
    spread=st.floats(1e-3, 1e3),
    offset=st.floats(-100, 100),
)
def test_error_of_every_element_is_bounded(seed, dim, spread, offset):
    x = rows(seed, 2, dim, spread, offset)
    read, scale, zero = round_trip(x, None)
    # Each code is within scale / 2 of its element before the zero-point moves by the mean of those errors, itself at
    # most scale / 2. The fp16 scale may be short by half an ulp over the 1.5 steps from the middle, and float32
    # arithmetic on offset rows adds 2^-20 of the largest magnitude (a few operations of 2^-24 each).
    bound = scale + 3 * half_ulp(scale) + half_ulp(zero) + x.double().abs().amax(-1) * 2.0**-20
    assert ((read - x.double()).abs() <= bound.unsqueeze(-1)).all()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    dim=st.sampled_from([64, 96, 128, 256]),
    spread=st.floats(1e-3, 1e3),
    offset=st.floats(-100, 100),
    clip=st.floats(0.3, 1.0),
)
def test_mean_of_a_row_is_kept(seed, dim, spread, offset, clip):
    x = rows(seed, 2, dim, spread, offset)
    read, _, zero = round_trip(x, clip)
    # Only the rounding of zero to fp16 and of float32 means (2^-24 an addition, at most dim of them) is left.
    bound = half_ulp(zero) + x.double().abs().amax(-1) * dim * 2.0**-23
    assert ((read.mean(-1) - x.double().mean(-1)).abs() <= bound).all()


def test_matches_a_float64_reference():
    x = rows(torch.seed() % 2**31, 4, 128, 2.0, 0.5)
    clip = torch.tensor([1.0, 0.9, 0.8, 0.6])
    codes, scale, zero = affine.quantize(x, clip)
    wide = x.double()
    low, high = wide.amin(-1), wide.amax(-1)
    step = ((high - low) * clip.double() / 3).float().half().double()
    position = (wide - (low + high).unsqueeze(-1) / 2) / step.unsqueeze(-1) + 1.5
    expected = position.round().clamp(0, 3)
    # Elements within 1e-4 steps of a threshold may round either way in float32.
    sure = ((position - position.floor()) - 0.5).abs() > 1e-4
    assert torch.equal(codes.double()[sure], expected[sure])
    # A scale at a rounding boundary may land on the neighbour.
    assert ((scale.double() - step).abs() <= 2 * half_ulp(step)).all()
    reference_zero = wide.mean(-1) - scale.double() * codes.double().mean(-1)
    assert ((zero.double() - reference_zero).abs() <= half_ulp(reference_zero) + 1e-5).all()


def test_leading_hadamard_direction_survives():
    """The point of the exact mean: along the first Hadamard row the error is only that of rounding zero."""
    from vllm_kvcompress.quantizers.hadamard import hadamard

    dim = 64
    x = rows(torch.seed() % 2**31, 3, dim, 1.0, 0.0)
    rotation = hadamard(dim)
    read, _, zero = round_trip(x @ rotation, 0.8)
    lost = ((read - (x @ rotation).double()) @ rotation.double().mT)[..., 0]
    # sqrt(D) * |mean error|; see test_mean_of_a_row_is_kept.
    assert (lost.abs() <= math.sqrt(dim) * (half_ulp(zero) + 1e-4)).all()


@pytest.mark.parametrize("value", [0.0, 0.1, -3.7, 1e-7, 60000.0])
def test_constant_rows_are_exact_to_fp16(value):
    x = torch.full((2, 3, 64), value)
    read, scale, _ = round_trip(x, 0.8)
    assert (scale == 0).all()
    assert torch.equal(read.float(), x.half().float())


@pytest.mark.parametrize("magnitude", [65504.0, 1e6, 3e38])
def test_large_values_saturate(magnitude):
    x = torch.full((1, 2, 64), magnitude)
    x[..., ::3] = -magnitude
    read, _, _ = round_trip(x, 1.0)
    expected = x.clamp(-FP16_MAX, FP16_MAX).double()
    # The stored scale is 43680 (65504 * 2 / 3 to fp16), which spans 131040 of 131008; the zero's ulp is 32 up there.
    assert ((read - expected).abs() <= 64).all()


@settings(max_examples=40, deadline=None)
@given(exponents=st.lists(st.integers(-149, 127), min_size=64, max_size=64), seed=st.integers(0, 2**31))
def test_never_nan_from_finite_input(exponents, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.ldexp(torch.rand(64, generator=generator) * 2 - 1, torch.tensor(exponents)).view(1, 1, 64)
    for clip in (None, 0.7, torch.tensor([0.9])):
        round_trip(x, clip)


def test_clip_is_per_head():
    x = rows(torch.seed() % 2**31, 3, 64, 1.0, 0.0)
    clip = torch.tensor([1.0, 0.8, 0.5])
    together = affine.quantize(x, clip)
    for head in range(3):
        alone = affine.quantize(x[:, head : head + 1], float(clip[head]))
        for all_heads, one in zip(together, alone, strict=True):
            assert torch.equal(all_heads[:, head : head + 1], one)


def test_bfloat16_input_is_read_as_it_is():
    x = rows(torch.seed() % 2**31, 2, 64, 1.0, 0.0).bfloat16()
    for a, b in zip(affine.quantize(x, 0.8), affine.quantize(x.float(), 0.8), strict=True):
        assert torch.equal(a, b)


def test_input_is_not_modified():
    x = rows(torch.seed() % 2**31, 2, 64, 1e6, 0.0)
    before = x.clone()
    affine.quantize(x, 0.8)
    assert torch.equal(x, before)
