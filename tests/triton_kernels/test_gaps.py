# SPDX-License-Identifier: Apache-2.0
"""Rows without their gaps, block by block; the kernel does what the reference does."""

import random

import pytest
import torch

from vllm_kvcompress.attention.gaps import Gap, close_rows, pack
from vllm_kvcompress.triton_kernels import gaps as kernel

PAGE_TOKENS = 128


def random_step(rng, per_page, longest):
    """A table of distinct blocks, lengths, and gaps of some of the rows in any order."""
    rows, block_tokens = rng.randrange(1, 7), PAGE_TOKENS // per_page
    table = torch.randperm(rows * longest * per_page, dtype=torch.int32).view(rows, -1)
    lengths = torch.empty(rows, dtype=torch.int32)
    gaps = []
    for row in range(rows):
        begin = rng.randrange(1, longest // 2)
        end = rng.randrange(begin + 1, longest - 1)
        # Up to the last place of the table, and a page that is only begun.
        lengths[row] = rng.choice([longest * PAGE_TOKENS, rng.randrange(end * PAGE_TOKENS + 1, longest * PAGE_TOKENS)])
        head = tuple(rng.randrange(10**6, 2 * 10**6) for _ in range(rng.choice([0, begin]))) if per_page == 1 else ()
        gaps.append(Gap(row, begin, end, head))
    rng.shuffle(gaps)
    return table, lengths, gaps[: rng.randrange(1, rows + 1)], block_tokens


@pytest.mark.parametrize("per_page", [1, 8])
def test_rows_without_their_gaps(per_page):
    rng = random.Random(torch.initial_seed())
    for _ in range(20):
        table, lengths, gaps, block_tokens = random_step(rng, per_page, 40)
        before, before_lengths = table.tolist(), lengths.tolist()
        close_rows(table, lengths, gaps, per_page, block_tokens)
        of = {gap.row: gap for gap in gaps}
        for row, (blocks, length) in enumerate(zip(before, before_lengths, strict=True)):
            live = blocks[: -(-length // block_tokens)]
            if row in of:
                gap = of[row]
                del live[gap.begin * per_page : gap.end * per_page]
                live[: len(gap.head)] = gap.head
                length -= (gap.end - gap.begin) * PAGE_TOKENS
            assert lengths[row] == length
            assert table[row, : len(live)].tolist() == live


@pytest.mark.parametrize(("per_page", "longest"), [(1, 20), (8, 20), (1, 3000), (8, 400)])
def test_kernel(per_page, longest, device):
    """Also of more columns than are moved at once, onto places that they are moved from."""
    rng = random.Random(torch.initial_seed())
    for _ in range(3):
        table, lengths, gaps, block_tokens = random_step(rng, per_page, longest)
        found = [x.to(device, copy=True) for x in (table, lengths)]
        close_rows(table, lengths, gaps, per_page, block_tokens)
        packed = torch.tensor(pack(gaps, per_page), dtype=torch.int32, device=device)
        kernel.close_rows(*found, packed, len(gaps), block_tokens)
        assert torch.equal(found[0].cpu(), table) and torch.equal(found[1].cpu(), lengths)


def test_what_the_kernel_cannot_read():
    table, lengths = torch.zeros(2, 4, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    for wrong in ((table.long(), lengths, lengths), (table.t(), lengths, lengths), (table, lengths.float(), lengths)):
        with pytest.raises(ValueError, match="must be int32 with contiguous rows"):
            kernel.close_rows(*wrong, 0, 128)
