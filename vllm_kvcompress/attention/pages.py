# SPDX-License-Identifier: Apache-2.0
"""The pages in vLLM's block manager: spec and manager, registered together (see `windows` for why).

Requests that evict keep a fixed number of pages, however long they are. Their table has three parts:

    [ kept: `budget_pages` pages, full ][ null ... ][ not compacted yet: the recent window and what is being written ]

A token's place in the table is its position, so what is written next is never displaced; null pages are skipped by
every kernel. When a compaction is due, this manager frees the pages between `budget_pages` and the recent window and
notes which pages the worker must gather the survivors from. Pages are freed before the step that compacts them is
sent: whoever gets them writes in that step's forward pass, and the worker compacts before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Self

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec

from vllm_kvcompress import compat
from vllm_kvcompress.attention.adoption import AdoptsBlocks
from vllm_kvcompress.episodic.request import Eviction

_ROOM_FOR_WINDOWS = 64
"""Blocks that a request's other groups may ask for in the same breath."""


@dataclass(frozen=True, kw_only=True)
class PageSpec(FullAttentionSpec):
    """Pages of one of our formats. A class of its own so that vLLM gives its groups our manager."""

    budget_share: float = 1.0
    """Of the budget that requests ask for: layers of different shares are groups apart, whose managers free their own
    pages. So is a layer's window, for the step's index tensors are made once per group, of pages and windows alike."""

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        merged = super().merge(specs)
        assert all(spec.budget_share == specs[0].budget_share for spec in specs), "layers of different budgets"
        return replace(merged, budget_share=specs[0].budget_share)

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        return super().is_uniform_with_collection(kv_cache_specs) and all(
            isinstance(spec, PageSpec) and spec.budget_share == self.budget_share for spec in kv_cache_specs.values()
        )

    @classmethod
    def of(cls, spec: FullAttentionSpec) -> PageSpec:
        return cls(**{field.name: getattr(spec, field.name) for field in fields(spec) if field.init})


@dataclass(frozen=True)
class Compaction:
    """Before a step's forward pass, gather survivors of `kept` and `freed` in the request's first pages."""

    request_id: str
    begin: int
    """Pages [budget_pages, begin) of the table were null before; [begin, end) become so"""
    freed: tuple[int, ...]
    """ids of the pages [begin, end): still as they were when the worker compacts"""
    kept: tuple[int, ...]
    """ids of the kept pages before; others than those in the table now where they were shared"""
    eviction: Eviction

    @property
    def end(self) -> int:
        return self.begin + len(self.freed)


@dataclass
class _State:
    """What has become of an evicting request's table."""

    eviction: Eviction
    num_computed: Callable[[], int]
    """Tokens in the cache when the next step begins: `processed_computed_tokens` lags behind steps in flight"""
    end: int = 0
    """Pages [budget_pages, end) of the table are null; 0: nothing was compacted yet"""
    prompt_done: bool = False
    shared: bool = False
    """The kept pages are a stored episode's: written no more, but replaced where another compaction is worth it"""
    first: int = 0
    """id of the first page as the worker knows it, where shared pages were replaced"""
    replaced: tuple[int, ...] = ()
    """ids of the pages that took their place"""
    read_before: int = 0
    """Tokens that a preempted request had read and generated: it reads them in blocks again, prompt or not"""


