# SPDX-License-Identifier: Apache-2.0
"""How eviction reaches the worker: a KV connector of vLLM's, for it is told of every request and rides on every step.

Nothing is transferred. The scheduler's side reads what requests ask for and passes on what the block managers decided;
the worker's side compacts pages before a step's forward pass and takes freed pages out of the step's tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)

from vllm_kvcompress.attention.pages import PageManager
from vllm_kvcompress.checks import eviction_defaults
from vllm_kvcompress.episodic.policies import POLICIES, SnapKV
from vllm_kvcompress.episodic.request import Eviction, parse

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request


@dataclass(frozen=True)
class Order:
    """A compaction, with all that the worker needs of the request: it may be in no batch."""

    group: int
    tables: dict[int, list[int]]
    """KV cache group -> page ids before the compaction, 0 where null"""
    num_tokens: int
    """Computed before the step"""
    begin: int
    end: int
    eviction: Eviction
    queries: list[int]
    """token ids whose queries score; empty if none"""
    position: int
    """of the first of them"""


@dataclass(frozen=True)
class NullRange:
    """Pages [begin, end) of a request's row are gone; the row is the one that begins with page `head`.

    The first page of a request that evicts is never shared and never evicted, so no other row begins with it. Any later
    place will not do: a page that was evicted stands in its old row until that is nulled, and may be another's by then.
    """

    group: int
    head: int
    begin: int
    end: int


@dataclass
class EvictionMetadata(KVConnectorMetadata):
    orders: list[Order]
    ranges: list[NullRange]


class EvictionConnector(KVConnectorBase_V1, SupportsHMA):
    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._defaults = eviction_defaults(vllm_config)
        self._requests: dict[str, Request] = {}
        self._worker: Any = None
        if role == KVConnectorRole.WORKER:
            from vllm_kvcompress.episodic.worker import EvictionWorker

            self._worker = EvictionWorker(vllm_config, kv_cache_config)

    # --- scheduler --------------------------------------------------------------------------------------------------

    def _page_managers(self) -> list[tuple[int, PageManager]]:
        assert self._kv_cache_manager is not None
        managers = self._kv_cache_manager.coordinator.single_type_managers
        return [(group, manager) for group, manager in enumerate(managers) if isinstance(manager, PageManager)]

    def on_new_request(self, request: Request) -> None:
        params = request.sampling_params
        # Refused where the user's request is parsed if it is wrong.
        eviction = None if params is None else parse(params.extra_args, self._defaults)
        if eviction is None:
            return
        request.skip_reading_prefix_cache = True  # pages that others share must not be written
        self._requests[request.request_id] = request
        for _, manager in self._page_managers():
            manager.begin_eviction(request.request_id, eviction)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> EvictionMetadata:
        if not self._requests:
            return EvictionMetadata([], [])
        orders = [
            self._order(group, compaction) for group, manager in self._page_managers()
            for compaction in manager.take_compactions()
        ]  # fmt: skip
        ranges = [
            found for group, manager in self._page_managers() for request_id in scheduler_output.num_scheduled_tokens
            if request_id in self._requests and (found := self._null_range(group, manager, request_id)) is not None
        ]  # fmt: skip
        if orders or ranges:
            # Before the forward pass, not after it.
            scheduler_output.has_sync_kv_loads = True
        return EvictionMetadata(orders, ranges)

    def _order(self, group: int, compaction: Any) -> Order:
        request, eviction = self._requests[compaction.request_id], compaction.eviction
        assert self._kv_cache_manager is not None
        blocks = self._kv_cache_manager.coordinator.get_blocks(compaction.request_id)
        tables = {number: [block.block_id for block in table] for number, table in enumerate(blocks)}
        tables[group][compaction.begin : compaction.end] = compaction.freed
        num_tokens = request.num_computed_tokens  # vLLM adds the step's own later
        policy = POLICIES[eviction.policy]
        queries: list[int] = []
        position = num_tokens
        if policy.queries == "guide":
            queries = list(eviction.guide)
        elif isinstance(policy, SnapKV):
            position = max(0, num_tokens - policy.window)
            queries = list(request.all_token_ids[position:num_tokens])
        return Order(group, tables, num_tokens, compaction.begin, compaction.end, eviction, queries, position)

    def _null_range(self, group: int, manager: PageManager, request_id: str) -> NullRange | None:
        begin, end = manager.evicted(request_id)
        if begin == end:
            return None
        return NullRange(group, manager.req_to_blocks[request_id][0].block_id, begin, end)

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int | None, bool]:
        return 0, False

    def update_state_after_alloc(self, request: Request, blocks: Any, num_external_tokens: int) -> None:
        return

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        if self._requests.pop(request.request_id, None) is not None:
            for _, manager in self._page_managers():
                manager.end_eviction(request.request_id)
        return False, None

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished(request, [])

    @property
    def requires_kv_delivery(self) -> bool:
        return False

    # --- worker -----------------------------------------------------------------------------------------------------

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, EvictionMetadata)
        for order in metadata.orders:
            self._worker.compact(order)
        if metadata.ranges:
            self._worker.null(metadata.ranges, forward_context.attn_metadata)

    def wait_for_layer_load(self, layer_name: str) -> None:
        return

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        return

    def wait_for_save(self) -> None:
        return
