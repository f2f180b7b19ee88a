# SPDX-License-Identifier: Apache-2.0
"""Hadamard matrices and bit reversal."""

import pytest
import torch

from vllm_kvcompress.quantizers.hadamard import bit_reversal, hadamard


@pytest.mark.parametrize("dim", [1, 2, 64, 96, 128, 256])
def test_orthonormal(dim):
    matrix = hadamard(dim).double()
    # Entries carry float32 rounding of 2^-24 relative; a dot product of dim of them at most 2^-23.
    assert (matrix.mT @ matrix - torch.eye(dim, dtype=torch.float64)).abs().max() <= 1e-6


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_flat_entries_and_constant_first_row(dim):
    matrix = hadamard(dim)
    assert torch.allclose(matrix.abs(), torch.full_like(matrix, dim**-0.5), rtol=1e-6, atol=0)
    # The quantiser's exact mean rests on this row: it stores the leading eigenvector's coordinate.
    assert (matrix[0] > 0).all()


@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_bit_reversal_is_an_involution(dim):
    order = bit_reversal(dim)
    assert sorted(order.tolist()) == list(range(dim))
    assert torch.equal(order[order], torch.arange(dim))


def test_bad_size():
    with pytest.raises(ValueError, match="positive"):
        hadamard(0)
