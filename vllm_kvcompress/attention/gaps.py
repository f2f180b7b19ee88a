# SPDX-License-Identifier: Apache-2.0
"""Evicted pages taken out of a step's metadata: what a request keeps and what it has read since then join.

A kernel of any backend then sees a shorter request. Positions are in the keys, and order means nothing to a query that
comes after all of them; windows and pages begun are counted from the end of the table, which moves along. The runner
only ever appends to its rows, and says which pages a step reads before it tells a connector of the step: so the step's
metadata is built a second time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from vllm.v1.attention.backend import AttentionMetadataBuilder, CommonAttentionMetadata

from vllm_kvcompress.checks import evicts
from vllm_kvcompress.kernels.transfer import to_device

M = TypeVar("M")


@dataclass(frozen=True)
class Gap:
    """Pages [begin, end) of a row are gone; its first blocks are `head`, unless that is empty."""

    row: int
    begin: int
    end: int
    head: tuple[int, ...] = ()


@dataclass
class Origin:
    """What a step's metadata was made of."""

    builder: ClosesGaps[Any]
    common: CommonAttentionMetadata


class ClosesGaps(AttentionMetadataBuilder[M], Generic[M]):
    """Builders whose metadata can be built again without a request's evicted pages."""

    packed: tuple[Sequence[Gap], torch.Tensor] | None = None
    """Gaps of an earlier step, and what the kernel reads of them: most steps have those of the step before"""

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
            if self._seq_lens.device.type == "cuda":
                # The kernel is compiled now and not while a request waits: a row of no length has nothing to move.
                _close_packed(self, common.block_table_tensor, self._seq_lens, [Gap(0, 0, 0)], 1)
        lengths = self._seq_lens[: len(common.seq_lens)].copy_(common.seq_lens)
        common = replace(common, seq_lens=lengths)
        metadata: Any = self.make(common)
        metadata.origin = Origin(self, common)
        return metadata


def close_gaps(metadata: Any, gaps: Sequence[Gap], page_tokens: int) -> None:
    """Build a step's metadata again, in place, without the gaps.

    Args:
        metadata: of `ClosesGaps.build`.
        gaps: at most one a row, in pages of `page_tokens` tokens: a multiple of the group's own block.
    """
    builder, common = metadata.origin.builder, metadata.origin.common
    table, block_tokens = common.block_table_tensor, builder.kv_cache_spec.block_size
    if table.device.type == "cuda":
        _close_packed(builder, table, common.seq_lens, gaps, page_tokens // block_tokens)
    else:
        # There the runner's own rows share this memory. On a GPU they do not, and captured graphs read it.
        table = table.clone()
        close_rows(table, common.seq_lens, gaps, page_tokens // block_tokens, block_tokens)
    bounds, longest = common.seq_lens_cpu_upper_bound, common.max_seq_len
    if bounds is not None:
        shorter = bounds.numpy().copy()
        shorter[[gap.row for gap in gaps]] -= np.array([gap.end - gap.begin for gap in gaps]) * page_tokens
        bounds, longest = torch.from_numpy(shorter), int(shorter[: common.num_reqs].max())
    common = replace(common, block_table_tensor=table, seq_lens_cpu_upper_bound=bounds, max_seq_len=longest)
    vars(metadata).update(vars(builder.make(common)))


def close_rows(
    table: torch.Tensor, seq_lens: torch.Tensor, gaps: Sequence[Gap], per_page: int, block_tokens: int
) -> None:
    """Move what follows a row's gap to where the gap begins, and shorten its request.

    Args:
        table: [R, max_blocks] int32; changed.
        seq_lens: [R] int32; changed.
        per_page: blocks of a gap's page, of `block_tokens` tokens each.
    """
    for gap in gaps:
        row, begin, end = table[gap.row], gap.begin * per_page, gap.end * per_page
        tail = row[end : -(-int(seq_lens[gap.row]) // block_tokens)].clone()
        row[begin : begin + len(tail)] = tail
        row[: len(gap.head)] = torch.tensor(gap.head, dtype=row.dtype)
        seq_lens[gap.row] -= (end - begin) * block_tokens


def _close_packed(
    builder: ClosesGaps[Any], table: torch.Tensor, seq_lens: torch.Tensor, gaps: Sequence[Gap], per_page: int
) -> None:
    """`close_rows` on a GPU, in one launch; what it is told is copied there only where it has changed."""
    from vllm_kvcompress.triton_kernels import gaps as kernel

    if builder.packed is None or builder.packed[0] != gaps:
        builder.packed = gaps, to_device(pack(gaps, per_page), torch.int32, table.device)
    kernel.close_rows(table, seq_lens, builder.packed[1], len(gaps), builder.kv_cache_spec.block_size)


def pack(gaps: Sequence[Gap], per_page: int) -> list[int]:
    """What `triton_kernels.gaps.close_rows` reads: five numbers a gap, then the rows' new first blocks."""
    numbers: list[int] = []
    heads: list[int] = []
    for gap in gaps:
        head = 5 * len(gaps) + len(heads)
        numbers += [gap.row, gap.begin * per_page, gap.end * per_page, head, len(gap.head)]
        heads += gap.head
    return numbers + heads
