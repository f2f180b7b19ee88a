# SPDX-License-Identifier: Apache-2.0
"""Lloyd-Max codebooks against the density they are optimal for, published tables and rate-distortion theory.

Statistical tests draw fresh seeds and allow 4 standard errors of a mean of thousands of independent rows: a false
alarm in 16,000.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_kvcompress.quantizers import lloyd_max

FP16_MAX = 65504.0
BITS = [1, 2, 3, 4]
# Squared error of the Lloyd-Max quantiser of N(0, 1): the limit of many dimensions.
GAUSSIAN_ERROR = {1: 0.363, 2: 0.117, 3: 0.0345, 4: 0.0095}
GAUSSIAN_LEVELS = {
    1: [0.7979],
    2: [0.4528, 1.5104],
    3: [0.2451, 0.7560, 1.3439, 2.1520],
    4: [0.1284, 0.3881, 0.6568, 0.9424, 1.2562, 1.6181, 2.0690, 2.7326],
}


def unit_rows(count: int, dim: int) -> torch.Tensor:
    """[count, dim] float32 uniform on the sphere, from a fresh seed."""
    generator = torch.Generator().manual_seed(torch.seed() % 2**31)
    return torch.nn.functional.normalize(torch.randn(count, dim, generator=generator), dim=-1)


def mean_and_error(samples: torch.Tensor) -> tuple[float, float]:
    """Mean of independent samples and 4 standard errors of it."""
    samples = samples.double()
    return float(samples.mean()), 4 * float(samples.std()) / samples.numel() ** 0.5


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", [8, 9, 32, 96, 128, 256])
def test_optimal_for_the_density(dim, bits):
    """By plain sums over a fine grid: levels are centroids of their cells, and the error is the one claimed."""
    levels = lloyd_max.codebook(dim, bits)
    assert levels.dtype == torch.float32 and levels.shape == (2**bits,)
    assert (levels.diff() > 0).all() and torch.equal(levels, -levels.flip(0))
    steps = 200_000
    t = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps * 2 - 1
    density = (1 - t * t) ** ((dim - 3) / 2)
    density /= density.sum()
    cell = torch.bucketize(t, (levels[1:] + levels[:-1]).double() / 2)
    mass = torch.zeros(2**bits, dtype=torch.float64).index_add(0, cell, density)
    centroids = torch.zeros(2**bits, dtype=torch.float64).index_add(0, cell, density * t) / mass
    # A cell of the grid that straddles a boundary is misplaced as a whole: 1e-5 wide, of a cell at least 0.01 wide.
    assert ((centroids - levels.double()).abs() <= 1e-5).all()
    error = dim * float((density * (t - levels.double()[cell]) ** 2).sum())
    assert error == pytest.approx(lloyd_max.distortion(levels, dim), rel=1e-6)


@pytest.mark.parametrize("bits", BITS)
def test_published_levels_at_many_dimensions(bits):
    dim = 2**17
    positive = lloyd_max.codebook(dim, bits)[2 ** (bits - 1) :].double() * dim**0.5
    # Half a unit of the fourth decimal for the table, as much for float32 and for the 1/d between sphere and normal.
    assert (positive - torch.tensor(GAUSSIAN_LEVELS[bits], dtype=torch.float64)).abs().max() <= 1e-4


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", [128, 1024])
def test_published_errors(dim, bits):
    # At d dimensions the error is below the normal limit by c/d of it with c = 0.9 to 2.5 for 1 to 4 bits (a sphere's
    # coordinates have lighter tails); the table is rounded by at most 0.4 %, of 0.117.
    error = lloyd_max.distortion(lloyd_max.codebook(dim, bits), dim)
    assert -3 / dim - 0.004 <= error / GAUSSIAN_ERROR[bits] - 1 <= 0.005


@pytest.mark.parametrize("norm_correction", [False, True])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", [96, 128])
def test_measured_error_on_the_sphere(dim, bits, norm_correction):
    x = unit_rows(4000, dim)
    read = lloyd_max.dequantize(*lloyd_max.quantize(x, bits, norm_correction), bits)
    error, slack = mean_and_error((read - x).double().square().sum(-1))
    expected = lloyd_max.distortion(lloyd_max.levels(dim, bits), dim)
    if norm_correction:
        # Of <x, x_hat> = |x_hat|^2 = 1 - D on average, the rescaled row has the error 2 - 2 sqrt(1 - D), less the
        # spread of |x_hat| between rows: measured 0.0, 0.8, 1.7, 2.3 times 1/d of it for 1 to 4 bits.
        expected, slack = 2 - 2 * math.sqrt(1 - expected), slack + 3 * expected / dim
    # fp16 rounding of the norm moves a row by at most 2^-11, across the error: its square is added.
    assert abs(error - expected) <= slack + 2.0**-22
    # No code of b bits a coordinate can have less than 4^-b, whatever its decoder (TurboQuant, theorem 3).
    assert error >= 4.0**-bits


@pytest.mark.parametrize("bits", BITS)
def test_inner_products_are_biased(bits):
    """Why TurboQuant has a second variant: rows read back are shorter, along x by the squared error."""
    x = unit_rows(4000, 128)
    read = lloyd_max.dequantize(*lloyd_max.quantize(x, bits, norm_correction=False), bits)
    mean, slack = mean_and_error((read * x).sum(-1))
    bias = lloyd_max.distortion(lloyd_max.levels(128, bits), 128)
    # The mean of 4000 fp16 roundings of at most 2^-11 of |x| = 1, which 16 bits hold exactly in most rows.
    assert abs(mean - (1 - bias)) <= slack + 2.0**-11
    assert mean < 1 - bias / 2


def test_split_of_channels():
    """2.5 bits as 32 channels at 3 bits and 96 at 2: each subset has the error of its own dimension."""
    x = unit_rows(4000, 128) * 7
    for part, bits in ((x[:, :32], 3), (x[:, 32:], 2)):
        dim = part.shape[-1]
        read = lloyd_max.dequantize(*lloyd_max.quantize(part, bits, norm_correction=False), bits)
        error, slack = mean_and_error((read - part).double().square().sum(-1) / part.double().square().sum(-1))
        assert abs(error - lloyd_max.distortion(lloyd_max.levels(dim, bits), dim)) <= slack + 2.0**-22


@pytest.mark.parametrize("dim", [8, 32, 48, 64, 96, 128, 256, 1024])
@pytest.mark.parametrize("bits", BITS)
def test_cubic_levels(dim, bits):
    a, b = lloyd_max.cubic(dim, bits)
    t = torch.arange(2**bits, dtype=torch.float64) - (2**bits - 1) / 2
    levels = lloyd_max.levels(dim, bits)
    # fp16: 2^-11 of the result, and twice that of the bend, which is less than a third of it.
    torch.testing.assert_close(levels.double(), a * t * (1 + b * t * t), rtol=2.0**-11 + 2.0**-10 / 3, atol=0)
    assert (levels.diff() > 0).all() and torch.equal(levels, -levels.flip(0))
    if bits <= 2:
        assert (b == 0.0) == (bits == 1)
        torch.testing.assert_close(levels, lloyd_max.codebook(dim, bits), rtol=2.0**-11 + 2.0**-10 / 3, atol=0)
    excess = lloyd_max.distortion(levels, dim) / lloyd_max.distortion(lloyd_max.codebook(dim, bits), dim) - 1
    # The rounding to fp16 costs nothing to first order, its square to second: at most (8.2e-4)^2 of the variance, over
    # errors of 0.11, 0.033 and 0.0091 of it. Float64 sums of 1 - ... leave 1e-16 of 0.007.
    assert -1e-12 <= excess <= {1: 1e-12, 2: 1e-5, 3: 2.2e-3 + 3e-5, 4: 2e-2 + 8e-5}[bits]


@pytest.mark.parametrize("bits", [3, 4])
def test_cubic_has_the_least_error(bits):
    dim = 128
    t = torch.arange(2**bits, dtype=torch.float64) - (2**bits - 1) / 2
    powers = torch.stack([t, t**3])
    a, b = lloyd_max.cubic(dim, bits)
    coefficients = torch.tensor([a, a * b], dtype=torch.float64)
    least = lloyd_max.distortion(coefficients @ powers, dim)
    generator = torch.Generator().manual_seed(torch.seed() % 2**31)
    for size in (1e-4, 1e-3, 1e-2):
        for _ in range(30):
            # Each power by a share of the outermost level.
            moved = torch.randn(2, generator=generator, dtype=torch.float64) * size / powers[:, -1] * 0.2
            assert lloyd_max.distortion((coefficients + moved) @ powers, dim) >= least - 1e-14


@pytest.mark.parametrize("bits", BITS)
def test_codes_are_the_nearest_levels(bits):
    x = unit_rows(100, 128).view(4, 25, 128) * 3
    codes, norm = lloyd_max.quantize(x, bits, norm_correction=False)
    assert codes.dtype == torch.uint8 and codes.shape == x.shape and int(codes.max()) < 2**bits
    assert norm.dtype == torch.float16 and norm.shape == (4, 25)
    unit = x.double() / x.double().norm(dim=-1, keepdim=True)
    distances = (unit.unsqueeze(-1) - lloyd_max.levels(128, bits).double()).abs()
    chosen = distances.gather(-1, codes.long().unsqueeze(-1)).squeeze(-1)
    # float32 arithmetic on coordinates below 1: a few roundings of 2^-24.
    assert (chosen <= distances.amin(-1) + 1e-6).all()
    assert ((norm.double() - x.double().norm(dim=-1)).abs() <= 3 * 2.0**-11).all()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), exponent=st.integers(-110, 120), bits=st.sampled_from(BITS))
def test_codes_do_not_depend_on_the_norm(seed, exponent, bits):
    """Not even where the norm overflows fp16 or float32: powers of two change no bit of x / |x|."""
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(seed))
    scaled = torch.ldexp(x, torch.tensor(exponent))
    codes, norm = lloyd_max.quantize(scaled, bits, norm_correction=False)
    assert torch.equal(codes, lloyd_max.quantize(x, bits)[0])
    expected = scaled.double().norm(dim=-1).clamp(max=FP16_MAX)
    # fp16 rounding, the last bits of a float32 norm, and half of fp16's smallest step.
    assert ((norm.double() - expected).abs() <= expected * (2.0**-11 + 2.0**-20) + 2.0**-25).all()
    assert torch.isfinite(lloyd_max.dequantize(codes, norm, bits)).all()


@settings(max_examples=40, deadline=None)
@given(exponents=st.lists(st.integers(-149, 127), min_size=64, max_size=64), seed=st.integers(0, 2**31))
def test_never_nan_from_finite_input(exponents, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.ldexp(torch.rand(64, generator=generator) * 2 - 1, torch.tensor(exponents)).view(1, 1, 64)
    for bits in BITS:
        for norm_correction in (False, True):
            assert torch.isfinite(lloyd_max.dequantize(*lloyd_max.quantize(x, bits, norm_correction), bits)).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", [64, 96, 128])
def test_norm_correction_keeps_the_norm(dim, bits):
    x = unit_rows(50, dim) * torch.logspace(-2, 4, 50).unsqueeze(-1)
    read = lloyd_max.dequantize(*lloyd_max.quantize(x, bits, norm_correction=True), bits)
    ratio = read.double().norm(dim=-1) / x.double().norm(dim=-1)
    # fp16 rounding of the stored norm, all of them normal numbers, and float32 arithmetic.
    assert ((ratio - 1).abs() <= 2.0**-11 + 2.0**-18).all()
    # Only the norm differs: the codes are the same.
    assert torch.equal(lloyd_max.quantize(x, bits, False)[0], lloyd_max.quantize(x, bits, True)[0])


@pytest.mark.parametrize("norm_correction", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_zero_rows_read_back_as_zero(bits, norm_correction):
    x = unit_rows(3, 64)
    x[1] = 0
    codes, norm = lloyd_max.quantize(x, bits, norm_correction)
    assert float(norm[1]) == 0 and float(norm[0]) > 0
    assert torch.equal(lloyd_max.dequantize(codes, norm, bits)[1], torch.zeros(64))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("norm_correction", [False, True])
def test_input_that_is_not_finite_is_not_hidden(value, norm_correction):
    x = unit_rows(2, 64)
    x[1, 7] = value
    _, norm = lloyd_max.quantize(x, 2, norm_correction)
    assert torch.isnan(norm[1]) and torch.isfinite(norm[0])


def test_bfloat16_input_is_read_as_it_is_and_not_modified():
    x = (unit_rows(5, 64) * 1e6).bfloat16()
    before = x.clone()
    for a, b in zip(lloyd_max.quantize(x, 3), lloyd_max.quantize(x.float(), 3), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(x, before)


@pytest.mark.parametrize("lead", [(), (0,), (3, 0, 2), (3, 1, 5)])
def test_batch_shapes(lead):
    codes, norm = lloyd_max.quantize(torch.ones(*lead, 8), 2)
    assert codes.shape == (*lead, 8) and norm.shape == lead
    assert lloyd_max.dequantize(codes, norm, 2).shape == (*lead, 8)


def test_first_use_in_inference_mode():
    with torch.inference_mode():
        assert torch.isfinite(lloyd_max.codebook(40, 4)).all()
        assert all(math.isfinite(value) for value in lloyd_max.cubic(40, 4))


@pytest.mark.parametrize("function", [lloyd_max.codebook, lloyd_max.boundaries, lloyd_max.cubic])
def test_refusals(function):
    with pytest.raises(ValueError, match="at least 8 dimensions, got 7"):
        function(7, 2)
    for bits in (0, 5):
        with pytest.raises(ValueError, match="1 to 4 bits"):
            function(64, bits)
