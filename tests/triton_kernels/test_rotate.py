# SPDX-License-Identifier: Apache-2.0
"""The rotation kernel against float64 products of the same fp16 operands."""

import pytest
import torch

from vllm_kvcompress.formats.base import SUPPORTED_HEAD_DIMS
from vllm_kvcompress.triton_kernels.rotate import rotate

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
FP16_MAX = 65504.0


def random_rotation(heads, dim, device):
    return torch.linalg.qr(torch.randn(heads, dim, dim))[0].half().contiguous().to(device)


def reference(x, rotation):
    """[T, Hq, D] float64 from x rounded to fp16, and the norms [T, Hq, 1] of its rows."""
    x = x.cpu().float().clamp(-FP16_MAX, FP16_MAX).half().double()
    r = rotation.cpu().double().repeat_interleave(x.shape[1] // rotation.shape[0], dim=0)
    return torch.einsum("thd,hde->the", x, r), x.norm(dim=-1, keepdim=True)


def half_ulp(value, dtype, interpreted):
    """Largest rounding error of a float64 stored as dtype."""
    bits = {torch.float16: 11, torch.bfloat16: 8, torch.float32: 24}[dtype]
    # Triton's interpreter truncates to bfloat16, a GPU rounds to nearest.
    bits -= dtype == torch.bfloat16 and interpreted
    # 2^-25: half the distance of fp16's subnormals.
    return value.abs() * 2.0**-bits + 2.0**-25


def assert_rotated(out, x, rotation):
    expected, norm = reference(x, rotation)
    out = out.cpu()
    assert torch.isfinite(out).all()
    # D additions, each off by at most 2^-24 (a tensor core truncates: 2^-23) of a partial sum, at most |x| |r|, and |r|
    # is 1 up to fp16 rounding.
    bound = half_ulp(expected, out.dtype, x.device.type == "cpu") + x.shape[2] * 2.0**-23 * norm
    assert ((out.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("dim", SUPPORTED_HEAD_DIMS)
@pytest.mark.parametrize("group", [1, 3, 4, 7])
def test_groups_and_head_sizes(dim, group, device):
    x = torch.randn(11, 2 * group, dim).to(device)
    rotation = random_rotation(2, dim, device)
    out = torch.full(x.shape, torch.nan, dtype=torch.float32, device=device)
    rotate(x, rotation, out)
    assert_rotated(out, x, rotation)


@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("out_dtype", DTYPES)
def test_dtypes(x_dtype, out_dtype, device):
    x = torch.randn(5, 4, 64).to(x_dtype).to(device)
    rotation = random_rotation(2, 64, device)
    out = torch.full(x.shape, torch.nan, dtype=out_dtype, device=device)
    rotate(x, rotation, out)
    assert_rotated(out, x, rotation)


@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("out_dtype", DTYPES)
def test_without_a_rotation_only_casts(x_dtype, out_dtype, device):
    x = torch.randn(5, 4, 64).to(x_dtype).to(device)
    out = torch.full(x.shape, torch.nan, dtype=out_dtype, device=device)
    rotate(x, None, out)
    if out_dtype in (x_dtype, torch.float32):
        assert torch.equal(out.cpu(), x.cpu().to(out_dtype))
    exact = x.cpu().double()
    assert ((out.cpu().double() - exact).abs() <= half_ulp(exact, out_dtype, device.type == "cpu")).all()


def test_many_rows_and_strided_views(device):
    """Queries are a slice of a fused projection; more than 512 rows of a head take the larger tile."""
    tokens, heads, dim = 230, 6, 64
    fused = torch.randn(tokens, heads * dim + 3 * dim).bfloat16().to(device)
    x = fused[:, dim : dim + heads * dim].view(tokens, heads, dim)
    rotation = random_rotation(2, dim, device)
    buffer = torch.full((tokens + 2, heads + 1, dim + 16), torch.nan, dtype=torch.float16, device=device)
    out = buffer[1:-1, :heads, :dim]
    rotate(x, rotation, out)
    assert_rotated(out, x, rotation)
    written = torch.zeros(buffer.shape, dtype=torch.bool)
    written[1:-1, :heads, :dim] = True
    assert torch.isnan(buffer.cpu()[~written]).all(), "only `out` is written"


def test_saturates(device):
    x = torch.full((2, 2, 64), 6e4).to(device)
    x[0] = 1e6
    rotation = random_rotation(1, 64, device)
    out = torch.full(x.shape, torch.nan, dtype=torch.float16, device=device)
    rotate(x, rotation, out)
    expected, norm = reference(x, rotation)
    assert expected.abs().max() > FP16_MAX, "some sums must be too large for this test to say anything"
    expected = expected.clamp(-FP16_MAX, FP16_MAX)
    bound = half_ulp(expected, torch.float16, False) + 64 * 2.0**-23 * norm
    assert ((out.cpu().double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotated", [True, False])
def test_broken_input_is_not_hidden(value, dtype, rotated, device):
    x = torch.randn(3, 2, 64).to(dtype).to(device)
    x[1, 0, 5] = value
    out = torch.zeros(x.shape, dtype=torch.float16, device=device)
    rotate(x, random_rotation(1, 64, device) if rotated else None, out)
    broken = torch.isnan(out.cpu())
    assert broken[1, 0].all() if rotated else broken[1, 0, 5]
    assert broken.sum() == (64 if rotated else 1)


def test_no_rows(device):
    x = torch.empty(0, 4, 64, device=device)
    rotate(x, random_rotation(2, 64, device), x.clone())


def test_refusals(device):
    x = torch.randn(3, 4, 64).to(device)
    good = random_rotation(2, 64, device)
    for rotation, out in (
        (good.float(), x.clone()),
        (good.mT, x.clone()),
        (random_rotation(3, 64, device), x.clone()),
        (good, x[:2].clone()),
        (good, x.mT.contiguous().mT),
    ):
        with pytest.raises(ValueError, match="rotat"):
            rotate(x, rotation, out)
