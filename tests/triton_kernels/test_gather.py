# SPDX-License-Identifier: Apache-2.0
"""Gathered history against dequantised pages and the windows' own values, token by token."""

import pytest
import torch

from vllm_kvcompress.formats import format_names, get_format
from vllm_kvcompress.formats.base import SUPPORTED_HEAD_DIMS, page_fields, read_pages
from vllm_kvcompress.quantizers import qjl
from vllm_kvcompress.triton_kernels.gather import gather_history

BLOCK = 16
# Rounding to fp16 is the last step, 2^-11 of the value. Before it float32 rounds a product and two sums, 2^-24 each of
# terms of at most 16 here, which shows where they cancel.
RTOL, ATOL = 2**-11 + 2**-20, 2**-18
# Lloyd-Max levels are fp16 themselves: three roundings of at most 2^-11, two of them of a level's bend alone, a third
# of it. Norms here are below 5 and levels below 0.6: 5 * 0.6 * 5/3 * 2^-11 = 2.4e-3, seen where a mean cancels them.
# The sketch is fp16: 2^-12 of D terms of 0.8 on average, times the norm and sqrt(pi / 2) / D: 1.2e-3 if all agree.
LEVEL_ATOL = 4e-3


class History:
    """Random pages, windows and tables of requests of (history, new) tokens; 0xFF, which is NaN, where nobody wrote."""

    def __init__(
        self, requests, name="oscar-int2", dim=64, heads=2, page_tokens=128, dtype=torch.bfloat16, missing=0.2
    ):
        self.requests, self.dim, self.heads, self.dtype = requests, dim, heads, dtype
        self.layout = get_format(name).layout(dim, page_tokens)
        self.sketch = None
        if self.layout.keys.signs is not None:
            self.sketch = qjl.sketch_matrix(dim, 0, orthogonal=True).half().contiguous()
        self.history = [past for past, _ in requests]
        count, longest = len(requests), max(1, *self.history)
        max_pages, max_blocks = -(-longest // page_tokens), -(-longest // BLOCK)
        self.table = (torch.randperm(count * max_pages) + 1).view(count, max_pages).int()
        self.window_table = (torch.randperm(count * max_blocks) + 1).view(count, max_blocks).int()
        self.window_table[torch.rand(self.window_table.shape) < missing] = 0
        bytes_per_page = heads * self.layout.head_bytes
        padded = torch.full((count * max_pages + 1, bytes_per_page + 32), 0xFF, dtype=torch.uint8)
        self.pages = padded[:, :bytes_per_page].view(-1, heads, self.layout.head_bytes)
        self.windows = torch.full((count * max_blocks + 1, heads, BLOCK, 4 * dim), 0xFF, dtype=torch.uint8)
        fields = page_fields(self.pages, self.layout)
        typed = self.windows.view(dtype)
        for row, past in enumerate(self.history):
            t = torch.arange(past)
            page, offset = self.table[row].long()[t // page_tokens], t % page_tokens
            for rows in (fields.keys, fields.values):
                for packed in (*rows.codes, *([] if rows.signs is None else [rows.signs])):
                    packed[page, :, offset] = torch.randint(256, (past, heads, packed.shape[-1])).to(torch.uint8)
                for halves in (*rows.scales, *([] if rows.sign_norms is None else [rows.sign_norms])):
                    halves[page, :, offset] = torch.randn(past, heads, *halves.shape[3:]).half()
            if fields.k_mean is not None:
                own = page.unique()
                fields.k_mean[own] = torch.randn(len(own), heads, dim).half()
            typed[self.window_table[row].long()[t // BLOCK], :, t % BLOCK] = torch.randn(past, heads, 2 * dim).to(dtype)
        self.windows[0] = 0xFF

    def tile(self, device, first_token, tile_tokens, sinks, recent, windows=True, slack=5):
        """Keys, values [rows + slack, H, D] of a tile, and cu_history."""
        counts = [min(max(past - first_token, 0), tile_tokens) for past in self.history]
        cu_history = torch.tensor([0, *counts]).cumsum(0).int()
        new = torch.tensor([n for _, n in self.requests])
        pages = torch.empty_strided(self.pages.shape, self.pages.stride(), dtype=torch.uint8, device=device)
        keys, values = torch.full((2, int(cu_history[-1]) + slack, self.heads, self.dim), torch.nan).half().to(device)
        gather_history(
            pages.copy_(self.pages),
            self.layout,
            self.table.to(device),
            (torch.tensor(self.history) + new).int().to(device),
            torch.cat((torch.zeros(1), new.cumsum(0))).int().to(device),
            cu_history.to(device),
            first_token,
            keys,
            values,
            tile_tokens=tile_tokens,
            window_cache=self.windows.to(device) if windows else None,
            window_table=self.window_table.to(device) if windows else None,
            window_dtype=self.dtype,
            sink_tokens=sinks,
            recent_tokens=recent,
            sketch=None if self.sketch is None else self.sketch.to(device),
        )
        return keys.cpu(), values.cpu(), cu_history

    def expected(self, row, sinks, recent, windows=True):
        """Keys and values [c, H, D] float32 of a request's whole history."""
        past = self.history[row]
        t = torch.arange(past)
        ids = self.table[row, t // self.layout.page_tokens].long()
        both = torch.stack(read_pages(self.pages[ids.unique()], self.layout))
        both = both[:, torch.searchsorted(ids.unique(), ids), :, t % self.layout.page_tokens]
        both = both.transpose(0, 1).masked_fill((ids == 0).view(1, -1, 1, 1), 0)
        if windows:
            block = self.window_table[row, t // BLOCK].long()
            t = t[((t < sinks) | (t >= past - recent)) & (block != 0)]
            exact = self.windows.view(self.dtype)[block[t], :, t % BLOCK].float()
            both[0, t], both[1, t] = exact.chunk(2, dim=-1)
        return both

    def check(self, device, tile_tokens, sinks=40, recent=77, windows=True):
        for first in range(0, max(self.history) + 1, tile_tokens):
            keys, values, cu_history = self.tile(device, first, tile_tokens, sinks, recent, windows)
            atol = ATOL if self.layout.is_two_bit else LEVEL_ATOL
            for row in range(len(self.history)):
                own = slice(int(cu_history[row]), int(cu_history[row + 1]))
                expected = self.expected(row, sinks, recent, windows)[:, first : first + tile_tokens]
                for got, exact in zip((keys[own], values[own]), expected, strict=True):
                    torch.testing.assert_close(got.float(), exact, rtol=RTOL, atol=atol)
            assert keys[cu_history[-1] :].isnan().all() and values[cu_history[-1] :].isnan().all()


MIXED = [(0, 5), (300, 1), (128, 0), (1, 70), (0, 0)]


@pytest.mark.parametrize("name", format_names())
def test_mixed_batch(device, name):
    History(MIXED, name, heads=1).check(device, 256)


def test_several_heads(device):
    History([(140, 1), (30, 2)], heads=3).check(device, 256)


def test_without_windows(device):
    History([(140, 1), (30, 2)], heads=1).check(device, 256, windows=False)


@pytest.mark.parametrize("dim", SUPPORTED_HEAD_DIMS)
def test_head_sizes(device, dim):
    History([(140, 1), (30, 2)], dim=dim, heads=1).check(device, 128)


@pytest.mark.parametrize("name", ["turboquant-4", "turboquant-3.5", "turboquant-2.5-qjl", "oscar-int2-qjl"])
@pytest.mark.parametrize("dim", [96, 128, 256])
def test_parts(device, dim, name):
    """Parts that are no power of two, and of every width; a null page."""
    history = History([(140, 1), (30, 2)], name, dim=dim, heads=2)
    history.table[0, 0] = 0
    history.check(device, 256)


@pytest.mark.parametrize("sinks,recent", [(0, 64), (64, 0), (5, 3), (4096, 4096), (130, 129)])
def test_window_sizes(device, sinks, recent):
    History([(270, 1), (129, 4)], heads=1).check(device, 384, sinks, recent)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_longer_pages(device, dtype):
    History([(300, 1), (256, 1)], heads=1, page_tokens=256, dtype=dtype).check(device, 256)


def test_null_pages(device):
    """Their tokens become zeros, or what a window has."""
    history = History([(300, 1), (200, 1)], heads=1)
    history.table[0, 1] = 0
    history.table[1] = 0
    history.check(device, 384)
    history.check(device, 384, windows=False)


def test_rows_beyond_the_capacity_are_not_written(device):
    keys, values, cu_history = History([(60, 1), (60, 1)], heads=1).tile(device, 0, 128, 0, 0, slack=-20)
    assert int(cu_history[-1]) == 120 and keys.shape[0] == 100
    assert not keys.isnan().any() and not values.isnan().any()


def test_saturation(device):
    """Codes may say more than fp16 can."""
    history = History([(20, 1)], "int2", heads=1)
    fields = page_fields(history.pages, history.layout)
    fields.k_scales[1:] = fields.v_scales[1:] = 60000.0
    keys, values, _ = history.tile(device, 0, 128, 0, 0, windows=False, slack=0)
    for got, exact in zip((keys, values), history.expected(0, 0, 0, False), strict=True):
        assert torch.equal(got.float(), exact.clamp(max=65504).half().float())


def test_refusals(device):
    history = History([(20, 1)])
    with pytest.raises(ValueError, match="whole pages of 128"):
        history.tile(device, 64, 128, 0, 0)
    with pytest.raises(ValueError, match="whole pages of 128"):
        history.tile(device, 0, 192, 0, 0)
    history.sketch = torch.zeros(history.dim, history.dim).half()
    with pytest.raises(ValueError, match="only with those"):
        history.tile(device, 0, 128, 0, 0)
    history = History([(20, 1)], "turboquant-2.5-qjl")
    history.sketch = history.sketch.mT
    with pytest.raises(ValueError, match="sketches are contiguous float16"):
        history.tile(device, 0, 128, 0, 0)
