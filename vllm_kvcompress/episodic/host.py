# SPDX-License-Identifier: Apache-2.0
"""Host memory for pages of kept episodes that gave way (`EpisodicSettings.host_memory`).

One arena a worker, allocated at start and divided into slots: a slot holds what a block of vLLM's pool holds, in all
layers of its group. Which block goes to which slot is the scheduler's decision (`EpisodeStore`), so workers, each with
its shard of the heads, agree without a word.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from vllm_kvcompress.attention.pages import PageSpec
from vllm_kvcompress.config import load_settings
from vllm_kvcompress.errors import KVCompressError


@dataclass(frozen=True)
class Copy:
    """Between blocks of the pool and as many slots of the arena."""

    blocks: list[int]
    slots: list[int]


def count_slots(vllm_config: Any, kv_cache_config: Any) -> int:
    """Blocks that the settings' host memory holds; the same in every process of an engine. 0: nothing is spilled.

    Raises:
        KVCompressError: host memory that holds no episode of the settings' budget.
    """
    settings = load_settings(vllm_config.additional_config).episodic
    assert settings is not None
    # Windows, and layers of other budgets, lie in the same blocks: a block belongs to one group at a time.
    pages = [group for group in kv_cache_config.kv_cache_groups if isinstance(group.kv_cache_spec, PageSpec)]
    block_bytes = pages[0].kv_cache_spec.page_size_bytes * len(pages[0].layer_names)
    block_bytes *= vllm_config.parallel_config.tensor_parallel_size
    slots = settings.host_memory // block_bytes
    least = sum(-(-settings.budget // group.kv_cache_spec.block_size) for group in pages)
    if settings.host_memory and slots < least:
        raise KVCompressError(
            f"episodic.host_memory={settings.host_memory} holds {slots} pages of {block_bytes} bytes, an episode of "
            f"budget={settings.budget} has {least} or more; set at least {least * block_bytes}, or 0 to spill nothing"
        )
    return slots


class HostPages:
    """A worker's arena, and the copies to and from it, in order on the device's current stream."""

    def __init__(self, caches: list[torch.Tensor], num_slots: int) -> None:
        """
        Args:
            caches: of every layer with pages, [num_blocks, H, page_tokens, bytes_per_token] of one byte each.
        """
        self._pages = [cache.view(torch.uint8).view(len(cache), -1) for cache in caches]
        first = self._pages[0]
        self._slots = torch.empty(len(caches), num_slots, first.shape[1], dtype=torch.uint8)
        """[L, num_slots, page_bytes]"""
        if first.is_cuda:
            from vllm.v1.simple_kv_offload.cuda_mem_ops import pin_tensor

            pin_tensor(self._slots)  # torch's own pinned memory is rounded up to a power of two

    def store(self, copy: Copy) -> None:
        for pages, slots in zip(self._pages, self._slots, strict=True):
            for block, slot in zip(copy.blocks, copy.slots, strict=True):
                slots[slot].copy_(pages[block], non_blocking=True)

    def load(self, copy: Copy) -> None:
        for pages, slots in zip(self._pages, self._slots, strict=True):
            for block, slot in zip(copy.blocks, copy.slots, strict=True):
                pages[block].copy_(slots[slot], non_blocking=True)
