# SPDX-License-Identifier: Apache-2.0
"""Evicted pages taken out of a step's metadata: what a request keeps and what it has read since then join.

A kernel of any backend then sees a shorter request. Positions are in the keys, and order means nothing to a query that
comes after all of them; windows and pages begun are counted from the end of the table, which moves along. The runner
only ever appends to its rows, and says which pages a step reads before it tells a connector of the step: so the step's
metadata is built a second time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch
from vllm.v1.attention.backend import AttentionMetadataBuilder, CommonAttentionMetadata

from vllm_kvcompress.checks import evicts
from vllm_kvcompress.kernels.transfer import to_device

M = TypeVar("M")


@dataclass(frozen=True)
class Gap:
    """Pages [begin, end) of a row of `length` pages are gone; its first blocks are `head`, unless that is empty."""

    row: int
    begin: int
    end: int
    length: int
    head: tuple[int, ...] = ()


@dataclass
class Origin:
    """What a step's metadata was made of."""

    builder: ClosesGaps[Any]
    common: CommonAttentionMetadata


class ClosesGaps(AttentionMetadataBuilder[M], Generic[M]):
    """Builders whose metadata can be built again without a request's evicted pages."""

    def make(self, common: CommonAttentionMetadata) -> M:
        raise NotImplementedError

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> M:
        common = common_attn_metadata
        if not evicts(self.vllm_config):
            return self.make(common)
        # Lengths of our own: the runner's are true, and other groups' tables have other gaps. In one place, for
        # captured graphs read them.
        if not hasattr(self, "_seq_lens"):
            most = self.vllm_config.scheduler_config.max_num_seqs
            self._seq_lens = common.seq_lens.new_zeros(max(most, len(common.seq_lens)))
        lengths = self._seq_lens[: len(common.seq_lens)].copy_(common.seq_lens)
        common = replace(common, seq_lens=lengths)
        metadata: Any = self.make(common)
        metadata.origin = Origin(self, common)
        return metadata


def close_gaps(metadata: Any, gaps: list[Gap], page_tokens: int) -> None:
    """Build a step's metadata again, in place, without the gaps.

    Args:
        metadata: of `ClosesGaps.build`.
        gaps: at most one a row, in pages of `page_tokens` tokens: a multiple of the group's own block.
    """
    builder, common = metadata.origin.builder, metadata.origin.common
    table = common.block_table_tensor
    if table.device.type == "cpu":
        # There the runner's own rows share this memory. On a GPU they do not, and captured graphs read it.
        table = table.clone()
    per_page = page_tokens // builder.kv_cache_spec.block_size
    _move_tails(table, gaps, per_page)
    _replace_heads(table, [gap for gap in gaps if gap.head])
    shorter = {gap.row: (gap.end - gap.begin) * page_tokens for gap in gaps}
    rows = to_device(list(shorter), torch.int64, table.device)
    common.seq_lens.index_add_(0, rows, -to_device(list(shorter.values()), common.seq_lens.dtype, table.device))
    bounds, longest = common.seq_lens_cpu_upper_bound, common.max_seq_len
    if bounds is not None:
        bounds = bounds.clone()
        bounds[list(shorter)] -= torch.tensor(list(shorter.values()), dtype=bounds.dtype)
        longest = int(bounds[: common.num_reqs].max())
    common = replace(common, block_table_tensor=table, seq_lens_cpu_upper_bound=bounds, max_seq_len=longest)
    vars(metadata).update(vars(builder.make(common)))


def _move_tails(table: torch.Tensor, gaps: list[Gap], per_page: int) -> None:
    rows: list[int] = []
    sources: list[int] = []
    targets: list[int] = []
    for gap in gaps:
        begin, end, length = (min(pages * per_page, table.shape[1]) for pages in (gap.begin, gap.end, gap.length))
        rows += [gap.row] * (length - end)
        sources += range(end, length)
        targets += range(begin, begin + length - end)
    row, source, target = to_device([rows, sources, targets], torch.int64, table.device)
    table[row, target] = table[row, source]


def _replace_heads(table: torch.Tensor, gaps: list[Gap]) -> None:
    if not gaps:
        return
    cells = [(gap.row, column, page) for gap in gaps for column, page in enumerate(gap.head)]
    row, column, page = to_device([list(part) for part in zip(*cells, strict=True)], torch.int64, table.device)
    table[row, column] = page.to(table.dtype)
