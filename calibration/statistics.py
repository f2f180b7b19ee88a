# SPDX-License-Identifier: Apache-2.0
"""First pass: streaming second moments per layer and KV head, and the rotations they give.

R = eigenvectors (descending) x Hadamard x bit-reversal, after OSCAR (arXiv 2605.17757):
- keys: eigenvectors of the query covariance, summed over the query heads that share the KV head;
- values: eigenvectors of the value covariance weighted by what attention does with each value.

The Hadamard matrix spreads each eigenvector evenly over the channels, so one scale fits them all. Its first row is
constant, hence the leading eigenvector becomes the mean of the rotated channels, which the zero-point stores nearly
exactly: the order of the eigenvectors matters.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from vllm_kvcompress.calibration.tap import Heads
from vllm_kvcompress.quantizers.hadamard import bit_reversal, hadamard


@dataclass
class LayerMoments:
    """Sums over tokens of one layer, all float64; H KV heads of size D."""

    query: torch.Tensor
    """[H, D, D] sum of q^T q over the group's heads"""
    value: torch.Tensor
    """[H, D, D] sum of w v^T v"""
    key: torch.Tensor
    """[H, D, D] sum of k^T k, for the report"""
    key_sum: torch.Tensor
    """[H, D]"""
    tokens: int = 0

    @property
    def key_mean(self) -> torch.Tensor:
        """[H, D] float64"""
        return self.key_sum / max(self.tokens, 1)

    def channels_by_energy(self) -> tuple[list[list[int]], list[list[int]]]:
        """[H][D] channels of the keys and of the values by falling energy: keys about their mean, values weighted."""
        key = self.key.diagonal(dim1=-2, dim2=-1) / max(self.tokens, 1) - self.key_mean.square()
        value = self.value.diagonal(dim1=-2, dim2=-1)
        k_order, v_order = (x.argsort(dim=-1, descending=True, stable=True).tolist() for x in (key, value))
        return k_order, v_order


@dataclass
class Moments:
    """A listener (see `tap`) that adds up what passes; its size depends on the model only."""

    layers: dict[int, LayerMoments] = field(default_factory=dict)
    num_query_heads: dict[int, int] = field(default_factory=dict)

    def __call__(self, heads: Heads) -> None:
        key, value = heads.key.float(), heads.value.float()
        query = heads.grouped_query()
        num_heads, length, dim = key.shape
        layer = self.layers.get(heads.layer_id)
        if layer is None:
            zeros = torch.zeros(num_heads, dim, dim, dtype=torch.float64)
            layer = LayerMoments(zeros, zeros.clone(), zeros.clone(), torch.zeros(num_heads, dim, dtype=torch.float64))
            self.layers[heads.layer_id] = layer
            self.num_query_heads[heads.layer_id] = heads.query.shape[0]
        flat = query.flatten(1, 2)
        covariance = flat.mT @ flat
        # OSCAR's weight of a value: the squared scores its key draws, summed over queries: k (Q^T Q) k^T.
        weight = ((key @ covariance) * key).sum(-1).clamp(min=0)
        total = weight.sum(-1, keepdim=True)
        # A head that no query reads weighs its values alike.
        weight = torch.where(total > 0, weight / total * length, 1.0)
        layer.query += covariance.double().cpu()
        layer.value += ((value * weight.unsqueeze(-1)).mT @ value).double().cpu()
        layer.key += (key.mT @ key).double().cpu()
        layer.key_sum += key.double().sum(1).cpu()
        layer.tokens += length


def eigenbasis(covariance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eigenvalues and eigenvectors of [..., D, D] symmetric matrices, descending, float64.

    The sign of an eigenvector is free; its largest component is made positive, so that files do not depend on LAPACK.
    """
    values, vectors = torch.linalg.eigh(covariance.double())
    values, vectors = values.flip(-1), vectors.flip(-1)
    largest = vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True))
    return values.clamp(min=0), vectors * torch.where(largest < 0, -1.0, 1.0)


def rotation_of(covariance: torch.Tensor) -> torch.Tensor:
    """[H, D, D] covariances -> [H, D, D] float32 rotations: eigenvectors x Hadamard x bit-reversal."""
    dim = covariance.shape[-1]
    mixed = eigenbasis(covariance)[1] @ hadamard(dim).double()
    return mixed[..., bit_reversal(dim)].float()
