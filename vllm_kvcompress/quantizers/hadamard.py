# SPDX-License-Identifier: Apache-2.0
"""Orthonormal Hadamard matrices and the bit-reversal permutation of OSCAR's R = eigenvectors x H x P."""

from __future__ import annotations

import functools

import torch


@functools.cache
def hadamard(dim: int) -> torch.Tensor:
    """Orthonormal [dim, dim] float32 with all |entries| equal to 1/sqrt(dim), or block-diagonal where none is known.

    Powers of two use Sylvester's construction; dim = 3 * 2^k (96) uses the largest power-of-two factor in blocks,
    rotated across blocks by an orthonormal 3-point DCT so that no channel stays alone.

    Raises:
        ValueError: dim is not positive.
    """
    if dim <= 0:
        raise ValueError(f"Hadamard size must be positive, got {dim}")
    power = dim & -dim
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < power:
        matrix = torch.kron(matrix, torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64))
    odd = dim // power
    if odd > 1:
        n = torch.arange(odd, dtype=torch.float64)
        dct = torch.cos(torch.pi / odd * (n + 0.5)[:, None] * n[None, :])
        dct /= dct.norm(dim=0, keepdim=True)
        matrix = torch.kron(dct, matrix)
    return (matrix / power**0.5).float()


def bit_reversal(dim: int) -> torch.Tensor:
    """[dim] int64 permutation: index i goes to the reversal of its bits (identity on the odd factor's blocks)."""
    power = dim & -dim
    bits = power.bit_length() - 1
    reversed_low = [int(format(i, f"0{bits}b")[::-1], 2) if bits else 0 for i in range(power)]
    return torch.tensor([block * power + low for block in range(dim // power) for low in reversed_low])
