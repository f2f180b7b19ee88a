# SPDX-License-Identifier: Apache-2.0
"""Host memory for pages of kept episodes that gave way (`EpisodicSettings.host_memory`).

One arena a worker, allocated at start and divided into slots: a slot holds what a block of vLLM's pool holds, in all of
the worker's layers. Which block goes to which slot is the scheduler's decision (`EpisodeStore`), so workers, each with
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
    # 16-bit windows lie in the same blocks: a block belongs to one group at a time.
    pages = [group for group in kv_cache_config.kv_cache_groups if isinstance(group.kv_cache_spec, PageSpec)]
    block_bytes = sum(group.kv_cache_spec.page_size_bytes * len(group.layer_names) for group in pages)
    block_bytes *= vllm_config.parallel_config.tensor_parallel_size
    slots = settings.host_memory // block_bytes
    least = max(-(-settings.budget // group.kv_cache_spec.block_size) for group in pages)
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
        # In words of 8 bytes, which the device moves faster than single ones; a page has 128 tokens.
        self._pages = [cache.view(torch.uint8).view(len(cache), -1).view(torch.int64) for cache in caches]
        first = self._pages[0]
        self._memory = torch.empty(len(caches), num_slots, first.shape[1], dtype=torch.int64)
        """[L, num_slots, page_bytes / 8]"""
        self._slots = self._memory
        if first.is_cuda:
            from vllm.utils.torch_utils import get_accelerator_view_from_cpu_tensor
            from vllm.v1.simple_kv_offload.cuda_mem_ops import pin_tensor

            pin_tensor(self._memory)
            self._slots = get_accelerator_view_from_cpu_tensor(self._memory)

    def store(self, copy: Copy) -> None:
        blocks, slots = self._indices(copy)
        for pages, memory in zip(self._pages, self._slots, strict=True):
            memory[slots] = pages[blocks]

    def load(self, copy: Copy) -> None:
        blocks, slots = self._indices(copy)
        for pages, memory in zip(self._pages, self._slots, strict=True):
            pages[blocks] = memory[slots]

    def _indices(self, copy: Copy) -> tuple[torch.Tensor, torch.Tensor]:
        device = self._pages[0].device
        return torch.tensor(copy.blocks, device=device), torch.tensor(copy.slots, device=device)
