# SPDX-License-Identifier: Apache-2.0
"""Looks at an engine's block managers and its connector: the line at start, and what `metrics` exports."""

from __future__ import annotations

import logging
import time
from collections import Counter
from itertools import takewhile
from typing import Any

from vllm_kvcompress import compat
from vllm_kvcompress.attention.pages import PageManager
from vllm_kvcompress.attention.windows import WindowManager
from vllm_kvcompress.episodic.connector import EvictionConnector
from vllm_kvcompress.operations.facts import start_line

logger = logging.getLogger("vllm.kvcompress")

_SECONDS = 1.0
"""Between looks at the tables of all requests, while there are any: scrapes are farther apart, steps much closer."""


def observe(scheduler: Any) -> Observer:
    """Say at start what the engine's KV cache holds. For engines that are observed (`facts.is_observed`)."""
    capacity = compat.kv_cache_capacity(scheduler.vllm_config, scheduler.kv_cache_config)
    logger.info("%s", start_line(scheduler.vllm_config, *capacity))
    return Observer(scheduler)


class Observer:
    """Called after every step, in the engine core; numbers by the names of `metrics.METRICS`."""

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self._pool = scheduler.kv_cache_manager.block_pool
        self._managers = scheduler.kv_cache_manager.coordinator.single_type_managers
        groups = scheduler.kv_cache_config.kv_cache_groups
        # A block of the pool serves one group at a time, and is as large as the largest needs.
        self._block_bytes = groups[0].kv_cache_spec.page_size_bytes * max(len(group.layer_names) for group in groups)
        self._sent: Counter[str] = Counter()
        self._look_again = 0.0

    def __call__(self) -> dict[str, int | float]:
        """Gauges, now and then, and by how much counters have grown since the last call."""
        totals = Counter(self._totals())
        grown: dict[str, int | float] = dict(totals - self._sent)
        self._sent = totals
        now = time.monotonic()
        # A server at rest sends nothing more: the last look must be a true one.
        if now < self._look_again and self._scheduler.has_unfinished_requests():
            return grown
        self._look_again = now + _SECONDS
        return grown | self._levels()

    @property
    def _connector(self) -> EvictionConnector | None:
        connector = self._scheduler.connector
        return connector if isinstance(connector, EvictionConnector) else None

    def _totals(self) -> dict[str, int]:
        found = {} if self._connector is None else self._connector.totals()
        missed = sum(manager.fallback_tokens for manager in self._managers if isinstance(manager, WindowManager))
        windows = sum(isinstance(manager, WindowManager) for manager in self._managers)
        return found | {"window_fallback_tokens": missed // max(1, windows)}

    def _levels(self) -> dict[str, int | float]:
        """Blocks are in use where a request or a kept episode holds them; of most of them only the pool knows."""
        windows, others = set(), set()
        for group, manager in enumerate(self._managers):
            if isinstance(manager, WindowManager):
                windows |= manager.held()
                if self._connector is not None:
                    windows |= self._connector.store.block_ids(group)
            elif not isinstance(manager, PageManager):  # vLLM's own sliding windows
                for table in manager.req_to_blocks.values():
                    others |= {block.block_id for block in takewhile(lambda block: not block.is_null, reversed(table))}
        used = self._pool.num_gpu_blocks - 1 - self._pool.get_num_free_blocks()  # one is the null block
        return {
            "compressed_bytes": (used - len(windows) - len(others)) * self._block_bytes,
            "window_pages": len(windows),
            "kept_episodes": 0 if self._connector is None else len(self._connector.store),
        }
