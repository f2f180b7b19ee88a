# SPDX-License-Identifier: Apache-2.0
"""The Triton attention against the oracle: random pages, tables, lengths, groups, head sizes, windows and splits."""

import pytest
import torch

from vllm_kvcompress.formats import format_names, get_format
from vllm_kvcompress.formats.base import SUPPORTED_HEAD_DIMS, write_tokens
from vllm_kvcompress.kernels.reference import attend_reference
from vllm_kvcompress.quantizers import qjl
from vllm_kvcompress.triton_kernels.attend import _tile, attend, workspace_elements

BLOCK = 16
MOST_SCALE = 0.1
# Per head, relative to its largest output, and in the norm. Weights are rounded to fp16 before they meet the values: at
# most 2^-11 = 4.9e-4 of each term. Terms have either sign, so the largest output may be several times smaller than the
# sum of their magnitudes, but then roundings of as many terms cancel too: 4 * 4.9e-4. Scores are sums of D products of
# levels rounded to fp16, so their errors grow with scale * sqrt(D): the scale is that of attention, D^-0.5, or smaller.
# With signs sketched queries are rounded too, which doubles that: there, queries are half as large.
TOLERANCE = 2e-3


class Batch:
    """A random step: requests of (history, new) tokens whose caches are already filled."""

    def __init__(
        self,
        requests,
        kv_heads=1,
        group=4,
        dim=64,
        name="oscar-int2",
        sinks=16,
        recent=40,
        missing=0.0,
        window_dtype=torch.bfloat16,
        page_tokens=128,
        padding=3,
        value_size=1.0,
    ):
        self.requests, self.kv_heads, self.group, self.dim = requests, kv_heads, group, dim
        self.scale = min(MOST_SCALE, dim**-0.5)
        self.sinks, self.recent, self.window_dtype = sinks, recent, window_dtype
        self.layout = get_format(name).layout(dim, page_tokens)
        self.sketch = None
        if self.layout.keys.signs is not None:
            self.sketch = qjl.sketch_matrix(dim, 0, orthogonal=True).half().contiguous()
        lengths = [past + new for past, new in requests]
        max_pages = max(1, *(-(-n // page_tokens) for n in lengths))
        max_blocks = max(1, *(-(-n // BLOCK) for n in lengths))
        count = len(requests)
        self.table = (torch.randperm(count * max_pages) + 1).view(count, max_pages).int()
        self.window_table = (torch.randperm(count * max_blocks) + 1).view(count, max_blocks).int()
        self.window_table[torch.rand(self.window_table.shape) < missing] = 0
        self.starts = torch.tensor([0, *(new for _, new in requests)]).cumsum(0).int()
        self.lengths = torch.tensor(lengths, dtype=torch.int32)
        # NaN where nobody wrote: a page's former life may have left any bytes in it, and reading them must show. vLLM
        # may pad between pages.
        shape = (count * max_pages + 1, kv_heads * self.layout.head_bytes + 32)
        padded = torch.full(shape, 0xFF, dtype=torch.uint8)
        self.pages = padded[:, : kv_heads * self.layout.head_bytes].view(-1, kv_heads, self.layout.head_bytes)
        shape = (count * max_blocks + 1, kv_heads, BLOCK, 4 * dim)
        self.windows = torch.full(shape, 0xFF, dtype=torch.uint8)
        if self.layout.k_mean is not None:
            mean = self.pages[..., self.layout.k_mean : self.layout.k_mean + 2 * dim].view(torch.float16)
            mean[1:] = torch.randn(mean[1:].shape).half()
        for row, (past, _) in enumerate(requests):
            t = torch.arange(past)
            k, v = torch.randn(past, kv_heads, dim) + 1, torch.randn(past, kv_heads, dim) * value_size
            slots = self.table[row].long()[t // page_tokens] * page_tokens + t % page_tokens
            write_tokens(self.pages, self.layout, slots, k, v, 1.0, 1.0)
            # Exact values go to every companion block, inside the windows or not: only those inside may be read.
            both = torch.cat((k, v), dim=-1).to(window_dtype)
            self.windows.view(window_dtype)[self.window_table[row].long()[t // BLOCK], :, t % BLOCK] = both
        self.windows[0] = 0xFF
        self.total = int(self.starts[-1])
        size = 2 if self.sketch is None else 1
        self.q = (torch.randn(self.total + padding, kv_heads * group, dim) * size).half()
        self.new_kv = torch.randn(self.total + padding, kv_heads, 2 * dim)
        self.new_kv[..., dim:] *= value_size
        self.new_kv = self.new_kv.to(window_dtype)
        self.new_kv[self.total :] = torch.nan

    def run(self, device, windows=True, num_splits=1, out_dtype=torch.float32, max_query_len=None):
        out = torch.full(self.q.shape, torch.nan, dtype=out_dtype, device=device)
        elements = workspace_elements(*self.q.shape, num_splits)

        def moved(cache):
            # Not `to`: on its way to another device that would close the gaps between pages or blocks.
            return torch.empty_strided(cache.shape, cache.stride(), dtype=cache.dtype, device=device).copy_(cache)

        attend(
            self.q.to(device),
            self.new_kv.to(device),
            moved(self.pages),
            self.layout,
            self.table.to(device),
            self.starts.to(device),
            self.lengths.to(device),
            out,
            scale=self.scale,
            window_cache=moved(self.windows) if windows else None,
            window_table=self.window_table.to(device) if windows else None,
            window_dtype=self.window_dtype,
            sink_tokens=self.sinks,
            recent_tokens=self.recent,
            max_query_len=max_query_len or max(new for _, new in self.requests),
            num_splits=num_splits,
            workspace=torch.full((elements,), torch.nan, device=device) if elements else None,
            sketch=None if self.sketch is None else self.sketch.to(device),
        )
        assert out[self.total :].isnan().all(), "padding rows are not written"
        return out[: self.total].cpu()

    def reference(self, windows=True):
        k, v = self.new_kv.chunk(2, dim=-1)
        return attend_reference(
            self.q,
            k,
            v,
            self.pages,
            self.layout,
            self.table,
            self.starts,
            self.lengths,
            self.scale,
            self.windows if windows else None,
            self.window_table,
            self.sinks,
            self.recent,
            self.window_dtype,
        )[: self.total]

    def check(self, device, tolerance=TOLERANCE, **how):
        assert_close(self.run(device, **how), self.reference(how.get("windows", True)), tolerance)


def assert_close(got, expected, tolerance=TOLERANCE):
    assert torch.isfinite(expected).all()
    error = got.double() - expected
    assert (error.abs().amax((0, 2)) <= tolerance * expected.abs().amax((0, 2))).all()
    assert (error.norm(dim=(0, 2)) <= tolerance * expected.norm(dim=(0, 2))).all()


MIXED = [(0, 3), (270, 1), (129, 1), (0, 0), (1, 1), (128, 2), (57, 0)]


@pytest.mark.parametrize("name", format_names())
def test_mixed_batch(device, name):
    Batch(MIXED, group=2, name=name, missing=0.3).check(device, num_splits=2)


@pytest.mark.parametrize("num_splits", [1, 2, 3, 7])
@pytest.mark.parametrize("windows", [False, True])
def test_splits(device, windows, num_splits):
    """Some of 7 splits have nothing to read."""
    Batch([(270, 1), (0, 1)], group=2).check(device, windows=windows, num_splits=num_splits)


@pytest.mark.parametrize("group", [1, 2, 3, 4, 6, 7, 8, 9, 16])
def test_groups(device, group):
    """Groups that divide no tile, and those of one row or of a whole tile."""
    Batch([(135, 3)], kv_heads=2, group=group).check(device)


def test_many_splits(device):
    """More than are summed at a time."""
    Batch([(600, 1)], recent=4096).check(device, num_splits=40)


@pytest.mark.parametrize("dim", SUPPORTED_HEAD_DIMS)
@pytest.mark.parametrize("new", [1, 5, 9])
def test_head_sizes(device, dim, new):
    """5 and 9 tokens of 4 heads take the higher tiles."""
    Batch([(150, new)], dim=dim).check(device)


@pytest.mark.parametrize("name", ["turboquant-4", "turboquant-3.5-qjl", "turboquant-2.5-qjl", "oscar-int2-qjl"])
@pytest.mark.parametrize("dim", [96, 128, 256])
def test_parts(device, dim, name):
    """Parts that are no power of two, and of every width."""
    Batch([(150, 1)], dim=dim, name=name, kv_heads=2).check(device, num_splits=2)


@pytest.mark.parametrize(
    "name,dim,new", [("turboquant-2.5", 64, 9), ("turboquant-3.5", 128, 5), ("turboquant-3.5-qjl", 96, 33)]
)
def test_parts_in_higher_tiles(device, name, dim, new):
    Batch([(150, new), (270, 1)], dim=dim, name=name, group=3, missing=0.2).check(device)


@pytest.mark.parametrize("name", ["turboquant-4", "turboquant-2.5-qjl"])
def test_null_pages_of_parts(device, name):
    batch = Batch([(300, 1), (200, 1)], group=2, name=name, missing=0.3)
    batch.table[0, 1] = 0
    batch.table[1] = 0
    batch.check(device)
    batch.check(device, windows=False, num_splits=2)


@pytest.mark.parametrize("size", [2.0**-10, 2.0**10])
@pytest.mark.parametrize("name", ["turboquant-3.5-qjl", "oscar-int2-qjl"])
def test_parts_of_any_size(device, name, size):
    """Values at either end of fp16's range, and small queries: of large ones scores are too exact for fp16 sketches."""
    batch = Batch([(300, 1)], group=2, name=name, recent=0, sinks=0, value_size=size)
    batch.q *= min(size, 1.0)
    batch.check(device)


@pytest.mark.parametrize("new", range(1, 9))
def test_several_new_tokens(device, new):
    """As in speculative decoding."""
    Batch([(133, new)], group=2).check(device)


@pytest.mark.parametrize("dim,group,num_splits", [(64, 1, 2), (128, 3, 1), (256, 2, 1)])
def test_long_chunk(device, dim, group, num_splits):
    """A chunk of a prompt: many tiles of rows, and own tokens over several tiles."""
    Batch([(150, 70), (0, 33)], group=group, dim=dim).check(device, num_splits=num_splits)


@pytest.mark.parametrize("sinks,recent", [(0, 64), (64, 0), (5, 3), (4096, 4096), (130, 129), (23, 77)])
def test_window_sizes(device, sinks, recent):
    Batch([(300, 1), (12, 1), (100, 3)], group=2, sinks=sinks, recent=recent, missing=0.2).check(device)


def test_windows_change_the_result():
    """The comparisons above would hold if both sides ignored the windows."""
    batch = Batch([(200, 1)])
    assert (batch.reference(True) - batch.reference(False)).abs().max() > 1e-2


@pytest.mark.parametrize("dim", [64, 128])
def test_float16_windows(device, dim):
    Batch([(200, 2)], dim=dim, window_dtype=torch.float16, missing=0.2).check(device)


@pytest.mark.parametrize("name", ["oscar-int2", "int2"])
@pytest.mark.parametrize("page_tokens", [256, 384])
def test_longer_pages(device, page_tokens, name):
    Batch([(600, 1), (page_tokens, 2)], group=2, name=name, page_tokens=page_tokens).check(device, num_splits=2)


@pytest.mark.parametrize("num_splits", [1, 2])
@pytest.mark.parametrize("windows", [False, True])
def test_null_pages(device, windows, num_splits):
    """Tokens of page 0 are skipped, unless a window has them."""
    batch = Batch([(500, 1), (300, 3), (200, 1)], group=2, missing=0.3)
    batch.table[0, 1] = batch.table[0, 3] = batch.table[1, 0] = 0
    batch.table[2] = 0
    batch.check(device, windows=windows, num_splits=num_splits)


@pytest.mark.parametrize("num_splits", [1, 2])
def test_dummy_run(device, num_splits):
    """All tables zero, lengths that do not count the new tokens: each token sees those before it in its request."""
    batch = Batch([(200, 2), (3, 1)], group=2)
    batch.table.zero_()
    batch.window_table.zero_()
    batch.lengths = torch.tensor([0, 1], dtype=torch.int32)
    got = batch.run(device, num_splits=num_splits)
    batch.lengths = torch.tensor([2, 1], dtype=torch.int32)
    assert_close(got, batch.reference())


def test_bounds_above_the_truth(device):
    """A captured graph knows upper bounds alone: more rows of a request, more requests."""
    batch = Batch([(140, 1), (30, 2)], group=2)
    expected = batch.reference()
    batch.starts = torch.cat((batch.starts, batch.starts[-1:], batch.starts[-1:]))
    batch.lengths = torch.cat((batch.lengths, torch.zeros(2, dtype=torch.int32)))
    batch.table = torch.cat((batch.table, torch.zeros_like(batch.table)))
    batch.window_table = torch.cat((batch.window_table, torch.zeros_like(batch.window_table)))
    assert_close(batch.run(device, max_query_len=20, num_splits=3), expected)


@pytest.mark.parametrize("value_size", [2.0**-10, 2.0**10])
def test_values_of_any_size(device, value_size):
    """Weights times value scales must not leave fp16's range at either end."""
    Batch([(300, 1), (140, 2)], group=2, recent=0, sinks=0, value_size=value_size).check(device)


@pytest.mark.parametrize("exponent", [-12, 8])
def test_queries_of_any_size(device, exponent):
    batch = Batch([(300, 1), (140, 2)], group=2)
    batch.q *= 2.0**exponent
    batch.q[:, 0, ::2] *= 2.0**-6
    batch.check(device)


@pytest.mark.parametrize("num_splits", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_output_dtypes(device, dtype, num_splits):
    # Rounding of the output comes on top; Triton's interpreter truncates to bfloat16.
    tolerance = TOLERANCE + torch.finfo(dtype).eps
    Batch([(140, 1)]).check(device, tolerance, out_dtype=dtype, num_splits=num_splits)


def test_chunked_formats_are_kept_from_warpgroup_products():
    """64 rows and 4 warps are what Triton turns into them, and ptxas gets those of our chunked kernels wrong."""
    tiles = [
        _tile(rows, dim, columns, False) for rows in (1, 17, 33, 200) for dim in (64, 128, 256) for columns in (8, 32)
    ]
    assert max(tile["BLOCK_M"] for tile in tiles) < 64


def test_refusals(device):
    batch = Batch([(20, 1)])
    with pytest.raises(ValueError, match="multiple of 128 tokens, not 64"):
        Batch([(20, 1)], page_tokens=64).run(device)
    batch.q = batch.q.float()
    with pytest.raises(ValueError, match="q float16"):
        batch.run(device)
    batch = Batch([(20, 1)])
    batch.new_kv = batch.new_kv.half()
    with pytest.raises(ValueError, match="new_kv must be a contiguous"):
        batch.run(device)
    batch = Batch([(20, 1)])
    batch.pages = batch.pages[..., :-1]
    with pytest.raises(ValueError, match="pages must be uint8"):
        batch.run(device)
    batch = Batch([(20, 1)])
    batch.windows = batch.windows[:, :, ::2]
    with pytest.raises(ValueError, match="window_cache must be uint8"):
        batch.run(device)
    batch = Batch([(20, 1)], name="turboquant-2.5-qjl")
    batch.sketch = None
    with pytest.raises(ValueError, match="sketch matrix goes with keys that have signs"):
        batch.run(device)
