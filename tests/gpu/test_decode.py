# SPDX-License-Identifier: Apache-2.0
"""The CUDA decode kernel against the float32 oracle.

Tolerance 2e-3 of a row's norm. What the arithmetic loses: queries, weights and (in 16-bit windows) values are fp16
operands, 2^-11 = 4.9e-4 each at most; the output is rounded to fp16, 4.9e-4 more; sums are float32. bf16 output rounds
by 2^-9 of each element instead, at most 2.0e-3 of the row's norm, which is added where it applies.
"""

import pytest
import torch

from vllm_kvcompress.formats import format_names, get_format
from vllm_kvcompress.formats.base import PAGE_TOKENS
from vllm_kvcompress.kernels import cuda_ops

TOLERANCE = 2e-3
BF16_ROUNDING = 2.0**-9
LEVEL_ROUNDING = 2.0**-10
"""Of Lloyd-Max levels, which fp16 operations compute and round twice; codes of affine formats are exact. One case of
1143 was 2.07e-3 off, of 2.5 bits at head size 256."""
# Head sizes and formats that the kernel reads, each kind of code once.
READ = [
    (dim, name)
    for dim in cuda_ops.HEAD_DIMS
    for name in ("hadamard-int2", "int2", *(name for name in format_names() if "turboquant" in name or "qjl" in name))
    if cuda_ops.code_arguments(get_format(name).layout(dim, PAGE_TOKENS)) is not None
]
MIXED = [0, 1, 15, 16, 17, 63, 127, 128, 129, 255, 300, 1000, 2049, 5000]


@pytest.fixture(scope="module", autouse=True)
def _op():
    available, reason = cuda_ops.is_available(torch.device("cuda"))
    if not available:
        pytest.skip(f"the CUDA kernels cannot run: {reason}")


def run(step, unrotate=True, out=None):
    out = step.out if out is None else out
    workspace = torch.full(
        (
            torch.ops.vllm_kvcompress.decode_workspace_elements(
                step.heads, step.group, step.dim, len(step.seq), step.max_query_len
            ),
        ),
        torch.nan,
        device="cuda",
    )
    torch.ops.vllm_kvcompress.decode(
        step.q,
        step.new_kv,
        step.pages,
        step.window_cache,
        step.table,
        step.window_table,
        step.starts,
        step.seq,
        step.v_unrotation if unrotate else None,
        out,
        workspace,
        step.q_signs,
        step.max_query_len,
        step.dim,
        *cuda_ops.code_arguments(step.layout),
        step.layout.k_mean is not None,
        step.window_dtype == torch.bfloat16,
        step.sinks,
        step.recent,
        step.scale,
    )
    torch.cuda.synchronize()
    return out


def check(step, worst_error, unrotate=True):
    got = run(step, unrotate)
    tolerance = TOLERANCE + (BF16_ROUNDING if got.dtype == torch.bfloat16 else 0)
    tolerance += LEVEL_ROUNDING if step.layout.keys.quantizer == "lloyd-max" else 0
    error = worst_error(got[: step.num_tokens], step.reference(unrotate))
    assert error <= tolerance, error
    assert torch.isnan(got[step.num_tokens :]).all(), "padding rows are nobody's"


@pytest.mark.parametrize("windows", [(0, 0), (64, 256), (5, 100), (0, 40), (40, 0)])
@pytest.mark.parametrize("dim,name", READ)
def test_formats_and_windows(make_step, worst_error, dim, name, windows):
    step = make_step(
        [(n, 1) for n in MIXED], heads=2, group=4, dim=dim, page_format=get_format(name), sinks=windows[0],
        recent=windows[1], missing=0.3,
    )  # fmt: skip
    check(step, worst_error)


@pytest.mark.parametrize("windows", [(64, 256), (5, 100), (40, 0)])
@pytest.mark.parametrize("dim,name", [(64, "turboquant-4"), (128, "turboquant-4"), (128, "hadamard-int2")])
def test_larger_window_blocks(make_step, worst_error, dim, name, windows):
    """Pages of 4 bits are as large as 32 tokens in 16 bits, and a companion block holds as many."""
    step = make_step(
        [(n, 1) for n in MIXED], heads=3, group=4, dim=dim, page_format=get_format(name), sinks=windows[0],
        recent=windows[1], missing=0.3, block=32,
    )  # fmt: skip
    check(step, worst_error)


