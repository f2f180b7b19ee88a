# SPDX-License-Identifier: Apache-2.0
"""Random rotations: orthogonal, the same everywhere, and making rows look uniform on the sphere."""

import pytest
import torch

from vllm_kvcompress.quantizers import lloyd_max
from vllm_kvcompress.quantizers.random_rotation import random_rotation, split_rotation


@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("dim", [1, 2, 8, 64, 80, 96, 128, 256])
def test_orthogonal(dim, rounds):
    matrix = random_rotation(dim, torch.seed() % 2**31, rounds)
    assert matrix.dtype == torch.float32 and matrix.shape == (dim, dim)
    # Entries carry float32 rounding of 2^-24 relative; a dot product of dim of them at most 2^-23.
    wide = matrix.double()
    assert (wide.mT @ wide - torch.eye(dim, dtype=torch.float64)).abs().max() <= 1e-6


@pytest.mark.parametrize("dim", [64, 128])
def test_one_round_is_signs_and_hadamard(dim):
    matrix = random_rotation(dim, torch.seed() % 2**31)
    assert torch.allclose(matrix.abs(), torch.full_like(matrix, dim**-0.5), rtol=1e-6, atol=0)
    # Dividing the first column's signs out leaves a symmetric matrix: Sylvester's.
    sylvester = matrix.sign() * matrix[:, :1].sign()
    assert torch.equal(sylvester, sylvester.mT)


def error_ratios(row: torch.Tensor, bits: int, rounds: int, count: int) -> torch.Tensor:
    """[count] squared errors of one row under fresh rotations, relative to that of uniform unit vectors."""
    dim = row.shape[0]
    first = torch.seed() % 2**31
    # Past the cache, which would keep every matrix.
    rotated = torch.stack([row @ random_rotation.__wrapped__(dim, first + i, rounds) for i in range(count)])
    read = lloyd_max.dequantize(*lloyd_max.quantize(rotated, bits, norm_correction=False), bits)
    error = (read - rotated).double().square().sum(-1) / rotated.double().square().sum(-1)
    return error / lloyd_max.distortion(lloyd_max.levels(dim, bits), dim)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("dim", [96, 128])
def test_rows_with_outliers_get_the_error_of_uniform_ones(dim, bits):
    row = torch.randn(dim, generator=torch.Generator().manual_seed(torch.seed() % 2**31))
    row[3] = 10.0
    row[40] = -10.0
    ratios = error_ratios(row, bits, rounds=2, count=300)
    # 4 standard errors, a false alarm in 16,000; Haar matrices (96) have no bias at all, two rounds of signs (128) less
    # than 3 %.
    slack = 4 * float(ratios.std()) / ratios.numel() ** 0.5
    assert abs(float(ratios.mean()) - 1) <= slack + (0.03 if dim == 128 else 0.001)


def test_one_round_is_not_enough_for_rows_of_one_channel():
    """All coordinates become 1/sqrt(d), between the levels 0.45 and 1.51 of 2 bits."""
    row = torch.zeros(128)
    row[7] = 1.0
    assert (error_ratios(row, 2, rounds=1, count=3) > 2).all()
    # Measured 1.01 with a standard error of 0.01 over 100 rotations.
    assert abs(float(error_ratios(row, 2, rounds=2, count=100).mean()) - 1) <= 0.08


def test_gaussian_case_is_haar():
    """Without the sign fix LAPACK's reflections leave the first column's leading entry negative every time."""
    first = torch.seed() % 2**31
    leading = torch.stack([random_rotation.__wrapped__(12, first + i)[0, 0] for i in range(400)])
    # 400 fair signs: 4 standard deviations of their sum are 80.
    assert abs(int(leading.sign().sum())) <= 80


def test_rotations_do_not_change():
    """Pages outlive versions: the same seed gives the same rotation. numpy's RandomState is frozen."""
    assert random_rotation(8, 0)[:, 0].sign().tolist() == [1, 1, -1, -1, -1, 1, 1, -1]
    # The last bits of logarithms and of QR may differ between machines.
    row = random_rotation(12, 0)[0, :3]
    torch.testing.assert_close(row, torch.tensor([0.2782648, -0.4395298, -0.2170634]), rtol=1e-5, atol=1e-6)
    for dim in (12, 64):
        assert not torch.equal(random_rotation(dim, 0), random_rotation(dim, 1))


def test_refusals():
    for dim, rounds in ((0, 1), (-4, 1), (8, 0)):
        with pytest.raises(ValueError, match="positive"):
            random_rotation(dim, 0, rounds)
    for seed in (-1, 2**32):
        with pytest.raises(ValueError, match="seed"):
            random_rotation(8, seed)


@pytest.mark.parametrize("sizes", [(64,), (16, 48), (32, 32), (24, 72)])
def test_split_rotations_keep_groups_apart(sizes):
    dim = sum(sizes)
    order = torch.stack([torch.randperm(dim) for _ in range(3)])
    rotation = split_rotation(order, sizes, 5)
    assert rotation.shape == (3, dim, dim)
    torch.testing.assert_close(rotation.mT @ rotation, torch.eye(dim).expand(3, -1, -1), rtol=0, atol=1e-5)
    x = torch.randn(10, dim)
    for head in range(3):
        turned = (x @ rotation[head]).split(sizes, dim=-1)
        for channels, got in zip(order[head].split(sizes), turned, strict=True):
            # A rotation of the group's own channels: their lengths are kept, and nothing else comes in.
            torch.testing.assert_close(got.norm(dim=-1), x[:, channels].norm(dim=-1))
            silent = x.clone()
            silent[:, channels] = 0
            first = sum(sizes[: [c.tolist() for c in order[head].split(sizes)].index(channels.tolist())])
            part = (silent @ rotation[head])[:, first : first + len(channels)]
            assert part.abs().max() < 1e-6
    if len(sizes) > 1:
        assert not torch.equal(*(split_rotation(order[:1], sizes, seed) for seed in (5, 6)))
