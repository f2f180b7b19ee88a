# SPDX-License-Identifier: Apache-2.0
"""The worker's side of eviction: the guide prompt's forward pass, compaction, tables without freed pages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from vllm.forward_context import set_forward_context

from vllm_kvcompress import compat
from vllm_kvcompress.attention.backend import KVCompressMetadata
from vllm_kvcompress.attention.pages import PageSpec
from vllm_kvcompress.attention.window_layer import WindowMetadata
from vllm_kvcompress.attention.windows import WindowSpec
from vllm_kvcompress.checks import resolve
from vllm_kvcompress.episodic.policies import POLICIES

if TYPE_CHECKING:
    from vllm_kvcompress.attention.impl import KVCompressImpl
    from vllm_kvcompress.episodic.connector import NullRange, Order


class EvictionWorker:
    def __init__(self, vllm_config: Any, kv_cache_config: Any) -> None:
        self._config = vllm_config
        self._groups = [(group.kv_cache_spec, group.layer_names) for group in kv_cache_config.kv_cache_groups]
        self._context = vllm_config.compilation_config.static_forward_context

    def compact(self, order: Order) -> None:
        """Evict from one group's layers; the pages are still as the step before left them."""
        spec, layers = self._groups[order.group]
        queries = self._run(order, layers) if order.queries else {}
        table = order.tables[order.group]
        pages_in_use = -(-order.num_tokens // spec.block_size)
        null = range(order.eviction.budget_pages, order.begin)
        live = [page for index, page in enumerate(table[:pages_in_use]) if index not in null]
        num_slots = order.num_tokens - len(null) * spec.block_size
        device = self._config.device_config.device
        table_tensor = torch.tensor(live, dtype=torch.int64, device=device)
        targets = torch.tensor(order.targets, dtype=torch.int64, device=device)
        for name in layers:
            layer = self._context[name]
            layer.impl.compact(
                layer.kv_cache,
                table_tensor,
                num_slots,
                num_sources=order.end - len(null),
                targets=targets,
                policy=POLICIES[order.eviction.policy],
                protected_tokens=order.eviction.protected_tokens,
                queries=queries.get(name),
                is_first=not null,
            )

    def null(self, ranges: list[NullRange], attn_metadata: dict[str, Any]) -> None:
        """Take freed pages out of the step's tables: the runner only ever appends to its rows."""
        for group in sorted({item.group for item in ranges}):
            metadata = attn_metadata[self._groups[group][1][0]]
            table = metadata.block_table[: len(metadata.query_start_loc) - 1]  # padding may hold what is over
            for item, row in match_rows(table, [item for item in ranges if item.group == group]):
                table[row, item.begin : item.end] = 0
                if item.head:
                    table[row, : len(item.head)] = torch.tensor(item.head, dtype=table.dtype, device=table.device)

    def _run(self, order: Order, layers: list[str]) -> dict[str, torch.Tensor]:
        """Queries [Q, Hq, D] of every layer of a forward pass over the cache that leaves nothing behind in it."""
        count, device = len(order.queries), self._config.device_config.device
        found: dict[str, torch.Tensor] = {}
        observed: list[KVCompressImpl] = []
        for name in layers:
            impl = self._context[name].impl

            def keep(query: torch.Tensor, name: str = name) -> None:
                found[name] = query.detach().clone()

            impl.observe = keep
            observed.append(impl)
        model = compat.loaded_model(self._config)
        # A guide may not reach past the last position that RoPE has a phase for: it then begins somewhat earlier.
        first = max(0, min(order.position, self._config.model_config.max_model_len - count))
        try:
            with (
                set_forward_context(self._metadata(order, count), self._config, num_tokens=count, skip_compiled=True),
                torch.inference_mode(),
            ):
                model(
                    input_ids=torch.tensor(order.queries, device=device),
                    positions=torch.arange(first, first + count, device=device),
                )
        finally:
            for impl in observed:
                impl.observe = None
        return found

    def _metadata(self, order: Order, count: int) -> dict[str, Any]:
        """Attention metadata of one request with `count` new tokens that are not stored."""
        resolved, device = resolve(self._config), self._config.device_config.device
        nowhere = torch.full((count,), -1, dtype=torch.int64, device=device)
        found: dict[str, Any] = {}
        for number, (spec, layers) in enumerate(self._groups):
            table = torch.tensor([order.tables[number]], dtype=torch.int32, device=device)
            metadata: Any
            if isinstance(spec, WindowSpec):
                metadata = WindowMetadata(table, nowhere, spec.block_size)
            else:
                assert isinstance(spec, PageSpec)
                metadata = KVCompressMetadata(
                    num_actual_tokens=count,
                    query_start_loc=torch.tensor([0, count], dtype=torch.int32),
                    seq_lens=torch.tensor([order.position + count], dtype=torch.int32),
                    block_table=table,
                    slot_mapping=nowhere,
                    page_tokens=spec.block_size,
                    centres_pages=resolved.page_format.centring == "page",
                    sink_tokens=resolved.sink_tokens,
                    recent_tokens=resolved.recent_tokens,
                )
            found.update(dict.fromkeys(layers, metadata))
        return found


def match_rows(table: torch.Tensor, ranges: list[NullRange]) -> list[tuple[NullRange, int]]:
    """Which row of the step's table [R, max_pages] is which request's.

    A request's own row always fits it. Another may, by a page that it does not own any more; but the last page of
    whoever owned that before is its own alone, so by leaving out rows that are found the rest are.

    Raises:
        RuntimeError: a row cannot be told.
    """
    open_rows = {}
    for item in ranges:
        firsts = [item.first, *item.head[:1]]
        fits = torch.isin(table[:, 0], table.new_tensor(firsts)) & (table[:, item.tail_index] == item.tail)
        open_rows[item] = set(fits.nonzero().flatten().tolist())
    found = []
    while open_rows:
        sure = [item for item, rows in open_rows.items() if len(rows) == 1]
        if not sure:
            item, rows = next(iter(open_rows.items()))
            raise RuntimeError(f"page {item.tail} is the tail of {len(rows)} requests in this step")
        for item in sure:
            rows = open_rows.pop(item)
            if not rows:
                raise RuntimeError(f"page {item.tail} is the tail of no request in this step")
            (row,) = rows
            found.append((item, row))
            for others in open_rows.values():
                others.discard(row)
    return found
