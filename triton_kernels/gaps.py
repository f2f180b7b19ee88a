# SPDX-License-Identifier: Apache-2.0
"""Rows of a step's block table without evicted pages. The torch reference is `close_rows` of `attention.gaps`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

FIELDS = tl.constexpr(5)
"""int32 of a gap: row, first block of the gap, end of it, where the row's new first blocks are, how many those are"""
COLUMNS = tl.constexpr(1024)


def close_rows(
    table: torch.Tensor, seq_lens: torch.Tensor, gaps: torch.Tensor, num_gaps: int, block_tokens: int
) -> None:
    """Move what follows a row's gap to where the gap begins, and shorten its request. Never waits for the device.

    Args:
        table: [R, max_blocks] int32, rows contiguous; changed.
        seq_lens: [R] int32; changed.
        gaps: int32, `FIELDS` of each gap, then the new first blocks; at most one gap a row.
        num_gaps: how many there are.
        block_tokens: tokens of a block.

    Raises:
        ValueError: dtypes or strides do not fit.
    """
    if any(x.dtype != torch.int32 or x.stride(-1) != 1 for x in (table, seq_lens, gaps)):
        raise ValueError(
            "table, seq_lens and gaps must be int32 with contiguous rows, got "
            f"{[(str(x.dtype), x.stride()) for x in (table, seq_lens, gaps)]}"
        )
    _close_kernel[(num_gaps,)](table, table.stride(0), table.shape[1], seq_lens, gaps, block_tokens)


@triton.jit
def _close_kernel(table_ptr, table_stride, width, seq_lens_ptr, gaps_ptr, block_tokens):
    gap_ptr = gaps_ptr + tl.program_id(0) * FIELDS
    row, begin, end = tl.load(gap_ptr), tl.load(gap_ptr + 1), tl.load(gap_ptr + 2)
    head, count = tl.load(gap_ptr + 3), tl.load(gap_ptr + 4)
    length = tl.load(seq_lens_ptr + row)
    row_ptr = table_ptr + row.to(tl.int64) * table_stride
    columns = tl.arange(0, COLUMNS)
    tail = tl.minimum(tl.cdiv(length, block_tokens), width) - end
    for first in range(0, tail, COLUMNS):
        # To the left, from the left: nobody's source is written before it is read.
        at = first + columns
        blocks = tl.load(row_ptr + end + at, mask=at < tail)
        tl.debug_barrier()
        tl.store(row_ptr + begin + at, blocks, mask=at < tail)
        tl.debug_barrier()
    for first in range(0, count, COLUMNS):
        at = first + columns
        blocks = tl.load(gaps_ptr + head + at, mask=at < count)
        tl.store(row_ptr + at, blocks, mask=at < count)
    tl.store(seq_lens_ptr + row, length - (end - begin) * block_tokens)