class PageManager(AdoptsBlocks, FullAttentionManager):
    """Full attention, of which evicting requests keep a budget."""

    kv_cache_spec: PageSpec

    def __init__(self, kv_cache_spec: PageSpec, **kwargs) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self._states: dict[str, _State] = {}
        self._due: list[Compaction] = []
        self.make_room: Callable[[int], None] | None = None
        """Asked to have kept episodes give way where fewer blocks than these are free"""

    def begin_eviction(self, request_id: str, eviction: Eviction, num_computed: Callable[[], int]) -> None:
        """The request keeps this group's share of `eviction.budget_pages` pages from its first step on.

        Args:
            num_computed: how many of its tokens are in the cache when the next step begins.
        """
        own = eviction.share(self.kv_cache_spec.budget_share, self.block_size)
        self._states[request_id] = _State(own, num_computed)

    def end_eviction(self, request_id: str) -> None:
        """The request has finished. vLLM asks for skipped blocks once more before it says so: nobody compacts those."""
        self._states.pop(request_id, None)
        self._forget_due(request_id)

    def _forget_due(self, request_id: str) -> None:
        self._due = [compaction for compaction in self._due if compaction.request_id != request_id]

    def take_compactions(self) -> list[Compaction]:
        """What has come due since the last call."""
        due, self._due = self._due, []
        return due

    def is_due(self, request_id: str) -> bool:
        """Whether the table is already that of a compaction which no step carries out yet."""
        return any(compaction.request_id == request_id for compaction in self._due)

    def evicted(self, request_id: str) -> tuple[int, int]:
        """[begin, end) of the null pages in the request's table."""
        state = self._states[request_id]
        return (state.eviction.budget_pages, state.end) if state.end else (0, 0)

    def replaced(self, request_id: str) -> tuple[int, tuple[int, ...]]:
        """id of the first page as the worker was told, and of the kept pages where they are others now."""
        state = self._states[request_id]
        return (state.first, state.replaced) if state.replaced else (self.req_to_blocks[request_id][0].block_id, ())

    def adopt(self, request_id: str, blocks: list[KVCacheBlock]) -> None:
        """Offer the request the kept pages of a stored episode, null where evicted."""
        self.offer(request_id, blocks)
        state = self._states[request_id]
        state.end, state.shared = max((i + 1 for i, block in enumerate(blocks) if block.is_null), default=0), True

    def withdraw_offers(self) -> None:
        for request_id in self._offers:  # not taken
            state = self._states[request_id]
            self._states[request_id] = _State(state.eviction, state.num_computed)
        super().withdraw_offers()

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Free what a compaction before the step about to be scheduled makes superfluous.

        Counted from the table and not from `processed_computed_tokens`, which lags behind steps in flight: the table
        reaches into its last block, so all pages before it are full when the step begins.
        """
        state = self._states.get(request_id)
        if state is None:
            return
        blocks = self.req_to_blocks.get(request_id)
        if not blocks:
            return
        eviction = state.eviction
        budget = eviction.budget_pages
        scheduled = (len(blocks) - 1) * self.block_size + 1
        # The recent window is read at its positions; the page before the last gives its mean to the next one begun.
        end = min((scheduled - eviction.recent_tokens) // self.block_size, len(blocks) - 2)
        begin = state.end or budget
        held = end if not state.end else budget + end - begin
        if held <= budget or end <= begin:
            return
        # While the prompt is read, and once after it; then blockwise, for tokens that are generated one by one.
        # A question about a stored episode is spared the copy of its pages until then, too.
        computed = max(processed_computed_tokens, state.num_computed())
        reading = computed < max(num_prompt_tokens or 0, state.read_before)
        lazy = state.prompt_done and not reading if not state.shared else not eviction.keeps
        if lazy and held < budget + eviction.block_tokens // self.block_size:
            return
        kept, freed = blocks[:budget], blocks[begin:end]
        if state.shared and self.make_room is not None:
            self.make_room(budget)
        if state.shared and any(block.ref_cnt > 1 for block in kept):  # or else the episode has given way to this one
            if self.block_pool.get_num_free_blocks() < budget:
                return  # again at the next step; should nothing come free, vLLM preempts as it does for any request
            blocks[:budget] = self.block_pool.get_new_blocks(budget)
            state.first = kept[0].block_id
            state.replaced = tuple(block.block_id for block in blocks[:budget])
            self.block_pool.free_blocks(reversed(kept))
        state.shared = False
        state.prompt_done = not reading
        ids = [tuple(block.block_id for block in some) for some in (freed, kept)]
        self._due.append(Compaction(request_id, begin, ids[0], ids[1], eviction))
        blocks[begin:end] = [self._null_block] * (end - begin)
        state.end = end
        self.block_pool.free_blocks(reversed(freed))

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
        wanted = super().get_num_blocks_to_allocate(
            request_id,
            num_tokens,
            new_computed_blocks,
            total_computed_tokens,
            num_local_computed_tokens,
            num_tokens_main_model,
            apply_admission_cap,
            prefill_end,
        )
        wanted = max(0, wanted - self.offered(request_id))
        state = self._states.get(request_id)
        if state is not None and apply_admission_cap:
            # The gate asks for the whole prompt at once; what the request needs is its peak.
            wanted = min(wanted, state.eviction.peak_pages(self.block_size))
        if wanted and self.make_room is not None:
            self.make_room(wanted + _ROOM_FOR_WINDOWS)
        return wanted

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        state = self._states.get(request_id)
        blocks = super().pop_blocks_for_free(request_id)
        if state is None:
            return blocks
        # Preempted and about to begin anew. What was due is not done: others may own the pages by then. The table
        # reaches into its last block, so at least this many tokens come again; fewer than a page more are no block.
        read_before = max(state.read_before, (len(blocks) - 1) * self.block_size + 1)
        self._states[request_id] = _State(state.eviction, state.num_computed, read_before=read_before)
        self._forget_due(request_id)
        return [block for block in blocks if not block.is_null]


compat.register_cache_spec(PageSpec, PageManager)
