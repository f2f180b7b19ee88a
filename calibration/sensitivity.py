# SPDX-License-Identifier: Apache-2.0
"""Third pass: how much each layer's keys depend on distant context, for the budgets of token eviction.

After EpiCache (arXiv 2509.17396): the cosine between a layer's keys under full attention and under a mask that shows
only the sinks and the token's own and previous block. Here on a few sequences of the calibration text, blocks being an
eighth of one (the paper: one 16K text, windows of 4096 with half overlap, sinks 128). Stored is 1 - mean cosine, so the
paper's weight (1 - s)^alpha with min-max normalised s is minmax(sensitivity)^alpha.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm

from vllm_kvcompress.calibration.tap import Heads, attend, full_attention, listening
from vllm_kvcompress.episodic.policies import layer_sensitivity

MAX_SEQUENCES = 4
"""One alone ranks the layers by its own subject; each costs two forward passes."""


def block_mask(length: int, block: int, sinks: int, device: torch.device) -> torch.Tensor:
    """[T, T] bool: own block, previous block and sinks (causality is added elsewhere)."""
    blocks = torch.arange(length, device=device) // block
    near = (blocks[:, None] - blocks[None, :]).abs() <= 1
    return near | (torch.arange(length, device=device) < sinks)


def measure(model: Any, sequences: Sequence[torch.Tensor]) -> dict[int, float]:
    """Sensitivity of every layer with full attention: 0 = its keys are the same without distant context; at most 2.

    Args:
        sequences: [T] int64 each, at least one. `MAX_SEQUENCES` from all over them are read, and averaged over tokens.
    """
    count = min(MAX_SEQUENCES, len(sequences))
    chosen = [sequences[index * len(sequences) // count] for index in range(count)]
    total: dict[int, float] = {}
    tokens = 0
    with tqdm(total=sum(map(len, chosen)), desc="sensitivity", unit="tok") as bar:
        for ids in chosen:
            # Before the third block nothing is hidden, so those tokens say nothing.
            block = max(1, len(ids) // 8)
            first = min(2 * block, len(ids) - 1)
            for layer_id, found in _measure_one(model, ids, block, first).items():
                total[layer_id] = total.get(layer_id, 0.0) + found * (len(ids) - first)
            tokens += len(ids) - first
            bar.update(len(ids))
    return {layer_id: value / tokens for layer_id, value in total.items()}


def _measure_one(model: Any, ids: torch.Tensor, block: int, first: int) -> dict[int, float]:
    """Of the tokens [first, T) of a sequence [T] int64, whose keys of one pass are held in memory."""
    device = next(model.parameters()).device
    mask = block_mask(len(ids), block, sinks=max(1, len(ids) // 32), device=device)
    full: dict[int, torch.Tensor] = {}
    found: dict[int, float] = {}

    def remember(heads: Heads) -> None:
        full[heads.layer_id] = heads.key[:, first:].clone()

    def compare(heads: Heads) -> torch.Tensor:
        found[heads.layer_id] = layer_sensitivity(full.pop(heads.layer_id), heads.key[:, first:])
        return attend(heads, mask)

    for listener in (remember, compare):
        with torch.inference_mode(), listening(full_attention(listener)):
            model.base_model(input_ids=ids.unsqueeze(0).to(device), use_cache=False)
    return found
