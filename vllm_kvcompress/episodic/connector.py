# SPDX-License-Identifier: Apache-2.0
"""How eviction reaches the worker: a KV connector of vLLM's, for it is told of every request and rides on every step.

The scheduler's side reads what requests ask for and passes on what the block managers decided; the worker's side
compacts pages before a step's forward pass and takes freed pages out of the step's metadata. What is transferred, if
the settings say so, are kept episodes: to host memory when they must give way and back when they are asked about.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.v1.request import RequestStatus

from vllm_kvcompress.attention.adoption import AdoptsBlocks
from vllm_kvcompress.attention.pages import Compaction, PageManager, PageSpec
from vllm_kvcompress.attention.windows import WindowManager
from vllm_kvcompress.checks import eviction_defaults
from vllm_kvcompress.episodic.host import Copy, count_slots
from vllm_kvcompress.episodic.policies import POLICIES, SnapKV
from vllm_kvcompress.episodic.request import Eviction, Wanted, parse
from vllm_kvcompress.episodic.store import EpisodeStore, Kept, digest
from vllm_kvcompress.formats import is_ours

if TYPE_CHECKING:
    import torch
    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request


_COMPLETE = (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED)


@dataclass(frozen=True)
class Part:
    """What a compaction does to the layers of one KV cache group."""

    group: int
    end: int
    """Pages of the table from where it was null before up to here are freed"""
    targets: list[int]
    """ids of the pages that get the survivors: the first of the table, but where those are shared"""


@dataclass(frozen=True)
class Order:
    """A compaction, with all that the worker needs of the request: it may be in no batch."""

    parts: list[Part]
    """One, or several that are due at once: their scores come from one pass of the guide over all that there was"""
    tables: dict[int, list[int]]
    """KV cache group -> page ids before the compaction, 0 where null"""
    nulls: dict[int, tuple[int, int]]
    """KV cache group of pages -> [begin, end) of its table that were null before: each has its own"""
    num_tokens: int
    """Computed before the step"""
    eviction: Eviction
    """As the request asked; each group keeps its share of the budget"""
    queries: list[int]
    """token ids whose queries score; empty if none"""
    position: int
    """of the first of them"""
    scratch: list[int]
    """ids of pages for the keys and values of a guide where attention reads those from pages alone; else empty"""
    request_id: str
    carried: str
    """The request whose scores, where the policy adds them up, are those of the tokens before `position`: this one, or
    that which kept the pages"""


@dataclass(frozen=True)
class NullRange:
    """Pages [begin, end) of a request's row are gone, and its first pages are `head` where that is not empty.

    The row begins with page `first` and has page `tail` in place `tail_index`. Rows of questions about one episode
    begin alike; a tail is one request's, but a page that was evicted still stands in its old row, and may be another's
    tail by now. `worker.match_rows` tells them apart where the runner does not say whose rows they are.
    """

    request_id: str
    group: int
    first: int
    tail_index: int
    tail: int
    begin: int
    end: int
    head: tuple[int, ...]


@dataclass
class EvictionMetadata(KVConnectorMetadata):
    """In the order in which it is carried out."""

    stores: list[Copy]
    """From pages that others may have from this step on"""
    orders: list[Order]
    loads: list[Copy]
    """To pages that a compaction of this step may have freed"""
    ranges: list[NullRange]
    forgotten: list[str]
    """Requests whose scores nobody goes on from"""


class EvictionConnector(KVConnectorBase_V1, SupportsHMA):
    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        pages = next(g.kv_cache_spec for g in kv_cache_config.kv_cache_groups if isinstance(g.kv_cache_spec, PageSpec))
        # Of the pages that there are: workers may settle their size after this process has its configuration.
        self._defaults = replace(eviction_defaults(vllm_config), page_tokens=pages.block_size)
        self._reads_pages_alone = not is_ours(vllm_config.cache_config.cache_dtype)
        self._scratch: list[KVCacheBlock] = []
        """Blocks of `Order.scratch`, held while a request may need them"""
        self._requests: dict[str, tuple[Request, Wanted]] = {}
        self._reused: dict[str, tuple[int, bool]] = {}
        """Tokens that a request took over from a stored episode, and whether that was in host memory"""
        self._summed: dict[str, tuple[str, int]] = {}
        """As `Kept.summed`, of requests that began with an episode or were compacted; nothing: all is yet to be read"""
        self._scorers: set[str] = set()
        """Requests whose scores workers may have"""
        self._host_slots = count_slots(vllm_config, kv_cache_config)
        self._store: EpisodeStore | None = None
        self._counts: Counter[str] = Counter()
        """Of `totals`; evicted tokens are the sum over the groups of pages"""
        self._worker: Any = None
        if role == KVConnectorRole.WORKER:
            from vllm_kvcompress.episodic.worker import EvictionWorker

            self._worker = EvictionWorker(vllm_config, kv_cache_config)

    # --- scheduler --------------------------------------------------------------------------------------------------

    def _page_managers(self) -> list[tuple[int, PageManager]]:
        assert self._kv_cache_manager is not None
        managers = self._kv_cache_manager.coordinator.single_type_managers
        return [(group, manager) for group, manager in enumerate(managers) if isinstance(manager, PageManager)]

    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        super().bind_kv_cache_manager(kv_cache_manager)
        self._store = store = EpisodeStore(kv_cache_manager.block_pool, self._host_slots)
        managers = self._page_managers()
        for _, manager in managers:
            # All groups ask for about as much, one after the other.
            manager.make_room = lambda blocks: store.make_room(blocks * len(managers))

    def on_new_request(self, request: Request) -> None:
        params = request.sampling_params
        # Refused where the user's request is parsed if it is wrong.
        wanted = None if params is None else parse(params.extra_args, self._defaults)
        if wanted is None:
            return
        request.skip_reading_prefix_cache = True  # pages that others share must not be written
        self._requests[request.request_id] = (request, wanted)
        for _, manager in self._page_managers():
            manager.begin_eviction(request.request_id, wanted.eviction, lambda: request.num_computed_tokens)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> EvictionMetadata:
        stores, loads = self._settle()
        due: dict[str, list[tuple[int, Compaction]]] = {}
        for group, manager in self._page_managers():
            for compaction in manager.take_compactions():
                self._counts["evicted_tokens"] += len(compaction.freed) * manager.block_size
                due.setdefault(compaction.request_id, []).append((group, compaction))
        orders = [self._order(request_id, compactions) for request_id, compactions in due.items()]
        ranges = [
            found for group, manager in self._page_managers() for request_id in scheduler_output.num_scheduled_tokens
            if request_id in self._requests and (found := self._null_range(group, manager, request_id)) is not None
        ]  # fmt: skip
        forgotten = self._forget()
        if stores or orders or loads or ranges or forgotten:
            # Before the forward pass, not after it.
            scheduler_output.has_sync_kv_loads = True
        return EvictionMetadata(stores, orders, loads, ranges, forgotten)

    def _forget(self) -> list[str]:
        """Requests whose scores neither a request nor a kept episode goes on from any more."""
        if not self._scorers:
            return []
        assert self._store is not None
        gone = self._scorers - {scorer for scorer, _ in self._summed.values()} - self._store.scorers()
        self._scorers -= gone
        return sorted(gone)

    def _order(self, request_id: str, compactions: list[tuple[int, Compaction]]) -> Order:
        request, wanted = self._requests[request_id]
        eviction = wanted.eviction
        assert self._kv_cache_manager is not None
        blocks = self._kv_cache_manager.coordinator.get_blocks(request_id)
        tables = {number: [block.block_id for block in table] for number, table in enumerate(blocks)}
        nulls = {group: manager.evicted(request_id) for group, manager in self._page_managers()}
        parts = []
        for group, compaction in compactions:
            table, kept = tables[group], len(compaction.kept)
            parts.append(Part(group, compaction.end, table[:kept]))
            nulls[group] = (kept, compaction.begin)
            table[:kept] = compaction.kept
            table[compaction.begin : compaction.end] = compaction.freed
        num_tokens = request.num_computed_tokens  # vLLM adds the step's own later
        policy = POLICIES[eviction.policy]
        queries: list[int] = []
        position, carried = num_tokens, request_id
        if policy.queries == "guide":
            queries = list(eviction.guide)
        elif isinstance(policy, SnapKV):
            # Of tokens in flight the keys are there by then, but not yet the ids here.
            num_tokens = min(num_tokens, len(request.all_token_ids))
            position = max(0, num_tokens - policy.window)
            queries = list(request.all_token_ids[position:num_tokens])
        elif policy.accumulates:
            # In whole pages, as they are kept: whoever goes on from there counts every query once.
            page = self._defaults.page_tokens
            num_tokens = min(num_tokens, len(request.all_token_ids)) // page * page
            carried, position = self._summed.get(request_id, (request_id, 0))
            queries = list(request.all_token_ids[position:num_tokens])
            self._summed[request_id] = request_id, num_tokens
            self._scorers.add(request_id)
        scratch = [block.block_id for block in self._scratch] if policy.queries == "guide" else []
        return Order(parts, tables, nulls, num_tokens, eviction, queries, position, scratch, request_id, carried)

    def _null_range(self, group: int, manager: PageManager, request_id: str) -> NullRange | None:
        begin, end = manager.evicted(request_id)
        if begin == end:
            return None
        blocks = manager.req_to_blocks[request_id]
        first, head = manager.replaced(request_id)
        return NullRange(request_id, group, first, len(blocks) - 1, blocks[-1].block_id, begin, end, head)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Tokens whose pages a stored episode has, in the pool by the step's forward pass."""
        _, wanted = self._requests.get(request.request_id, (None, None))
        if wanted is None:
            return 0, False
        self._summed.pop(request.request_id, None)  # of a request that was preempted
        if not self._has_scratch(wanted):
            request.skip_reading_prefix_cache = False  # or vLLM would take this for no tokens
            return None, False  # at another step
        if wanted.episode is None:
            return 0, False
        assert self._store is not None and self._kv_cache_manager is not None
        entry = self._store.find(wanted.episode, request.all_token_ids, request.cache_salt, wanted.eviction)
        if entry is None:
            return 0, False
        managers = self._kv_cache_manager.coordinator.single_type_managers
        for group, table in entry.tables.items():
            manager = managers[group]
            if isinstance(manager, PageManager):
                manager.adopt(request.request_id, table)
            else:
                assert isinstance(manager, AdoptsBlocks)
                manager.offer(request.request_id, table)
        self._summed[request.request_id] = entry.summed
        # vLLM reads no prefix cache for it, and has not; nor would it take these (`_settle` sets it again).
        request.skip_reading_prefix_cache = False
        return entry.num_tokens, False

    def _has_scratch(self, wanted: Wanted) -> bool:
        """Whether the pages for the request's guide are there; takes them from the pool once they are needed."""
        if not self._reads_pages_alone or not wanted.eviction.guide or self._scratch:
            return True
        assert self._kv_cache_manager is not None and self._store is not None
        pool = self._kv_cache_manager.block_pool
        needed = -(-self._defaults.block_tokens // self._defaults.page_tokens) + 1
        self._store.make_room(needed)
        if pool.get_num_free_blocks() < needed:
            return False
        self._scratch = pool.get_new_blocks(needed)
        return True

    def update_state_after_alloc(self, request: Request, blocks: Any, num_external_tokens: int) -> None:
        _, wanted = self._requests.get(request.request_id, (None, None))
        if wanted is None:
            return
        assert self._store is not None
        restored = num_external_tokens > 0 and wanted.episode is not None and self._store.is_arriving(wanted.episode)
        self._reused[request.request_id] = (num_external_tokens, restored)
        self._counts["episodes_reused"] += num_external_tokens > 0
        self._counts["episodes_restored"] += restored

    def _settle(self) -> tuple[list[Copy], list[Copy]]:
        """Offers of the scheduling step are void now, taken or not. What `EpisodeStore.settle` gives."""
        assert self._store is not None and self._kv_cache_manager is not None
        copies = self._store.settle()
        for manager in self._kv_cache_manager.coordinator.single_type_managers:
            if isinstance(manager, AdoptsBlocks):
                manager.withdraw_offers()
        for request, _ in self._requests.values():
            request.skip_reading_prefix_cache = True
        return copies

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        found = self._requests.pop(request.request_id, None)
        reused, restored = self._reused.pop(request.request_id, (0, False))
        if found is None:
            return False, None
        wanted = found[1]
        if self._scratch and not any(other.eviction.guide for _, other in self._requests.values()):
            assert self._kv_cache_manager is not None
            self._kv_cache_manager.block_pool.free_blocks(self._scratch)
            self._scratch = []
        report = {"reused_tokens": reused, "restored": restored, "pages": self._pages(request.request_id)}
        if wanted.keep is not None and request.status in _COMPLETE:
            report["kept_tokens"] = self._keep(request, wanted)
        self._summed.pop(request.request_id, None)
        for _, manager in self._page_managers():
            manager.end_eviction(request.request_id)
        return False, {"kvcompress": report}

    def _pages(self, request_id: str) -> int:
        """Pages that a layer holds, on average; groups have equally many layers."""
        tables = [manager.req_to_blocks[request_id] for _, manager in self._page_managers()]
        return round(sum(not block.is_null for table in tables for block in table) / len(tables))

    def _keep(self, request: Request, wanted: Wanted) -> int:
        """Store the prompt's whole pages under the request's name; how many tokens that is."""
        assert self._store is not None and self._kv_cache_manager is not None and wanted.keep is not None
        page = self._defaults.page_tokens
        num_tokens = min(request.num_prompt_tokens, request.num_computed_tokens) // page * page
        managers = [manager for _, manager in self._page_managers()]
        end = max(manager.evicted(request.request_id)[1] for manager in managers)
        if num_tokens == 0 or end * page > num_tokens:
            return 0
        # vLLM frees once more before it says that a request has finished. Nobody will compact what that made due.
        if any(manager.is_due(request.request_id) for manager in managers):
            return 0
        tables = {}
        for group, manager in enumerate(self._kv_cache_manager.coordinator.single_type_managers):
            table = manager.req_to_blocks[request.request_id][: num_tokens // manager.block_size]
            if isinstance(manager, WindowManager):
                # The recent window slides on with each question; sinks stay where they are.
                sinks = manager.kv_cache_spec.sink_blocks
                table = table[:sinks] + [manager.block_pool.null_block] * (len(table) - sinks)
            tables[group] = table
        prompt = request.all_token_ids[:num_tokens]
        self._counts["episodes_built"] += 1
        scorer, summed = self._summed.get(request.request_id, (request.request_id, 0))
        kept = Kept(
            digest(prompt, request.cache_salt), num_tokens, wanted.eviction, tables, (scorer, min(summed, num_tokens))
        )
        self._store.keep(wanted.keep, kept)
        return num_tokens

    def totals(self) -> dict[str, int]:
        """What has happened so far, by the names of `operations.metrics`."""
        assert self._store is not None
        evicted = self._counts["evicted_tokens"] // len(self._page_managers())
        spilled, lost = self._store.num_spilled, self._store.num_lost
        return {**self._counts, "evicted_tokens": evicted, "episodes_spilled": spilled, "episodes_lost": lost}

    @property
    def store(self) -> EpisodeStore:
        assert self._store is not None
        return self._store

    def reset_cache(self) -> bool | None:
        if self._store is not None:
            self._store.clear()
        return True

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished(request, list(block_ids[0]))

    @property
    def requires_kv_delivery(self) -> bool:
        return False

    # --- worker -----------------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        if self._host_slots:
            self._worker.allocate_host_memory(self._host_slots)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, EvictionMetadata)
        for copy in metadata.stores:
            self._worker.host.store(copy)
        for order in metadata.orders:
            self._worker.compact(order)
        self._worker.forget(metadata.forgotten)  # what an order of this step may still have gone on from
        for copy in metadata.loads:
            self._worker.host.load(copy)
        if metadata.ranges:
            # Where a whole step is one captured graph, the metadata is in no forward context.
            step = kwargs.get("attn_metadata") or forward_context.attn_metadata
            self._worker.close_gaps(metadata.ranges, step, kwargs.get("request_ids"))

    def wait_for_layer_load(self, layer_name: str) -> None:
        return

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        return

    def wait_for_save(self) -> None:
        return
