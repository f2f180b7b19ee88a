# SPDX-License-Identifier: Apache-2.0
"""The torch path against the float64 oracle: random pages, tables, lengths, groups, head sizes and windows."""

from types import SimpleNamespace

import pytest
import torch

from vllm_kvcompress.attention.plan import MIN_TOKENS_FOR_OWN_MEAN, make_plan
from vllm_kvcompress.formats import format_names, get_format
from vllm_kvcompress.formats.base import SUPPORTED_HEAD_DIMS, read_pages, write_tokens
from vllm_kvcompress.kernels import torch_attention
from vllm_kvcompress.kernels.reference import attend_reference

PAGE, BLOCK = 128, 16
# float32 against float64: sums of up to 1500 products of O(1) terms, 1500 * 2^-24 = 9e-5 at worst, relative to the
# largest output of the head.
TOLERANCE = 1e-4


class Batch:
    """A random step: requests of (history, new) tokens whose caches are already filled."""

    def __init__(self, requests, heads, group, dim, page_format, sinks, recent, missing=0.0):
        self.layout = page_format.layout(dim, PAGE)
        self.sinks, self.recent = sinks, recent
        self.lens = requests
        seq = [past + new for past, new in requests]
        max_pages = max(-(-n // PAGE) for n in seq)
        max_blocks = max(-(-n // BLOCK) for n in seq)
        ids = torch.randperm(len(requests) * max_pages) + 1
        self.table = ids.view(len(requests), max_pages).int()
        window_ids = (torch.randperm(len(requests) * max_blocks) + 1).view(len(requests), max_blocks).int()
        window_ids[torch.rand(window_ids.shape) < missing] = 0
        self.window_table = window_ids
        # NaN where nobody wrote: a page's former life may have left any bytes in it, and reading them must show.
        self.pages = torch.full((ids.numel() + 1, heads, self.layout.head_bytes), 0xFF, dtype=torch.uint8)
        self.windows = torch.full((window_ids.numel() + 1, heads, BLOCK, 4 * dim), 0xFF, dtype=torch.uint8)
        starts = [0]
        for _, new in requests:
            starts.append(starts[-1] + new)
        self.starts, self.seq = torch.tensor(starts, dtype=torch.int32), torch.tensor(seq, dtype=torch.int32)
        total = starts[-1]
        self.q = torch.randn(total, heads * group, dim) * 2
        self.k, self.v = torch.randn(total, heads, dim) + 1, torch.randn(total, heads, dim)
        self.heads, self.group, self.dim = heads, group, dim
        if self.layout.k_mean is not None:
            mean = self.pages[:, :, self.layout.k_mean : self.layout.k_mean + 2 * dim].view(torch.float16)
            mean[1:] = torch.randn(mean[1:].shape).half()
        for row, (past, _) in enumerate(requests):
            positions = torch.arange(past)
            k, v = torch.randn(past, heads, dim), torch.randn(past, heads, dim)
            slots = self.table[row].long()[positions // PAGE] * PAGE + positions % PAGE
            write_tokens(self.pages, self.layout, slots, k, v, 1.0, 1.0)
            both = torch.cat((k, v), dim=-1).bfloat16()
            blocks = self.window_table[row].long()[positions // BLOCK]
            # Exact values go to every companion block, inside the windows or not: only those inside may be read.
            self.windows.view(torch.bfloat16)[blocks, :, positions % BLOCK] = both
        self.windows[0] = 0xFF
        self.slots = self._slots(self.table, PAGE)
        self.window_slots = self._slots(self.window_table, BLOCK)

    def _slots(self, table, size):
        slots = []
        for row, (past, new) in enumerate(self.lens):
            positions = torch.arange(past, past + new)
            slots.append(table[row].long()[positions // size] * size + positions % size)
        return torch.cat(slots)

    def plan(self, windows=True):
        metadata = SimpleNamespace(
            query_start_loc=self.starts,
            seq_lens=self.seq,
            block_table=self.table,
            slot_mapping=self.slots,
            page_tokens=PAGE,
            centres_pages=self.layout.k_mean is not None,
            sink_tokens=self.sinks,
            recent_tokens=self.recent,
        )
        companion = SimpleNamespace(block_table=self.window_table, slot_mapping=self.window_slots, block_size=BLOCK)
        return make_plan(metadata, companion if windows else None)

    def run(self, windows=True):
        out = torch.full_like(self.q, torch.nan)
        for group in self.plan(windows).groups:
            batch, new = group.tokens.shape
            rows = group.tokens.flatten()
            q = self.q[rows].view(batch, new, self.heads, self.group, self.dim).permute(0, 2, 3, 1, 4)
            k = self.k[rows].view(batch, new, self.heads, self.dim).transpose(1, 2)
            v = self.v[rows].view(batch, new, self.heads, self.dim).transpose(1, 2)
            if group.has_history:
                result = torch_attention.attend(
                    group, self.pages, self.layout, q, k, v, self.windows if windows else None, torch.bfloat16, 0.1
                )
            else:
                result = torch_attention.attend_first_chunk(q, k, v, 0.1)
            out[rows] = result.permute(0, 3, 1, 2, 4).reshape(batch * new, self.heads * self.group, self.dim)
        return out

    def reference(self, windows=True):
        return attend_reference(
            self.q,
            self.k,
            self.v,
            self.pages,
            self.layout,
            self.table,
            self.starts,
            self.seq,
            0.1,
            self.windows if windows else None,
            self.window_table,
            self.sinks,
            self.recent,
        )


def assert_close(got, expected):
    error = (got.double() - expected).abs().amax(dim=(0, 2)) / expected.abs().amax(dim=(0, 2))
    assert not torch.isnan(got).any()
    assert (error < TOLERANCE).all(), error


MIXED = [(0, 7), (300, 1), (129, 1), (0, 200), (640, 64), (1, 1), (128, 1), (77, 64), (1100, 3)]


@pytest.mark.parametrize("name", format_names())
@pytest.mark.parametrize("windows", [False, True])
def test_mixed_batch(name, windows):
    batch = Batch(MIXED, 2, 3, 64, get_format(name), 32, 128, missing=0.3)
    assert_close(batch.run(windows), batch.reference(windows))


@pytest.mark.parametrize("dim", SUPPORTED_HEAD_DIMS)
@pytest.mark.parametrize("group", [1, 2, 3, 4, 6, 7, 8, 9, 16])
def test_groups_and_head_sizes(dim, group):
    batch = Batch([(200, 1), (131, 1), (260, 5)], 2, group, dim, get_format("hadamard-int2"), 16, 40)
    assert_close(batch.run(), batch.reference())


@pytest.mark.parametrize("sinks,recent", [(0, 64), (64, 0), (5, 3), (4096, 4096), (130, 129)])
def test_window_sizes(sinks, recent):
    batch = Batch([(500, 1), (129, 1), (12, 1), (300, 20)], 1, 2, 64, get_format("int2"), sinks, recent, missing=0.2)
    assert_close(batch.run(), batch.reference())


def test_windows_change_the_result():
    """The comparisons above would hold if both sides ignored the windows."""
    batch = Batch([(500, 1)], 1, 2, 64, get_format("int2"), 32, 128)
    assert (batch.reference(True) - batch.reference(False)).abs().max() > 1e-2


def test_split_over_requests_is_the_same(monkeypatch):
    batch = Batch(MIXED, 2, 3, 64, get_format("oscar-int2"), 32, 128)
    whole = batch.run()
    monkeypatch.setattr(torch_attention, "_MAX_ELEMENTS", 1 << 15)
    assert_close(batch.run(), whole.double())


@pytest.mark.parametrize("name", format_names())
def test_store_writes_what_the_oracle_reads(name):
    batch = Batch(MIXED, 2, 1, 64, get_format(name), 32, 128, missing=0.5)
    plan = batch.plan()
    before = batch.pages.clone()
    torch_attention.store(batch.pages, batch.layout, plan, batch.k, batch.v, 1.0, 1.0, batch.windows, torch.bfloat16)
    keys, values = read_pages(batch.pages, batch.layout)
    k = keys[batch.slots // PAGE, :, batch.slots % PAGE]
    v = values[batch.slots // PAGE, :, batch.slots % PAGE]
    # Min-max range: at most half a step, and the step is at most a third of the row's range, which centring on a page
    # mean cannot make larger than range + spread of the means (|x - m| <= 12 for these normals).
    for got, exact in ((k, batch.k), (v, batch.v)):
        step = (exact.amax(-1) - exact.amin(-1) + 8) / 3
        assert ((got - exact).abs().amax(-1) < step).all()
        assert (got - exact).pow(2).mean() < 0.35 * exact.var()
    written = torch.zeros(len(batch.pages), dtype=torch.bool)
    written[batch.slots // PAGE] = True
    assert torch.equal(batch.pages[~written], before[~written])
    real = batch.window_slots >= BLOCK
    stored = batch.windows.view(torch.bfloat16)[batch.window_slots[real] // BLOCK, :, batch.window_slots[real] % BLOCK]
    assert torch.equal(stored, torch.cat((batch.k, batch.v), dim=-1).bfloat16()[real])
    assert (batch.windows[0] == 0xFF).all() and (batch.pages[0] == 0xFF).all(), "the null blocks are never written"


def test_padding_slots_are_not_stored():
    batch = Batch([(5, 3), (0, 4)], 1, 1, 64, get_format("int2"), 0, 0)
    batch.slots[2] = -1
    batch.slots[4] = 17  # inside the null page
    before = batch.pages.clone()
    plan = batch.plan(windows=False)
    assert plan.stored_tokens.tolist() == [0, 1, 3, 5, 6]
    torch_attention.store(batch.pages, batch.layout, plan, batch.k, batch.v, 1.0, 1.0, None, torch.bfloat16)
    assert torch.equal(batch.pages[0], before[0])


def page_mean(batch, page):
    layout = batch.layout
    return batch.pages[page, :, layout.k_mean : layout.k_mean + 2 * batch.dim].view(torch.float16).double()


def page_mean_reference(batch, request, page_index):
    """The rule in float64, before anything is stored: [H, D] mean key of a page that the step begins."""
    past, new = batch.lens[request]
    first = int(batch.starts[request]) - past  # row of position 0
    begin = page_index * PAGE
    run = range(begin, min(begin + PAGE, past + new))
    if len(run) < MIN_TOKENS_FOR_OWN_MEAN and page_index > 0:
        run = range(begin - PAGE, begin)
    old, _ = read_pages(batch.pages[batch.table[request, page_index - 1 : page_index].long()], batch.layout)
    keys = [batch.k[first + t] if t >= past else old[0, :, t % PAGE] for t in run]
    return torch.stack(keys).double().mean(0)


def test_page_means():
    """A page begun with enough tokens is centred on them, with few on the page before it."""
    begun = {
        (0, 300): [0, 1, 2],  # own means, the last of 44 tokens
        (128, 1): [1],  # of one token: the previous page, all of it old
        (127, 3): [1],  # the previous page completed in this very step
        (120, 40): [1],  # own mean of 32 tokens, just enough
        (120, 39): [1],  # one too few: 120 old and 8 new
        (0, 135): [0, 1],  # the previous page begun and completed in this step
        (100, 160): [1, 2],  # the same after a page that was begun before
        (0, 5): [0],  # no previous page: few tokens are enough
        (3, 20): [],
    }
    batch = Batch(list(begun), 2, 1, 64, get_format("hadamard-int2"), 0, 0)
    pairs = [(request, index) for request, indices in enumerate(begun.values()) for index in indices]
    expected = [page_mean_reference(batch, *pair) for pair in pairs]
    before = batch.pages.clone()
    torch_attention.store(
        batch.pages, batch.layout, batch.plan(False), batch.k, batch.v, 1.0, 1.0, None, torch.bfloat16
    )
    table = batch.table.long()
    for (request, index), mean in zip(pairs, expected, strict=True):
        # fp16 rounding of a mean below 4 in magnitude: 2^-10; float32 sums of 128 tokens are 2^-17 of it off at worst.
        torch.testing.assert_close(page_mean(batch, table[request, index]), mean, rtol=2**-17, atol=2**-10)
    # No other mean has changed.
    others = torch.ones(len(batch.pages), dtype=torch.bool)
    others[table[tuple(torch.tensor(pairs).T)]] = False
    mean_bytes = slice(batch.layout.k_mean, batch.layout.k_mean + 2 * batch.dim)
    assert torch.equal(batch.pages[others, :, mean_bytes], before[others, :, mean_bytes])


def test_page_means_skip_tokens_that_are_not_stored():
    batch = Batch([(120, 10), (0, 40)], 2, 1, 64, get_format("hadamard-int2"), 0, 0)
    previous, _ = read_pages(batch.pages[batch.table[0, :1].long()], batch.layout)
    unstored = torch.tensor([1, 7, 10 + 3, 10 + 39])
    batch.slots[unstored] = -1
    batch.k[unstored] = torch.nan
    torch_attention.store(
        batch.pages, batch.layout, batch.plan(False), batch.k, batch.v, 1.0, 1.0, None, torch.bfloat16
    )
    borrowed = torch.cat((previous[0, :, :120].transpose(0, 1), batch.k[[0, 2, 3, 4, 5, 6]])).double().mean(0)
    own = batch.k[[row for row in range(10, 50) if row not in unstored]].double().mean(0)
    for page, mean in ((batch.table[0, 1], borrowed), (batch.table[1, 0], own)):
        torch.testing.assert_close(page_mean(batch, page.long()), mean, rtol=2**-17, atol=2**-10)


def test_page_mean_is_fixed_once_begun():
    batch = Batch([(40, 60)], 2, 1, 64, get_format("hadamard-int2"), 0, 0)
    before = page_mean(batch, batch.table[0, 0].long()).clone()
    torch_attention.store(
        batch.pages, batch.layout, batch.plan(False), batch.k, batch.v, 1.0, 1.0, None, torch.bfloat16
    )
    assert torch.equal(page_mean(batch, batch.table[0, 0].long()), before)