@pytest.mark.parametrize("batch", [3, 17, 40])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 15, 16])
@pytest.mark.parametrize("dim,name", [case for case in READ if case[1] != "int2"])
def test_groups(make_step, worst_error, dim, name, group, batch):
    """Groups that no tile divides read their own KV head, at small and at large batches (a bug others had)."""
    lengths = torch.randint(1, 700, (batch,)).tolist()
    step = make_step(
        [(n, 1) for n in lengths], heads=3, group=group, dim=dim, page_format=get_format(name), sinks=16, recent=64,
    )  # fmt: skip
    check(step, worst_error)


@pytest.mark.parametrize("window_dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("group", [1, 3, 4, 7, 16])
@pytest.mark.parametrize("new", range(1, 9))
@pytest.mark.parametrize("name", ["oscar-int2", "turboquant-4", "turboquant-3.5", "turboquant-2.5-qjl"])
def test_several_new_tokens(make_step, worst_error, name, new, group, window_dtype):
    """Speculative decoding: causal among the step's own tokens; requests may have fewer than the most, or none."""
    lengths = [(n, int(torch.randint(0, new + 1, ()))) for n in MIXED] + [(777, new)]
    step = make_step(
        lengths, heads=2, group=group, dim=128, page_format=get_format(name), sinks=32, recent=48, missing=0.2,
        window_dtype=window_dtype, padding=5,
    )  # fmt: skip
    check(step, worst_error)


@pytest.mark.parametrize("requests", [1, 2, 31, 32, 33, 100, 300])
def test_many_requests(make_step, worst_error, requests):
    lengths = [(int(n), int(k)) for n, k in zip(torch.randint(0, 3000, (requests,)), torch.randint(0, 2, (requests,)),
                                                strict=True)]  # fmt: skip
    step = make_step(
        [*lengths, (1, 1)], heads=4, group=4, dim=128, page_format=get_format("oscar-int2"), sinks=64, recent=256,
        padding=7, out_dtype=torch.bfloat16,
    )  # fmt: skip
    check(step, worst_error)


@pytest.mark.parametrize("length", [32768, 100_003, 262_144])
def test_long_contexts(make_step, worst_error, length):
    step = make_step(
        [(length, 1), (length // 2 + 3, 1)], heads=2, group=4, dim=128, page_format=get_format("oscar-int2"), sinks=64,
        recent=256,
    )  # fmt: skip
    check(step, worst_error)


@pytest.mark.parametrize("query_scale", [0.01, 8.0, 40.0])
def test_flat_and_peaked_attention(make_step, worst_error, query_scale):
    step = make_step(
        [(n, 1) for n in MIXED], heads=2, group=4, dim=128, page_format=get_format("oscar-int2"), sinks=64, recent=256,
        query_scale=query_scale,
    )  # fmt: skip
    # Scores in powers of 2 reach the hundreds when scaled by 40, so their fp16-rounded queries turn weights by up to
    # |score| * 2^-11 * ln 2, far beyond the tolerance: the oracle gets the same fp16 queries and so shares it.
    check(step, worst_error)


def test_null_pages_are_skipped(make_step, worst_error):
    step = make_step(
        [(n, 1) for n in MIXED], heads=2, group=4, dim=128, page_format=get_format("oscar-int2"), sinks=64, recent=256,
        null_pages=0.4, missing=0.3,
    )  # fmt: skip
    check(step, worst_error)


def test_dummy_run(make_step):
    """Capture and profiling: all-zero tables, any lengths. Nothing of the null page may be read."""
    step = make_step(
        [(n, 1) for n in MIXED], heads=2, group=4, dim=128, page_format=get_format("oscar-int2"), sinks=64, recent=256
    )
    step.table.zero_()
    step.window_table.zero_()
    got = run(step, unrotate=False)
    values = step.new_kv[:, :, step.dim :].half().repeat_interleave(step.group, dim=1)
    # Only the new token is left, with weight 1: its value, rounded to fp16 twice at most.
    torch.testing.assert_close(got, values, rtol=2**-10, atol=1e-6)


def test_without_rotation(make_step, worst_error):
    step = make_step([(n, 1) for n in MIXED], heads=2, group=4, dim=128, page_format=get_format("int2"))
    check(step, worst_error, unrotate=False)


def test_padded_and_empty(make_step, worst_error):
    """A padded batch as CUDA graphs replay it: requests without tokens, some with a stale or zero length."""
    step = make_step(
        [(500, 1), (0, 0), (300, 1), (0, 0), (77, 0)], heads=2, group=4, dim=128, page_format=get_format("oscar-int2"),
        sinks=64, recent=256, padding=3,
    )  # fmt: skip
    check(step, worst_error)
    step.seq[1] = 0
    step.starts[2:] = step.starts[1]  # all but the first are empty now
    got = run(step, out=torch.full_like(step.out, torch.nan))
    assert torch.isnan(got[1:]).all() and torch.isfinite(got[0]).all()


def test_strided_inputs(make_step, worst_error):
    """Rows of larger tensors: queries of a fused projection, tables wider than needed, padded pages."""
    step = make_step(
        [(n, 1) for n in MIXED], heads=2, group=4, dim=128, page_format=get_format("oscar-int2"), sinks=64, recent=256
    )
    expected = step.reference()
    step.q = torch.cat((step.q, torch.full_like(step.q, torch.nan)), dim=1)[:, : step.q.shape[1]]
    step.table = torch.cat((step.table, torch.full_like(step.table, 1 << 30)), dim=1)[:, : step.table.shape[1]]
    padded = torch.full((len(step.pages), step.pages[0].numel() + 256), 0xFF, dtype=torch.uint8, device="cuda")
    padded[:, : step.pages[0].numel()] = step.pages.flatten(1)
    step.pages = padded[:, : step.pages[0].numel()].view(step.pages.shape)
    wide = torch.full((len(step.out), 2 * step.out.shape[1], step.dim), torch.nan, dtype=step.out.dtype, device="cuda")
    got = run(step, out=wide[:, : step.out.shape[1]])
    assert worst_error(got, expected) <= TOLERANCE
    assert torch.isnan(wide[:, step.out.shape[1] :]).all()


def test_same_bits_every_time(make_step):
    step = make_step(
        [(n, 1) for n in MIXED], heads=2, group=4, dim=128, page_format=get_format("oscar-int2"), sinks=64, recent=256
    )
    first = run(step).clone()
    for _ in range(5):
        assert torch.equal(first, run(step, out=torch.full_like(step.out, torch.nan)))


def test_cuda_graph(make_step, worst_error):
    """One captured graph serves other lengths, tables and queries of the same shapes."""
    step = make_step(
        [(3000, 1) for _ in range(8)], heads=2, group=4, dim=128, page_format=get_format("oscar-int2"), sinks=64,
        recent=256,
    )  # fmt: skip
    run(step)
    graph = torch.cuda.CUDAGraph()
    lengths = step.seq.clone()
    tables = step.table.clone(), step.window_table.clone()
    step.seq.fill_(1)
    step.table.zero_()
    step.window_table.zero_()
    workspace = torch.empty(
        torch.ops.vllm_kvcompress.decode_workspace_elements(step.heads, step.group, step.dim, 8, 1), device="cuda"
    )
    with torch.cuda.graph(graph):
        torch.ops.vllm_kvcompress.decode(
            step.q, step.new_kv, step.pages, step.window_cache, step.table, step.window_table, step.starts, step.seq,
            step.v_unrotation, step.out, workspace, None, 1, step.dim, *cuda_ops.code_arguments(step.layout), True,
            True, step.sinks, step.recent, step.scale,
        )  # fmt: skip
    step.table.copy_(tables[0])
    step.window_table.copy_(tables[1])
    for _ in range(3):
        # Shorter histories read a part of what is filled; their windows then lie where blocks exist.
        step.seq.copy_(lengths - torch.randint(0, 2900, (8,), device="cuda", dtype=torch.int32))
        step.q.normal_()
        step.out.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert worst_error(step.out, step.reference()) <= TOLERANCE
