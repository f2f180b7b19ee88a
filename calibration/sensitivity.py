# SPDX-License-Identifier: Apache-2.0
"""Third pass: how much each layer's keys depend on distant context, for the budgets of token eviction.

After EpiCache (arXiv 2509.17396): the cosine between a layer's keys under full attention and under a mask that shows
only the sinks and the token's own and previous block. Here on one sequence of the calibration text with blocks of an
eighth of it (the paper: one 16K text, windows of 4096 with half overlap, sinks 128). Stored is 1 - mean cosine, so the
paper's weight (1 - s)^alpha with min-max normalised s is minmax(sensitivity)^alpha.
"""

from __future__ import annotations

from typing import Any

import torch

from vllm_kvcompress.calibration.tap import Heads, attend, full_attention, listening
from vllm_kvcompress.episodic.policies import layer_sensitivity


def block_mask(length: int, block: int, sinks: int, device: torch.device) -> torch.Tensor:
    """[T, T] bool: own block, previous block and sinks (causality is added elsewhere)."""
    blocks = torch.arange(length, device=device) // block
    near = (blocks[:, None] - blocks[None, :]).abs() <= 1
    return near | (torch.arange(length, device=device) < sinks)


def measure(model: Any, ids: torch.Tensor) -> dict[int, float]:
    """Sensitivity of every layer with full attention: 0 = its keys are the same without distant context; at most 2.

    Args:
        ids: [T] int64; the keys of one pass over it are held in memory.
    """
    length = len(ids)
    block = max(1, length // 8)
    device = next(model.parameters()).device
    mask = block_mask(length, block, sinks=max(1, length // 32), device=device)
    # Before the third block nothing is hidden, so those tokens say nothing.
    first = min(2 * block, length - 1)
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
