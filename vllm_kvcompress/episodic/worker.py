# SPDX-License-Identifier: Apache-2.0
"""The worker's side of eviction: forward passes whose queries score, compaction, steps without freed pages."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_kvcompress import compat
from vllm_kvcompress.attention import plain
from vllm_kvcompress.attention.gaps import ClosesGaps, Gap, close_gaps
from vllm_kvcompress.attention.impl import KVCompressImpl
from vllm_kvcompress.attention.pages import PageSpec
from vllm_kvcompress.attention.window_layer import WINDOW_SUFFIX
from vllm_kvcompress.episodic.host import HostPages
from vllm_kvcompress.episodic.policies import POLICIES, Policy, protected_slots, select, select_without_waiting
from vllm_kvcompress.kernels.transfer import to_device

if TYPE_CHECKING:
    from vllm_kvcompress.episodic.connector import NullRange, Order

_QUERY_BYTES = 64 << 20
"""Of queries that wait for those of other layers, to be scored with in the same launches."""


class EvictionWorker:
    def __init__(self, vllm_config: Any, kv_cache_config: Any) -> None:
        self._config = vllm_config
        self._groups = [(group.kv_cache_spec, group.layer_names) for group in kv_cache_config.kv_cache_groups]
        self._context = vllm_config.compilation_config.static_forward_context
        self._pages_of = {
            number: next(
                other
                for other, (_, layers) in enumerate(self._groups)
                if names[0].removesuffix(WINDOW_SUFFIX) in layers
            )
            for number, (_, names) in enumerate(self._groups)
        }
        """Group of the pages that a group is, or is the windows of"""
        self.host: HostPages | None = None
        """Where kept episodes are spilled to, if anywhere"""
        self._summed: dict[str, dict[int, torch.Tensor]] = {}
        """Request -> group -> [L, H, T] float32 in host memory: scores that add up, of the slots it was left with"""

    def allocate_host_memory(self, num_slots: int) -> None:
        """Once the pages are allocated; at start, so that a machine that has not got it says so then."""
        # Groups lie in the same memory, and have equally many layers.
        layers = next(names for spec, names in self._groups if isinstance(spec, PageSpec))
        self.host = HostPages([self._context[name].kv_cache for name in layers], num_slots)

    def forget(self, request_ids: Iterable[str]) -> None:
        """Let go of scores that nobody goes on from."""
        for request_id in request_ids:
            self._summed.pop(request_id, None)

    def compact(self, order: Order) -> None:
        """Evict from the layers of some groups; the pages are still as the step before left them."""
        policy, device = POLICIES[order.eviction.policy], self._config.device_config.device
        choose = select if device.type == "cpu" else select_without_waiting
        due = [part.group for part in order.parts]
        # Sums go on in every layer: once some have evicted, none can be read as it was before.
        every = [number for number, (spec, _) in enumerate(self._groups) if isinstance(spec, PageSpec)]
        scores = self._score(order, policy, every if policy.accumulates else due)
        for part in order.parts:
            spec, names = self._groups[part.group]
            page_tokens, (begin, end) = spec.block_size, order.nulls[part.group]
            table, targets = (
                to_device(pages, torch.int64, device) for pages in (self._live(order, part.group), part.targets)
            )
            sources = (part.end - (end - begin)) * page_tokens
            num_slots = order.num_tokens - self._null_tokens(order, part.group)
            budget, leading = len(part.targets) * page_tokens, order.eviction.protected_tokens
            protected = protected_slots(policy, num_slots, sources, budget, leading, device)
            layers, found = [self._context[name] for name in names], scores[part.group]
            kept = choose(found[..., :sources].flatten(0, 1), budget, protected).unflatten(0, (len(names), -1))
            if isinstance(layers[0].impl, KVCompressImpl):
                KVCompressImpl.compact(layers, table, targets, kept, is_first=begin == end)
            else:
                plain.compact(layers, table, targets, kept)
            if policy.accumulates:
                scores[part.group] = torch.cat([found.gather(2, kept), found[..., sources:]], dim=2)
        if policy.accumulates:
            self._summed[order.request_id] = {group: x.to("cpu", non_blocking=True) for group, x in scores.items()}

    def _score(self, order: Order, policy: Policy, groups: Sequence[int]) -> dict[int, torch.Tensor]:
        """[L, H, T] float32 of the layers of some groups, of all slots up to `order.num_tokens`."""
        device = self._config.device_config.device
        tables = {group: to_device(self._live(order, group), torch.int64, device) for group in groups}
        scores: dict[int, torch.Tensor] = {}
        if policy.accumulates:
            for group, before in self._summed.get(order.carried, {}).items():
                known = order.position - self._null_tokens(order, group)
                # Cut on the device: the host may not have got all of it yet.
                scores[group] = before.to(device, non_blocking=True)[..., :known]
        if policy.queries == "none":
            for group in groups:
                layers = [self._context[name] for name in self._groups[group][1]]
                num_slots = order.num_tokens - self._null_tokens(order, group)
                scores[group] = self._score_layers(layers, tables[group], num_slots, policy, None, None)
        # A block is read in steps of the length that the scheduler's have.
        most = order.eviction.block_tokens if policy.accumulates else len(order.queries)
        for first in range(0, len(order.queries), most or 1):
            tokens, position = order.queries[first : first + most], order.position + first
            scores = self._score_by_pass(order, policy, tokens, position, tables, scores)
        return scores

    def _score_by_pass(
        self,
        order: Order,
        policy: Policy,
        tokens: list[int],
        position: int,
        tables: dict[int, torch.Tensor],
        previous: dict[int, torch.Tensor],
    ) -> dict[int, torch.Tensor]:
        """Scores of the groups in `tables` by queries of tokens that begin at `position`."""
        end = min(order.num_tokens, position + len(tokens))
        places = {name: (group, at) for group in tables for at, name in enumerate(self._groups[group][1])}
        heard: dict[str, torch.Tensor] = {}
        found: dict[tuple[int, int], torch.Tensor] = {}

        # A layer can be scored at any time in the pass, which writes nothing that its slots before `end` are read from.
        def listen(name: str, queries: torch.Tensor) -> None:
            heard[name] = queries.clone()  # the layer's own are activations, whose memory others get
            group, at = places[name]
            at_once = max(1, _QUERY_BYTES // queries.nbytes)
            begin = at // at_once * at_once
            names = self._groups[group][1][begin : begin + at_once]
            if not heard.keys() >= set(names):
                return
            layers, asked = [self._context[one] for one in names], [heard.pop(one) for one in names]
            before = previous[group][begin : begin + at_once] if group in previous else None
            num_slots = end - self._null_tokens(order, group)
            found[group, begin] = self._score_layers(layers, tables[group], num_slots, policy, asked, before)

        self._run(order, tokens, position, list(places), listen)
        return {group: torch.cat([found[key] for key in sorted(found) if key[0] == group]) for group in tables}

    def _score_layers(self, layers: Sequence[Any], *arguments: Any) -> torch.Tensor:
        """`plain.score`, of whatever pages the layers have."""
        if isinstance(layers[0].impl, KVCompressImpl):
            return KVCompressImpl.score(layers, *arguments)
        return plain.score(layers, *arguments)

    def close_gaps(
        self, ranges: list[NullRange], attn_metadata: dict[str, Any], request_ids: Sequence[str] | None
    ) -> None:
        """Take freed pages out of the step's metadata.

        Args:
            request_ids: of the rows; None: the runner does not say.
        """
        for pages in sorted({item.group for item in ranges}):
            page_tokens = self._groups[pages][0].block_size
            metadata = attn_metadata[self._groups[pages][1][0]]
            own = [item for item in ranges if item.group == pages]
            if request_ids is None:
                common = metadata.origin.common
                rows = match_rows(common.block_table_tensor[: common.num_reqs], own)
            else:
                rows = [(item, request_ids.index(item.request_id)) for item in own]
            gaps = [Gap(row, item.begin, item.end, item.head) for item, row in rows]
            close_gaps(metadata, gaps, page_tokens)
            gaps = [replace(gap, head=()) for gap in gaps]
            for windows, of in self._pages_of.items():
                if of == pages != windows:
                    close_gaps(attn_metadata[self._groups[windows][1][0]], gaps, page_tokens)

    def _live(self, order: Order, group: int) -> list[int]:
        """Blocks of a group's table as they lie once the gap in the pages is closed; 0 where null."""
        spec = self._groups[group][0]
        pages = self._pages_of[group]
        per_page = self._groups[pages][0].block_size // spec.block_size
        table = order.tables[group][: -(-order.num_tokens // spec.block_size)]
        begin, end = (page * per_page for page in order.nulls[pages])
        return table[:begin] + table[end:]

    def _null_tokens(self, order: Order, group: int) -> int:
        """Tokens of the gap."""
        pages = self._pages_of[group]
        begin, end = order.nulls[pages]
        return (end - begin) * self._groups[pages][0].block_size

    def _run(
        self,
        order: Order,
        tokens: list[int],
        position: int,
        layers: list[str],
        listen: Callable[[str, torch.Tensor], None],
    ) -> None:
        """A forward pass of tokens that begin at `position`, over the cache before them; it leaves nothing in it.

        Args:
            listen: called for each of the layers by its name, before its attention, with queries [Q, Hq, D].
        """
        count, device = len(tokens), self._config.device_config.device

        def take(name: str, layer: Any, arguments: tuple[torch.Tensor, ...]) -> None:
            listen(name, arguments[0].detach().view(count, -1, layer.head_size))

        hooks = [self._context[name].register_forward_pre_hook(functools.partial(take, name)) for name in layers]
        model = compat.loaded_model(self._config)
        # A guide may not reach past the last position that RoPE has a phase for: it then begins somewhat earlier.
        first = max(0, min(position, self._config.model_config.max_model_len - count))
        metadata, slots = self._metadata(order, position, count)
        try:
            with (
                set_forward_context(metadata, self._config, num_tokens=count, slot_mapping=slots, skip_compiled=True),
                torch.inference_mode(),
            ):
                model(
                    input_ids=to_device(tokens, torch.int64, device),
                    positions=torch.arange(first, first + count, device=device),
                )
        finally:
            for hook in hooks:
                hook.remove()

    def _metadata(self, order: Order, position: int, count: int) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """By layer, metadata and slots of one request with `count` tokens from `position`, stored in scratch alone."""
        device = self._config.device_config.device
        starts = torch.tensor([0, count], dtype=torch.int32)
        slots = [-1] * count
        found: dict[str, Any] = {}
        found_slots: dict[str, torch.Tensor] = {}
        for number, (spec, layers) in enumerate(self._groups):
            table = self._live(order, number)
            length = position - self._null_tokens(order, number) + count
            if order.scratch:
                # Behind what there is: the rest of the last page, which this step writes over, then scratch.
                page_tokens = spec.block_size
                table = table + order.scratch
                places = range(length - count, length)
                slots = [table[at // page_tokens] * page_tokens + at % page_tokens for at in places]
            common = CommonAttentionMetadata(
                query_start_loc=to_device([0, count], torch.int32, device),
                query_start_loc_cpu=starts,
                seq_lens=to_device([length], torch.int32, device),
                seq_lens_cpu_upper_bound=torch.tensor([length], dtype=torch.int32),
                num_reqs=1,
                num_actual_tokens=count,
                max_query_len=count,
                max_seq_len=length,
                block_table_tensor=to_device([table], torch.int32, device),
                slot_mapping=to_device(slots, torch.int64, device),
            )
            found.update(dict.fromkeys(layers, self._builder(number).make(common)))
            found_slots.update(dict.fromkeys(layers, common.slot_mapping))
        return found, found_slots

    @functools.cache  # noqa: B019  # as long as the worker
    def _builder(self, group: int) -> ClosesGaps[Any]:
        """A builder beside the runner's, whose metadata is not this step's."""
        spec, layers = self._groups[group]
        builder = self._context[layers[0]].get_attn_backend().get_builder_cls()
        return builder(spec, layers, self._config, self._config.device_config.device)


def match_rows(table: torch.Tensor, ranges: list[NullRange]) -> list[tuple[NullRange, int]]:
    """Which row of the step's table [R, max_pages] is which request's.

    A request's own row always fits it. Another may, by a page that it does not own any more; but the last page of
    whoever owned that before is its own alone, so by leaving out rows that are found the rest are.

    Raises:
        RuntimeError: a row cannot be told.
    """
    open_rows = {}
    for item in ranges:
        fits = (table[:, 0] == item.first) & (table[:, item.tail_index] == item.tail)
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
