# SPDX-License-Identifier: Apache-2.0
"""QJL: signs of random projections of a residual, for an unbiased estimate of its inner product with any query.

QJL (arXiv 2406.03482, section 3) takes sign(S k) and |k| of a key; TurboQuant (2504.19874, section 3.2) applies it to
what its quantiser of b - 1 bits has left over. For rows s of S from N(0, I),

    E[(s . q) sign(s . r)] = sqrt(2 / pi) (q . r) / |r|,

so sqrt(pi / 2) / m * |r| * (S q) . sign(S r) is unbiased over m rows, with variance (pi / 2 - rho^2) |q|^2 |r|^2 / m
where rho is the cosine between q and r. Orthogonal rows keep it unbiased, and at m = D leave only
(pi / 2 - 1 - rho^2 / 2) |q|^2 |r|^2 / D, up to terms of 1 / D^2: 2.75 times less for the small rho of most residuals.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch

from vllm_kvcompress.quantizers import packing
from vllm_kvcompress.quantizers.lloyd_max import saturated_half, split_norm

# Keeps these draws apart from those of other modules that are given the same seed.
_STREAM = 0x716A6C


@functools.cache
def sketch_matrix(dim: int, seed: int, orthogonal: bool = False) -> torch.Tensor:
    """S [dim, dim] float32.

    Entries are independent N(0, 1) from numpy's RandomState, whose streams are frozen (NEP 19) where torch's may change
    with its version.

    Args:
        orthogonal: make the rows orthogonal, each of length E|s| = sqrt(2) Gamma((dim+1)/2) / Gamma(dim/2), the mean
            length of a Gaussian row. That is sqrt(dim) less 1/(4 dim) of it, and what makes the estimate exactly
            unbiased. The authors' code orthogonalises as well, with sqrt(dim).

    Raises:
        ValueError: dim is not a positive multiple of 8, or the seed is not in 0..2^32 - 1.
    """
    if dim <= 0 or dim % 8:
        raise ValueError(f"sketches need a positive multiple of 8 dimensions, got {dim}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be in 0..2^32 - 1, got {seed}")
    matrix = torch.from_numpy(np.random.RandomState([_STREAM, seed]).standard_normal((dim, dim)))
    if orthogonal:
        q, r = torch.linalg.qr(matrix)
        # With the signs of R's diagonal Q is Haar distributed.
        matrix = q * r.diagonal().sign() * math.sqrt(2) * math.exp(math.lgamma((dim + 1) / 2) - math.lgamma(dim / 2))
    return matrix.float().contiguous()  # QR leaves columns side by side, kernels read rows


def sketch(residual: torch.Tensor, matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Signs and norm of residuals.

    Args:
        residual: [..., D] float. Input that is not finite is the caller's error and is not hidden: its norm is NaN.
        matrix: S [m, D] float32, m a multiple of 8.

    Returns:
        bits [..., m/8] uint8, set where (S r)_i >= 0, and |r| [...] float16, which saturates.
    """
    unit, norm = split_norm(residual)
    return packing.pack_bits((unit @ matrix.mT >= 0).to(torch.uint8), 1), saturated_half(norm)


def dequantize(bits: torch.Tensor, norm: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """The vectors that stand for the residuals: q times one of them is `correction` of q.

    Args:
        bits: [..., m/8] uint8 and norm [...] float16 as of `sketch`; matrix: S [m, D] float32.

    Returns:
        [..., D] float32: sqrt(pi / 2) / m * |r| * S^T sign(S r).
    """
    signs = packing.unpack_bits(bits, 1).float() * 2 - 1
    return signs @ matrix * (norm.float() * (math.sqrt(math.pi / 2) / matrix.shape[0])).unsqueeze(-1)


def correction(queries: torch.Tensor, matrix: torch.Tensor, bits: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
    """Unbiased estimates of q . r from sketches.

    Args:
        queries: [..., D] float.
        matrix: S [m, D] float32 of the sketches.
        bits: [..., N, m/8] uint8 and norm [..., N] float16 as of `sketch`; leading dimensions broadcast against those
            of the queries.

    Returns:
        [..., N] float32: sqrt(pi / 2) / m * |r| * (S q) . sign(S r).
    """
    projected = queries.float() @ matrix.mT
    signs = packing.unpack_bits(bits, 1).float() * 2 - 1
    dots = (signs @ projected.unsqueeze(-1)).squeeze(-1)
    return math.sqrt(math.pi / 2) / matrix.shape[0] * norm.float() * dots
