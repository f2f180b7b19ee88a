# SPDX-License-Identifier: Apache-2.0
"""Streaming moments and the rotations made of them, against float64."""

import pytest
import torch

from vllm_kvcompress.calibration.statistics import Moments, eigenbasis, rotation_of
from vllm_kvcompress.calibration.tap import Heads


def heads(length: int, group: int = 3, dim: int = 64) -> Heads:
    return Heads(
        5,
        torch.randn(2 * group, length, dim),
        torch.randn(2, length, dim),
        torch.randn(2, length, dim),
        0.1,
        None,
        None,
    )


def test_moments_are_sums_over_sequences():
    parts = [heads(40), heads(7), heads(23)]
    moments = Moments()
    for part in parts:
        moments(part)
    layer = moments.layers[5]
    assert layer.tokens == 70
    for head in range(2):
        query = torch.cat([part.query[3 * head : 3 * head + 3].flatten(0, 1) for part in parts]).double()
        key = torch.cat([part.key[head] for part in parts]).double()
        # float32 products of 40 x 3 rows of unit size: 120 * 2^-24 of sums near 120.
        assert torch.allclose(layer.query[head], query.mT @ query, rtol=1e-5, atol=1e-3)
        assert torch.allclose(layer.key_mean[head], key.mean(0), rtol=1e-5, atol=1e-6)
        value = torch.zeros(64, 64, dtype=torch.float64)
        for part in parts:
            q = part.query[3 * head : 3 * head + 3].flatten(0, 1).double()
            k, v = part.key[head].double(), part.value[head].double()
            weight = ((k @ (q.mT @ q)) * k).sum(-1)
            weight = weight / weight.sum() * len(weight)
            value += v.mT @ (v * weight.unsqueeze(-1))
        assert torch.allclose(layer.value[head], value, rtol=1e-4, atol=1e-3)


def test_channels_by_energy():
    """Keys about their mean: a bias is no outlier. Values by what they weigh."""
    moments = Moments()
    part = heads(60)
    part.key[0, :, 7] += 50
    part.key[1] *= torch.linspace(1, 5, 64)
    part.value[0] *= torch.linspace(5, 1, 64)
    moments(part)
    k_order, v_order = moments.layers[5].channels_by_energy()
    assert sorted(k_order[0]) == sorted(v_order[1]) == list(range(64))
    # 60 samples: standard deviations are off by 9 %, the 7th of 64 channels of unit size is no likelier than the next.
    key = torch.stack(list(part.key.double())).var(dim=1, correction=0)
    assert k_order == key.argsort(dim=-1, descending=True).tolist()
    assert set(k_order[1][:8]) <= set(range(40, 64)) and set(v_order[0][:8]) <= set(range(24))


@pytest.mark.parametrize("dim", [64, 96, 128])
def test_rotations_are_orthogonal_and_keep_the_leading_direction_in_the_mean(dim):
    x = torch.randn(2, 500, dim, dtype=torch.float64) * torch.logspace(0, -3, dim, dtype=torch.float64)
    x = x @ torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64))[0]
    covariance = x.mT @ x
    rotation = rotation_of(covariance)
    assert rotation.dtype == torch.float32
    wide = rotation.double()
    # float32 storage: each of dim products is 2^-24 relative off, 1e-6 in all.
    assert (wide.mT @ wide - torch.eye(dim, dtype=torch.float64)).abs().max() <= 1e-6
    if dim & (dim - 1) == 0:
        leading = eigenbasis(covariance)[1][..., 0]
        mean = (x @ wide).mean(-1) * dim**0.5
        assert torch.allclose(mean, (x @ leading.unsqueeze(-1)).squeeze(-1), atol=1e-4)


def test_rotated_channels_share_the_variance():
    x = torch.randn(1, 4000, 64, dtype=torch.float64) * torch.logspace(0, -2, 64, dtype=torch.float64)
    rotated = x @ rotation_of(x.mT @ x).double()
    variance = rotated.square().mean(1)
    # Every channel is the mean of all eigenvalues, exactly: |entries| of the Hadamard matrix are equal.
    assert torch.allclose(variance, variance.mean().expand_as(variance), rtol=1e-4)


def test_eigenvectors_have_one_sign():
    covariance = torch.randn(3, 64, 64, dtype=torch.float64)
    covariance = covariance @ covariance.mT
    values, vectors = eigenbasis(covariance)
    assert (values.diff(dim=-1) <= 0).all()
    picked = vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True))
    assert (picked > 0).all()
    assert torch.allclose(vectors @ torch.diag_embed(values) @ vectors.mT, covariance, atol=1e-9 * float(values.max()))


def test_nothing_attended_to_is_no_division_by_zero():
    empty = heads(10)
    moments = Moments()
    moments(Heads(5, torch.zeros_like(empty.query), empty.key, empty.value, 0.1, None, None))
    assert torch.isfinite(moments.layers[5].value).all()
    assert torch.isfinite(rotation_of(moments.layers[5].value)).all()
