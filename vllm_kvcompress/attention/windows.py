# SPDX-License-Identifier: Apache-2.0
"""The 16-bit windows in vLLM's block manager: cache spec and block manager, registered together.

Together because the scheduler's process knows the spec only by unpickling it: importing its module must bring the
manager along, or vLLM would quietly pick the manager of the base class.

The windows are an accuracy layer over pages that hold every token. So a block may be missing anywhere (null in the
table): prefix-cache hits are never shortened by this group, and a prefill chunk gets blocks only for the tokens that
the next step still reads in 16 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from vllm.config import VllmConfig
from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_utils import KVCacheBlock, resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import SlidingWindowSpec

from vllm_kvcompress import compat
from vllm_kvcompress.attention.adoption import AdoptsBlocks
from vllm_kvcompress.attention.pages import PageSpec


@dataclass(frozen=True, kw_only=True)
class WindowSpec(SlidingWindowSpec):
    """First `sink_tokens` and last `recent_tokens` tokens of every request, in 16 bits, rotated as the pages are.

    A SlidingWindowSpec because vLLM recycles its blocks as the window slides and caps admission by its bound.
    """

    sink_tokens: int
    recent_tokens: int
    rollback_tokens: int
    """By how many tokens a step may begin before the end of an earlier one: drafts that are taken back."""
    budget_share: float = 1.0
    """That of the layer's pages (`PageSpec`)"""

    @property
    def num_retained_tokens(self) -> int:
        """0.33's runner nulls block-table entries below this; sinks must stay readable, the kernel masks itself."""
        return 1 << 30

    @property
    def sink_blocks(self) -> int:
        return cdiv(self.sink_tokens, self.block_size)

    def is_kept(self, block: int, num_tokens: int) -> bool:
        """Whether a block holds a token that a step after `num_tokens` computed tokens may read in 16 bits."""
        return block < self.sink_blocks or (self.recent_tokens > 0 and block >= self.first_recent_block(num_tokens))

    def first_recent_block(self, num_tokens: int) -> int:
        """The first block of the recent window after `num_tokens` computed tokens; below 0 while all are in it."""
        return (num_tokens - self.recent_tokens - self.rollback_tokens) // self.block_size

    def max_admission_blocks_per_request(self, max_in_flight_tokens: int, max_model_len: int) -> int:
        """Most blocks a request holds at once: sinks, the window that a step reads and the one that it writes.

        What the step no longer reads is freed before it gets blocks (`WindowManager.remove_skipped_blocks`), and it
        gets none but for the next step's window. A window of w = `recent_tokens + rollback_tokens` tokens lies in
        ceil((w - 1) / block) + 1 blocks at most. With 64/256 and no drafts: 4 + 2 * 17 = 38 blocks of 16 tokens.
        """
        window = 0
        if self.recent_tokens:
            window = cdiv(self.recent_tokens + self.rollback_tokens - 1, self.block_size) + 1
        # A chunk shorter than the window adds only its own blocks.
        written = min(window, cdiv(max_in_flight_tokens, self.block_size))
        return min(self.sink_blocks + window + written, cdiv(max_model_len, self.block_size))


