# SPDX-License-Identifier: Apache-2.0
"""A layer's forward on the GPU kernels against the float64 oracle, in Triton's interpreter or on a GPU.

Mixed steps of decodes, first chunks, continuations, empty requests and padding. FlashAttention is replaced by torch.
"""

import math
import random
import re
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import triton
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_kvcompress import compat
from vllm_kvcompress.attention import gpu as gpu_module
from vllm_kvcompress.attention import gpu_warmup
from vllm_kvcompress.attention.gpu import GpuAttention, Limits, layer_constants, score_layers
from vllm_kvcompress.attention.gpu_metadata import make_metadata
from vllm_kvcompress.attention.gpu_warmup import run_eviction, run_step
from vllm_kvcompress.attention.window_layer import WindowMetadata
from vllm_kvcompress.episodic.policies import POLICIES
from vllm_kvcompress.formats import format_names, get_format
from vllm_kvcompress.formats.base import read_pages, sketch_matrix, write_tokens
from vllm_kvcompress.kernels import cuda_ops
from vllm_kvcompress.kernels.reference import attend_reference

PAGE, BLOCK, SCALE = 128, 16, 0.1
# All of 2-bit codes, and of the others one with parts, one with residual signs too, one with signs beside affine codes.
NAMES = [
    name
    for name in format_names()
    if get_format(name).layout(64, PAGE).is_two_bit
    or name in ("turboquant-3.5", "turboquant-2.5-qjl", "oscar-int2-qjl")
]
DEVICE = torch.device("cpu" if triton.knobs.runtime.interpret else "cuda")
# Relative to a head's largest output, and in the norm. Queries, rotations, weights and outputs in cache space are
# rounded to fp16, by at most 2^-11 of themselves: the four of them to 4 * 2^-11 = 2e-3.
TOLERANCE = 2e-3
# A bf16 model's outputs are bf16, and so are keys and values of new tokens where they are read with the history (of a
# float32 model too). A GPU rounds to it, by at most 2^-8. Triton's interpreter cuts off, by up to 2^-7 of one element
# (and all the same way, so that they add up), by half of that in the norm of many.
BF16 = 2**-8
BF16_ELEMENT = 2**-7 if triton.knobs.runtime.interpret else BF16


@pytest.fixture(autouse=True)
def _fresh_seed():
    """Every run draws new inputs; the seed is printed with a failure."""
    random.seed(seed := torch.seed())
    print(f"seed {seed}")


class TorchFlash:
    """What FlashAttention computes, request by request in float32, and what it leaves in empty rows."""

    name = "torch"

    def __init__(self):
        self.calls = []

    def exact(self, query, key, value, query_start_loc, max_query_len, scale, out):
        self.calls.append("exact")
        return self._attend(query, key, value, query_start_loc, query_start_loc, scale, out, causal=True)

    def history(self, query, keys, values, query_start_loc, cu_history, max_query_len, max_history, scale, out):
        self.calls.append("history")
        assert query.dtype == keys.dtype == values.dtype == out.dtype == torch.float16
        assert int(cu_history[-1]) <= len(keys) and int(cu_history.diff().max()) <= max_history
        assert int(query_start_loc[0]) == 0 and int(query_start_loc[-1]) == len(query)
        assert int(query_start_loc.diff().max()) <= max_query_len
        return self._attend(query, keys, values, query_start_loc, cu_history, scale, out, causal=False)

    def _attend(self, query, key, value, q_starts, k_starts, scale, out, causal):
        group = query.shape[1] // key.shape[1]
        lse = query.new_full((query.shape[1], len(query)), torch.inf, dtype=torch.float32)
        for (a, b), (c, d) in zip(pairs(q_starts), pairs(k_starts), strict=True):
            if c == d:
                out[a:b] = 0  # FlashAttention 2 also says +inf, 3 says -inf
                continue
            k, v = (x[c:d].float().repeat_interleave(group, dim=1) for x in (key, value))
            scores = torch.einsum("qhd,khd->hqk", query[a:b].float(), k) * scale
            if causal:
                future = torch.ones(b - a, b - a, dtype=torch.bool, device=query.device).triu(1)
                scores = scores.masked_fill(future, -torch.inf)
            out[a:b] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).to(out.dtype)
            lse[:, a:b] = scores.logsumexp(-1)
        return lse

    def merge(self, out, lse, tile_out, tile_lse):
        self.calls.append("merge")
        merged = torch.empty_like(lse)
        compat.merge_attention_states(out, out, lse, tile_out, tile_lse, merged)
        return merged


