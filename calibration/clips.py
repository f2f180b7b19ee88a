# SPDX-License-Identifier: Apache-2.0
"""Second pass: the clip of each layer and KV head with the least error of the attention output on held-back text.

What decoding sees is imitated: for each sampled query, tokens behind the recent window and past the sinks are read
quantised, the rest exact. Keys and values are judged apart: keys by the output under quantised scores and exact values,
values by the output under exact scores. All in the cache's rotated space, where distances are those of the model.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from vllm_kvcompress.calibration.tap import Heads
from vllm_kvcompress.formats.base import PAGE_TOKENS
from vllm_kvcompress.quantizers import affine
from vllm_kvcompress.rotations import LayerRotation

GRID = (1.0, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65)
"""Shares of a row's range; least squares takes about 0.65, attention asks more room for large channels."""
PRIOR_SEQUENCES = 2
"""How many sequences the curve of the whole model counts for when a head's clip is chosen: a few held-back sequences
alone would fit each head to their noise."""
QUERIES = 96
"""Queries sampled per sequence: the error is an average, so a sample serves and large models stay affordable."""


@dataclass(frozen=True)
class Windows:
    """Tokens read exactly: the first `sinks` and the last `recent`."""

    sinks: int
    recent: int

    def fit(self, length: int) -> Windows:
        """The same, shrunk so that at least half of a short sequence is read quantised."""
        return Windows(min(self.sinks, length // 8), min(self.recent, length // 4))


@dataclass
class ClipErrors:
    """A listener (see `tap`) adding up squared output errors per layer, KV head and clip."""

    rotations: dict[int, LayerRotation]
    windows: Windows
    grid: tuple[float, ...] = GRID
    keys: dict[int, torch.Tensor] = field(default_factory=dict)
    """Layer id -> [len(grid), H] float64: squared error over squared norm of the exact output."""
    values: dict[int, torch.Tensor] = field(default_factory=dict)
    _counts: dict[int, int] = field(default_factory=dict)

    def __call__(self, heads: Heads) -> None:
        rotation = self.rotations[heads.layer_id]
        device = heads.key.device
        num_heads, length, _ = heads.key.shape
        windows = self.windows.fit(length)
        first = min(windows.sinks + windows.recent, length - 1)
        count = min(QUERIES, length - first)
        positions = torch.linspace(first, length - 1, count, device=device).long()
        tokens = torch.arange(length, device=device)
        visible = heads.visible(positions)
        # [Q, T]: read from a 2-bit page by the query at that position.
        stored = visible & (tokens >= windows.sinks) & (tokens <= positions[:, None] - windows.recent)

        k_rotation = rotation.k_rotation.to(device)
        key = heads.key.float() @ k_rotation
        means = _page_means(key)
        value = heads.value.float() @ rotation.v_rotation.to(device)
        query = heads.grouped_query(positions)
        rotated_query = query @ k_rotation.unsqueeze(1)

        def masked(scores: torch.Tensor) -> torch.Tensor:
            return scores.masked_fill(~visible, -torch.inf).softmax(-1)

        exact_scores = heads.scores(query, heads.key)
        weights = masked(exact_scores)
        exact = weights @ value.unsqueeze(1)
        norm = exact.double().square().sum((1, 2, 3)).clamp(min=1e-30)
        far_weights = weights * stored
        key_errors, value_errors = [], []
        for clip in self.grid:
            scores = heads.scores(rotated_query, _round_trip(key - means, clip) + means)
            output = masked(torch.where(stored, scores, exact_scores)) @ value.unsqueeze(1)
            key_errors.append((output - exact).double().square().sum((1, 2, 3)) / norm)
            lost = far_weights @ (_round_trip(value, clip) - value).unsqueeze(1)
            value_errors.append(lost.double().square().sum((1, 2, 3)) / norm)
        zeros = torch.zeros(len(self.grid), num_heads, dtype=torch.float64)
        self.keys[heads.layer_id] = self.keys.get(heads.layer_id, zeros) + torch.stack(key_errors).cpu()
        self.values[heads.layer_id] = self.values.get(heads.layer_id, zeros) + torch.stack(value_errors).cpu()
        self._counts[heads.layer_id] = self._counts.get(heads.layer_id, 0) + 1

    def mean(self, layer_id: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Relative squared errors of keys and values, averaged over sequences: two [len(grid), H] float64."""
        count = self._counts[layer_id]
        return self.keys[layer_id] / count, self.values[layer_id] / count

    def best(self) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """Layer id -> the clips of its keys and of its values, two [H] float32.

        Least log error of the head, averaged over its sequences and `PRIOR_SEQUENCES` of the model's average curve.
        """
        chosen = [self._choose(errors) for errors in (self.keys, self.values)]
        return {layer_id: (chosen[0][layer_id], chosen[1][layer_id]) for layer_id in self.keys}

    def _choose(self, errors: dict[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        curves = {layer_id: error.clamp(min=1e-30).log() for layer_id, error in errors.items()}
        model_curve = torch.cat(list(curves.values()), dim=1).mean(1, keepdim=True)
        grid = torch.tensor(self.grid)
        return {
            layer_id: grid[(self._counts[layer_id] * curve + PRIOR_SEQUENCES * model_curve).argmin(0)]
            for layer_id, curve in curves.items()
        }


def _page_means(key: torch.Tensor) -> torch.Tensor:
    """[H, T, D] -> [H, T, D]: of each token, the mean key of its page, in fp16 as pages store it.

    Pages are the default centring; a clip chosen with them serves the calibrated mean as well.
    """
    means = [page.mean(1, keepdim=True).expand_as(page) for page in key.split(PAGE_TOKENS, dim=1)]
    return torch.cat(means, dim=1).half().float()


def _round_trip(x: torch.Tensor, clip: float) -> torch.Tensor:
    return affine.dequantize(*affine.quantize(x, clip))