def make_window_spec(
    main: PageSpec, vllm_config: VllmConfig, sink_tokens: int, recent_tokens: int, itemsize: int = 2
) -> WindowSpec:
    """Spec of a layer's windows, its pages padded to the bytes of the layer's 2-bit pages.

    Both groups must have pages of equal bytes to share vLLM's block pool; the block is the largest power of two of
    tokens that fits (16 for every head size: a 2-bit page of 128 tokens holds 16 to 20 tokens in 16 bits).
    """
    token_bytes = main.num_kv_heads * 2 * main.head_size * itemsize
    block_size = 1 << (main.page_size_bytes // token_bytes).bit_length() - 1
    return WindowSpec(
        block_size=block_size,
        num_kv_heads=main.num_kv_heads,
        head_size=main.head_size,
        # uint8 and the pages' own quant mode: groups that differ in either make 0.33 zero every new block.
        dtype=torch.uint8,
        kv_quant_mode=main.kv_quant_mode,
        state_content_bytes=2 * main.head_size * itemsize,
        page_size_padded=main.page_size_bytes,
        sliding_window=recent_tokens + 1,
        sink_tokens=sink_tokens,
        recent_tokens=recent_tokens,
        # The steps in flight count their drafts as computed, and so did the last one that was processed.
        rollback_tokens=vllm_config.num_speculative_tokens * vllm_config.max_concurrent_batches,
        budget_share=main.budget_share,
    )


class WindowManager(AdoptsBlocks, SlidingWindowManager):
    """Keeps sinks and the sliding window; see `WindowSpec` for the arithmetic."""

    kv_cache_spec: WindowSpec

    def __init__(self, kv_cache_spec: WindowSpec, **kwargs) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        # Per request: blocks below this index (sinks aside) are freed already.
        self._first_live_block: dict[str, int] = {}
        # The scheduler asks for every request in every step, so what never changes is not worked out again.
        self._sink_blocks = kv_cache_spec.sink_blocks
        self.fallback_tokens = 0
        """In the windows of requests when they took over blocks, and read from the pages: their blocks were missing"""

    def held(self) -> set[int]:
        """ids of the blocks that requests hold."""
        sinks, held = self._sink_blocks, set()
        for request_id, table in self.req_to_blocks.items():
            first = self._first_live_block.get(request_id, sinks)
            held |= {block.block_id for block in (*table[:sinks], *table[first:]) if not block.is_null}
        return held

    def _count_fallbacks(self, table: Sequence[KVCacheBlock]) -> None:
        """Of a request whose first tokens, as many as these blocks have, are computed."""
        size, spec = self.block_size, self.kv_cache_spec
        computed = len(table) * size
        sinks = min(spec.sink_tokens, computed)
        for begin, end in ((0, sinks), (max(sinks, computed - spec.recent_tokens), computed)):
            for block in range(begin // size, cdiv(end, size)):
                if table[block].is_null:
                    self.fallback_tokens += min(end, (block + 1) * size) - max(begin, block * size)

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes,
        max_length,
        kv_cache_group_ids,
        block_pool,
        kv_cache_spec,
        drop_eagle_block,
        alignment_tokens,
        dcp_world_size=1,
        pcp_world_size=1,
    ):
        """Accept the whole length the pages offer; take what sinks and window blocks happen to be cached."""
        block_size = kv_cache_spec.block_size
        hashes = resolve_block_hashes(
            block_hashes,
            block_pool.hash_block_size,
            block_size,
            supports_fine_grained_hash_lookup=cls.supports_fine_grained_hash_lookup,
            alignment_tokens=alignment_tokens,
        )
        if drop_eagle_block:
            max_length = max(0, max_length - block_size)
        num_blocks = max_length // block_size
        found = tuple([block_pool.null_block] * num_blocks for _ in kv_cache_group_ids)
        for block in range(min(num_blocks, len(hashes))):
            if not kv_cache_spec.is_kept(block, max_length):
                continue
            cached = block_pool.get_cached_block(hashes[block], kv_cache_group_ids)
            if cached:
                for blocks, hit in zip(found, cached, strict=True):
                    blocks[block] = hit
        return found, max_length

    @classmethod
    def reachable_block_mask(cls, *args, **kwargs):
        """Cache every block that exists: sinks and the window at any boundary can serve a hit."""
        return None

    def get_num_skipped_tokens(self, num_computed_tokens: int) -> int:
        """Always 0: what may be skipped is decided block by block (`WindowSpec.is_kept`)."""
        return 0

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        """Blocks that `allocate_new_blocks` will take from the pool, plus cached ones that a hit takes back from it."""
        held = len(self.req_to_blocks.get(request_id, ())) + len(new_computed_blocks) + self.offered(request_id)
        if not new_computed_blocks and not apply_admission_cap and held * self.block_size >= num_tokens:
            return 0  # most steps of a decode
        wanted = len(self._blocks_to_allocate(held, num_tokens, num_tokens_main_model))
        if apply_admission_cap and self.max_admission_blocks_per_request is not None:
            # The gate asks for the whole prompt at once: what it must be able to hold is the peak, not one chunk.
            wanted = min(cdiv(num_tokens, self.block_size), self.max_admission_blocks_per_request)
            wanted = max(0, wanted - sum(not block.is_null for block in new_computed_blocks))
        return wanted + self._get_num_evictable_blocks(new_computed_blocks)

    def _blocks_to_allocate(self, held: int, num_tokens: int, num_tokens_main_model: int) -> list[int]:
        spec = self.kv_cache_spec
        last = cdiv(num_tokens, self.block_size)
        return [block for block in range(held, last) if spec.is_kept(block, num_tokens_main_model)]

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        """Take over a prefix hit: touch what is there, leave null what is not."""
        request_blocks = self.req_to_blocks[request_id]
        assert not request_blocks
        if self.enable_caching:
            self.block_pool.touch([block for block in new_computed_blocks if not block.is_null])
        request_blocks.extend(new_computed_blocks)
        self.num_cached_block[request_id] = len(request_blocks)
        self._count_fallbacks(request_blocks)

    def allocate_external_computed_blocks(self, request_id: str, *args, **kwargs) -> None:
        super().allocate_external_computed_blocks(request_id, *args, **kwargs)
        self._count_fallbacks(self.req_to_blocks[request_id])

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        """Extend the request's table to `num_tokens`; blocks outside the next step's window are null."""
        request_blocks = self.req_to_blocks[request_id]
        held = len(request_blocks)
        if held * self.block_size >= num_tokens:
            return []
        wanted = self._blocks_to_allocate(held, num_tokens, num_tokens_main_model)
        fresh = self.block_pool.get_new_blocks(len(wanted))
        added = [self._null_block] * max(0, cdiv(num_tokens, self.block_size) - held)
        for block, new in zip(wanted, fresh, strict=True):
            added[block - held] = new
        request_blocks.extend(added)
        if self._record_new_block_ids:
            self.new_block_ids.extend(block.block_id for block in fresh)
        return added

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Free what the step about to be scheduled no longer reads, though steps in flight may.

        Steps run in the order in which they were scheduled, so who gets a block writes it after those have read it;
        vLLM relies on that itself when it frees a request that finishes or is preempted with steps in flight. What has
        been scheduled is known from the table (`processed_computed_tokens` are fewer): it reaches into the last block.
        """
        request_blocks = self.req_to_blocks.get(request_id)
        if not request_blocks:
            return
        first = self._first_live_block.get(request_id, self._sink_blocks)
        end = len(request_blocks)
        if self.kv_cache_spec.recent_tokens:
            scheduled = (end - 1) * self.block_size + 1
            end = min(end, self.kv_cache_spec.first_recent_block(scheduled))
        if end <= first:
            return
        # Not the base class's helper: it stops at the first null block, and ours may lie anywhere.
        freed = [block for block in request_blocks[first:end] if not block.is_null]
        request_blocks[first:end] = [self._null_block] * (end - first)
        self._first_live_block[request_id] = end
        if freed:
            self.block_pool.free_blocks(reversed(freed))

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        self._first_live_block.pop(request_id, None)
        return [block for block in super().pop_blocks_for_free(request_id) if not block.is_null]


compat.register_cache_spec(WindowSpec, WindowManager)