def pairs(starts):
    return list(pairwise(starts.tolist()))


class Step:
    """A random step over filled caches, and a layer with random calibration."""

    def __init__(
        self,
        requests,
        *,
        name="oscar-int2",
        heads=2,
        group=3,
        dim=64,
        dtype=torch.bfloat16,
        windows=(16, 40),
        missing=0.2,
        padding=3,
        threshold=1,
        flash=None,
        history_tokens=2 * PAGE,
        decode_kernel="triton",
    ):
        page_format = get_format(name)
        self.layout = layout = page_format.layout(dim, PAGE)
        self.requests, self.dtype, self.threshold = requests, dtype, threshold
        self.windowed = windows is not None
        sinks, recent = windows or (0, 0)
        lengths = [past + new for past, new in requests]
        count, total = len(requests), sum(new for _, new in requests)
        max_pages, max_blocks = (max(1, *(-(-n // size) for n in lengths)) for size in (PAGE, BLOCK))
        self.table = (torch.randperm(count * max_pages) + 1).view(count, max_pages).int()
        self.window_table = (torch.randperm(count * max_blocks) + 1).view(count, max_blocks).int()
        self.window_table[torch.rand(self.window_table.shape) < missing] = 0
        # NaN where nobody wrote.
        self.pages = torch.full((count * max_pages + 1, heads, layout.head_bytes), 0xFF, dtype=torch.uint8)
        self.windows = torch.full((count * max_blocks + 1, heads, BLOCK, 4 * dim), 0xFF, dtype=torch.uint8)
        self.window_dtype = dtype if dtype.itemsize == 2 else torch.bfloat16

        rotated, static = page_format.rotation != "none", page_format.centring == "static"
        self.k_rotation, self.v_rotation = (
            (torch.linalg.qr(torch.randn(heads, dim, dim)).Q if rotated else None) for _ in range(2)
        )
        # Far from zero, as biases make keys: what is left is small beside it.
        self.k_mean = torch.randn(heads, dim) * 8 if static else None
        offset = torch.zeros(heads, dim) if self.k_mean is None else self.k_mean
        if layout.k_mean is not None:
            mean = self.pages[..., layout.k_mean : layout.k_mean + 2 * dim].view(torch.float16)
            mean[1:] = torch.randn(mean[1:].shape).half()
        for row, (past, _) in enumerate(requests):
            t = torch.arange(past)
            k, v = torch.randn(past, heads, dim), torch.randn(past, heads, dim)
            slots = self.table[row].long()[t // PAGE] * PAGE + t % PAGE
            write_tokens(self.pages, layout, slots, k, v, 1.0, 1.0)
            blocks = self.window_table[row].long()[t // BLOCK]
            self.windows.view(self.window_dtype)[blocks, :, t % BLOCK] = torch.cat((k, v), -1).to(self.window_dtype)
        self.windows[0] = 0xFF

        self.starts = torch.tensor([0, *(new for _, new in requests)]).cumsum(0).int()
        self.lengths = torch.tensor(lengths, dtype=torch.int32)
        positions = [torch.arange(past, past + new) for past, new in requests]
        self.slots, self.window_slots = (
            torch.cat(
                [table[row].long()[t // size] * size + t % size for row, t in enumerate(positions)]
                + [torch.full((padding,), -1)]
            )
            for table, size in ((self.table, PAGE), (self.window_table, BLOCK))
        )
        # One tensor, as a fused projection leaves it.
        qkv = torch.randn(total + padding, heads * (group + 2), dim)
        qkv[:, heads * group : heads * (group + 1)] += offset
        self.qkv = qkv.to(dtype)
        self.sizes = [heads * group, heads, heads]
        self.total, self.padding = total, padding
        self.attention = GpuAttention(
            num_heads=heads * group,
            num_kv_heads=heads,
            head_dim=dim,
            scale=SCALE,
            dtype=dtype,
            window_dtype=self.window_dtype,
            sink_tokens=sinks,
            recent_tokens=recent,
            constants=layer_constants(
                DEVICE,
                heads,
                self.k_rotation,
                self.v_rotation,
                self.k_mean,
                torch.full((heads,), 0.9),
                0.95,
                None if self.layout.keys.signs is None else sketch_matrix(dim),
            ),
            decode_kernel=decode_kernel,
            flash=flash,
            limits=Limits(total + padding, count, threshold),
            device=DEVICE,
            history_tokens=history_tokens,
        )

    def common(self, table, slots):
        return CommonAttentionMetadata(
            query_start_loc=self.starts.to(DEVICE),
            query_start_loc_cpu=self.starts,
            seq_lens=self.lengths.to(DEVICE),
            num_reqs=len(self.requests),
            num_actual_tokens=self.total,
            max_query_len=max(new for _, new in self.requests),
            max_seq_len=int(self.lengths.max()),
            block_table_tensor=table.to(DEVICE),
            slot_mapping=slots.to(DEVICE),
            seq_lens_cpu_upper_bound=self.lengths,
        )

    def run(self):
        """The output [T, Hq, D] on the CPU in float64; `after` has the pages, `windows_after` the windows."""
        metadata = make_metadata(self.common(self.table, self.slots), self.threshold, PAGE)
        windows = WindowMetadata(self.window_table.to(DEVICE), self.window_slots.to(DEVICE), BLOCK)
        pages, window_cache = self.pages.clone().to(DEVICE), self.windows.clone().to(DEVICE)
        query, key, value = self.qkv.to(DEVICE).split(self.sizes, dim=1)
        out = torch.full_like(query, torch.nan, memory_format=torch.contiguous_format)
        self.attention.forward(
            query,
            key,
            value,
            pages,
            self.layout,
            window_cache if self.windowed else None,
            metadata,
            windows if self.windowed else None,
            out,
        )
        self.after, self.windows_after = pages.cpu(), window_cache.cpu()
        assert torch.isnan(out[self.total :]).all(), "padding is not written"
        return out[: self.total].double().cpu()

    def cache_space(self):
        """Queries, keys and values of the step, float64."""
        query, key, value = self.qkv[: self.total].double().split(self.sizes, dim=1)
        if self.k_mean is not None:
            key = key - self.k_mean.double()
        if self.k_rotation is not None:
            group = query.shape[1] // key.shape[1]
            query = torch.einsum("thd,hde->the", query, self.k_rotation.double().repeat_interleave(group, 0))
            key = torch.einsum("thd,hde->the", key, self.k_rotation.double())
            value = torch.einsum("thd,hde->the", value, self.v_rotation.double())
        return query, key, value

    def expected(self):
        query, key, value = self.cache_space()
        attention = self.attention
        out = attend_reference(
            query,
            key,
            value,
            self.pages,
            self.layout,
            self.table,
            self.starts,
            self.lengths,
            SCALE,
            self.windows if self.windowed else None,
            self.window_table,
            attention.sink_tokens,
            attention.recent_tokens,
            self.window_dtype,
        )
        if self.v_rotation is not None:
            rotation = self.v_rotation.double().repeat_interleave(query.shape[1] // key.shape[1], 0)
            out = torch.einsum("the,hde->thd", out, rotation)
        return out

    def check(self):
        out, expected = self.run(), self.expected()
        roundings = {torch.float16: 0, torch.float32: 2, torch.bfloat16: 3}[self.dtype]
        difference = out - expected
        worst = difference.abs().amax(dim=(0, 2)) / expected.abs().amax(dim=(0, 2))
        assert (worst < TOLERANCE + roundings * BF16_ELEMENT).all(), worst
        assert difference.norm() < (TOLERANCE + roundings * BF16) * expected.norm()


MIXED = [(300, 1), (0, 1), (129, 1), (0, 40), (260, 5), (0, 0), (400, 17), (77, 9)]


@pytest.mark.parametrize("flash", [False, True], ids=["pages", "flash"])
@pytest.mark.parametrize("name", NAMES)
def test_mixed_step(name, flash):
    oracle = TorchFlash() if flash else None
    step = Step(MIXED, name=name, flash=oracle)
    step.check()
    if oracle is not None:
        # 400 tokens of history, at most 256 at a time: tiles are merged.
        assert oracle.calls[0] == "exact" and oracle.calls.count("history") > 2 and "merge" in oracle.calls


@pytest.mark.parametrize("flash", [False, True], ids=["pages", "flash"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_model_dtypes(dtype, flash):
    if flash and dtype == torch.float32:
        pytest.skip("FlashAttention serves 16-bit models")
    Step(MIXED, dtype=dtype, flash=TorchFlash() if flash else None).check()


@pytest.mark.parametrize("dim", [96, 128, 256])
@pytest.mark.parametrize("flash", [False, True], ids=["pages", "flash"])
def test_head_sizes(dim, flash):
    requests = [(200, 1), (0, 1), (0, 12), (150, 6)]
    Step(requests, dim=dim, heads=1, group=2, flash=TorchFlash() if flash else None).check()


@pytest.mark.parametrize("group", [1, 6, 7, 16])
def test_groups(group):
    Step([(140, 1), (130, 5), (0, 9)], heads=2, group=group, flash=TorchFlash()).check()


@pytest.mark.parametrize("flash", [False, True], ids=["pages", "flash"])
def test_without_windows(flash):
    Step(MIXED, windows=None, flash=TorchFlash() if flash else None).check()


@pytest.mark.parametrize("requests", [[(300, 1), (5, 1)], [(0, 9), (0, 30)], [(300, 9)], [(0, 0), (200, 4)]], ids=str)
@pytest.mark.parametrize("flash", [False, True], ids=["pages", "flash"])
def test_steps_of_one_kind(requests, flash):
    Step(requests, flash=TorchFlash() if flash else None).check()


@pytest.mark.parametrize("flash", [False, True], ids=["pages", "flash"])
def test_drafts_are_served_as_decodes(flash):
    """Up to four new tokens a request: causal among themselves, whatever their number."""
    oracle = TorchFlash() if flash else None
    Step([(300, 4), (129, 1), (40, 3), (0, 2), (0, 0)], threshold=4, flash=oracle).check()
    assert not flash or oracle.calls == []
    Step([(300, 4), (129, 2), (0, 9), (140, 11)], threshold=4, flash=oracle).check()


@pytest.fixture
def cuda_op(monkeypatch):
    """The CUDA op as its schema in csrc/binding.cpp declares it, computed by the oracle."""
    source = (Path(__file__).parents[2] / "csrc" / "binding.cpp").read_text()
    library = torch.library.Library("kvcompress_test", "FRAGMENT")
    for text in re.findall(r"m\.def\(\s*((?:\"[^\"]*\"\s*)+)\)", source):
        library.define("".join(re.findall(r'"([^"]*)"', text)))

    def decode(
        q, new_kv, pages, window_cache, block_table, window_table, query_start_loc, seq_lens, v_unrotation, out,
        workspace, q_signs, max_query_len, head_dim, code, k_scale, k_bend, k_rest_scale, k_rest_bend, v_scale, v_bend,
        v_rest_scale, v_rest_bend, page_means, window_is_bf16, sink_tokens, recent_tokens, scale,
    ):  # fmt: skip
        assert int(query_start_loc.diff().max()) <= max_query_len and head_dim == q.shape[-1]
        names = {2: "oscar-int2" if page_means else "int2", 4: "turboquant-4", 102: "oscar-int2-qjl"}
        layout = get_format(names[code]).layout(head_dim, PAGE)
        assert pages.shape[-1] == layout.head_bytes and page_means == (layout.k_mean is not None)
        keys, rest = (k_scale, k_bend, k_rest_scale, k_rest_bend), (v_scale, v_bend, v_rest_scale, v_rest_bend)
        assert cuda_ops.code_arguments(layout) == (code, *keys, *rest)
        assert (q_signs is not None) == (layout.keys.signs is not None)
        if q_signs is not None:
            # fp16 products of as many terms of S as there are channels, each an fp16 number.
            torch.testing.assert_close(q_signs.float(), q.float() @ sketch_matrix(head_dim).mT, rtol=2**-7, atol=2**-4)
        window_dtype = torch.bfloat16 if window_is_bf16 else torch.float16
        keys, values = new_kv[: len(q)].chunk(2, dim=-1)
        found = attend_reference(
            q, keys, values, pages, layout, block_table, query_start_loc, seq_lens, scale, window_cache, window_table,
            sink_tokens, recent_tokens, window_dtype,
        )  # fmt: skip
        if v_unrotation is not None:
            rotation = v_unrotation.double().repeat_interleave(q.shape[1] // pages.shape[1], 0)
            found = torch.einsum("thd,hde->the", found, rotation)
        out.copy_(found)
        workspace[: len(q)] = 1

    library.impl("decode", decode, "CPU")
    library.impl("decode_workspace_elements", lambda *sizes: math.prod(sizes), "CompositeExplicitAutograd")
    monkeypatch.setattr(torch.ops, "vllm_kvcompress", torch.ops.kvcompress_test)
    yield
    library._destroy()


@pytest.mark.skipif(DEVICE.type != "cpu", reason="the oracle stands in for the op; tests/gpu has the op itself")
@pytest.mark.parametrize("name", ["oscar-int2", "int2", "turboquant-4", "oscar-int2-qjl"])
@pytest.mark.parametrize("flash", [False, True], ids=["pages", "flash"])
@pytest.mark.parametrize("windows", [None, (16, 40)])
def test_decodes_by_the_cuda_op(cuda_op, name, flash, windows):
    oracle = TorchFlash() if flash else None
    requests = [(300, 1), (0, 1), (129, 2), (0, 9), (150, 5)]
    Step(requests, name=name, windows=windows, flash=oracle, threshold=2, decode_kernel="cuda").check()


def test_more_prefills_than_pages_in_the_workspace():
    requests = [(random.choice((0, 3, 130, 260)), 2) for _ in range(9)]
    Step(requests, flash=TorchFlash(), history_tokens=2 * PAGE).check()


def test_step_of_padding_alone():
    step = Step([(0, 0), (0, 0)], padding=4)
    before = step.pages.clone()
    assert step.run().numel() == 0
    assert torch.equal(step.after, before)


@pytest.mark.parametrize("flash", [False, True], ids=["pages", "flash"])
def test_dummy_runs_survive(flash):
    """Null tables and slots of -1, as vLLM's captures and dry runs have: nothing is written, nothing is NaN."""
    step = Step([(0, 1), (0, 1), (0, 30)], flash=TorchFlash() if flash else None)
    step.table.zero_(), step.window_table.zero_(), step.slots.fill_(-1), step.window_slots.fill_(-1)
    step.check()
    assert torch.equal(step.after, step.pages) and torch.equal(step.windows_after, step.windows)


@pytest.mark.parametrize("flash", [False, True], ids=["pages", "flash"])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_stored(name, flash):
    """Tokens read back within the quantiser's step; windows hold them in 16 bits; nothing else changes."""
    step = Step(MIXED, name=name, flash=TorchFlash() if flash else None, missing=0.5)
    step.run()
    _, key, value = step.cache_space()
    slots, window_slots = step.slots[: step.total], step.window_slots[: step.total]
    read = [x[slots // PAGE, :, slots % PAGE].double() for x in read_pages(step.after, step.layout)]
    for got, exact in zip(read, (key, value), strict=True):
        # Half of the widest step, of a third of the range: centring on a page's mean widens it by at most the mean's
        # own range, below 8 for these normals; clipped shares are above 0.9.
        width = (exact.amax(-1) - exact.amin(-1) + 8) / 3
        assert ((got - exact).abs().amax(-1) < width).all()
        assert (got - exact).pow(2).mean() < 0.35 * exact.var()
    real = window_slots >= BLOCK
    assert real.any() and not real.all()
    rows = step.windows_after.view(step.window_dtype)[window_slots[real] // BLOCK, :, window_slots[real] % BLOCK]
    # bf16 rounds to 2^-9; fp16 products of 64 terms err by less.
    torch.testing.assert_close(rows.double(), torch.cat((key, value), -1)[real], rtol=2**-7, atol=2**-6)
    page_rows = torch.zeros(len(step.pages), dtype=torch.bool)
    page_rows[slots // PAGE] = True
    assert torch.equal(step.after[~page_rows], step.pages[~page_rows])
    blocks = torch.zeros(len(step.windows), dtype=torch.bool)
    blocks[window_slots[real] // BLOCK] = True
    assert torch.equal(step.windows_after[~blocks], step.windows[~blocks])


def test_windows_are_read():
    """The comparisons above would hold if both sides ignored them."""
    near = Step([(300, 1), (300, 9)], windows=(32, 128), missing=0.0, flash=TorchFlash())
    out = near.run()
    near.windowed = False
    assert (out - near.expected()).abs().max() > 20 * TOLERANCE


def test_a_smaller_workspace_gives_the_same():
    torch.manual_seed(seed := random.randrange(1 << 30))
    wide = Step(MIXED, flash=TorchFlash(), history_tokens=1 << 14)
    torch.manual_seed(seed)
    narrow = Step(MIXED, flash=TorchFlash(), history_tokens=PAGE)
    first, second = wide.run(), narrow.run()
    assert "merge" not in wide.attention.flash.calls and "merge" in narrow.attention.flash.calls
    # Each merge rounds the running output to fp16.
    torch.testing.assert_close(first, second, rtol=2**-6, atol=2**-7)


def test_scratch_stays_where_it_is():
    """Captured graphs hold its addresses: no later step moves it."""
    step = Step(MIXED, flash=TorchFlash())
    first = {name: tensor.data_ptr() for name, tensor in step.attention.scratch(PAGE).items()}
    step.run()
    again = step.attention.scratch(PAGE)
    assert {name: tensor.data_ptr() for name, tensor in again.items()} == first


def test_reloading_keeps_the_memory_of_rotations():
    step = Step(MIXED, name="oscar-int2-static")
    constants = step.attention.constants
    pointer, heads = constants.k_rotation.data_ptr(), step.k_rotation.shape[0]
    other = layer_constants(DEVICE, heads, step.v_rotation, step.k_rotation, step.k_mean + 1, 0.5, 0.6)
    constants.update(other)
    assert constants.k_rotation.data_ptr() == pointer
    assert torch.equal(constants.k_rotation, other.k_rotation) and torch.equal(constants.k_mean, other.k_mean)


@pytest.mark.parametrize("flash", [False, True], ids=["pages", "flash"])
@pytest.mark.parametrize("window_block", [None, BLOCK])
def test_made_up_steps_of_the_warm_up_run(flash, window_block):
    step = Step(MIXED, flash=TorchFlash() if flash else None)
    for new, history, length in (([1, 1], [1, 1], 300), ([5, 6], [0, 300], 500)):
        out = run_step(step.attention, step.layout, window_block, 500, new, history, length)
        assert not torch.isnan(out).any()


@pytest.mark.parametrize("flash", [False, True], ids=["pages", "flash"])
def test_scores_are_taken_in_cache_space(flash, monkeypatch):
    """Queries and the static mean are rotated as keys are, scratch serves; what follows has `test_score.py`."""
    seen = []

    def score(*args):
        seen.append(args)
        return score_slots(*args)

    score_slots = gpu_module.score
    monkeypatch.setattr(gpu_module, "score", score)
    step = Step([(300, 1)], name="oscar-int2-static", flash=TorchFlash() if flash else None)
    queries = torch.randn(40, 6, 64).to(step.dtype)
    table = step.table[0].long().to(DEVICE)
    pages = step.pages.to(DEVICE)
    asked = [queries.to(DEVICE)]
    scores = score_layers([step.attention], [pages], step.layout, table, 300, POLICIES["epicache"], asked, None)
    assert scores.shape == (1, 2, 300)
    ((_, slots, rotated, offset, *_),) = seen
    rotation = step.k_rotation.double()
    # Queries and rotation are rounded to fp16, and their product is.
    wanted = torch.einsum("tgd,gde->tge", queries.double(), rotation.repeat_interleave(3, 0))
    assert rotated.dtype == torch.float16
    torch.testing.assert_close(
        rotated[0].cpu().double(), wanted, rtol=2**-10, atol=2**-10 * float(queries.norm(dim=-1).max())
    )
    wanted = torch.einsum("hd,hde->he", step.k_mean.double(), rotation)
    torch.testing.assert_close(
        offset[0].cpu().double(), wanted, rtol=0, atol=2**-11 * float(step.k_mean.norm(dim=-1).max())
    )
    assert slots.workspace.shape == (2 * PAGE, 2, 64)


@pytest.mark.parametrize("policy", ["snapkv", "keydiff", "h2o"])
def test_made_up_evictions_of_the_warm_up_run(policy, monkeypatch):
    monkeypatch.setattr(gpu_warmup, "_QUERIES", 64)
    step = Step([(5, 1)], heads=1, flash=TorchFlash())
    assert run_eviction(step.attention, step.layout, POLICIES[policy], policy == "h2o").shape == (1, 1, PAGE)


def test_scratch_comes_from_vllm_where_it_keeps_some(monkeypatch):
    from vllm.v1.worker.workspace import WorkspaceManager

    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)  # asks for an accelerator
    manager = WorkspaceManager(DEVICE)
    monkeypatch.setattr(gpu_module.compat, "workspace_manager", lambda: manager)
    step = Step(MIXED, flash=TorchFlash())
    step.attention.scratch(PAGE)
    manager.lock()
    step.check()  # would raise if it grew
    assert len(step.attention.key_workspace(PAGE)) > len(step.attention.scratch(PAGE)["keys"])
