# SPDX-License-Identifier: Apache-2.0
"""The compiled extension without a GPU: it loads, its schemas, its checks, and its ops on fake tensors."""

import random
import runpy
import zipfile
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensor, FakeTensorMode

from vllm_kvcompress.formats import format_names, get_format
from vllm_kvcompress.formats.base import PAGE_TOKENS
from vllm_kvcompress.kernels import cuda_ops
from vllm_kvcompress.quantizers import lloyd_max

HELPERS = Path(__file__).resolve().parents[1] / "packaging" / "cuda_wheel.py"

SCHEMAS = {
    "decode": "(Tensor q, Tensor new_kv, Tensor pages, Tensor? window_cache, Tensor block_table, Tensor? window_table, "
    "Tensor query_start_loc, Tensor seq_lens, Tensor? v_unrotation, Tensor(a!) out, Tensor(b!) workspace, "
    "Tensor? q_signs, int max_query_len, int head_dim, int code, float k_scale, float k_bend, float k_rest_scale, "
    "float k_rest_bend, float v_scale, float v_bend, float v_rest_scale, float v_rest_bend, bool page_means, "
    "bool window_is_bf16, int sink_tokens, int recent_tokens, float scale) -> ()",
    "decode_workspace_elements": "(int num_kv_heads, int group, int head_dim, int max_num_reqs, int max_query_len) "
    "-> int",
    "cuda_versions": "() -> (int, int)",
}

CODE = (
    "code", "k_scale", "k_bend", "k_rest_scale", "k_rest_bend", "v_scale", "v_bend", "v_rest_scale", "v_rest_bend"
)  # fmt: skip


@pytest.fixture(scope="module")
def ops(tmp_path_factory):
    """The ops of csrc/ as it is, or, without nvcc, of the installed library."""
    try:
        with zipfile.ZipFile(runpy.run_path(str(HELPERS))["cuda_wheel"]()) as wheel:
            library = Path(wheel.extract("vllm_kvcompress/_C.so", tmp_path_factory.mktemp("library")))
    except pytest.skip.Exception:
        if not cuda_ops.LIBRARY.is_file():
            raise
        library = cuda_ops.LIBRARY
    assert cuda_ops.load(library) is None
    return torch.ops.vllm_kvcompress


def arguments(device: str, head_dim: int | None = None, windows: bool | None = None) -> dict:
    """A step the op accepts, of random sizes; strides are as free as the op allows."""
    dim = head_dim or random.choice(cuda_ops.HEAD_DIMS)
    windows = random.random() < 0.5 if windows is None else windows
    layouts = [get_format(name).layout(dim, PAGE_TOKENS) for name in format_names()]
    layout = random.choice([one for one in layouts if cuda_ops.code_arguments(one)])
    page_means, is_bf16 = layout.k_mean is not None, random.random() < 0.5
    kv_heads, group, reqs = random.randint(1, 4), random.randint(1, 16), random.randint(1, 5)
    tokens, heads = reqs + random.randint(0, 3), kv_heads * group
    window_dtype = torch.bfloat16 if is_bf16 else torch.float16

    def make(*sizes: int, dtype: torch.dtype, pad: int = 0, contiguous: int = 1) -> torch.Tensor:
        """Zeros with a gap of `pad` elements before the last `contiguous` dimensions repeat."""
        outer, inner = sizes[: len(sizes) - contiguous], sizes[len(sizes) - contiguous :]
        count = torch.Size(inner).numel()
        return torch.zeros(*outer, count + pad, dtype=dtype, device=device)[..., :count].unflatten(-1, inner)

    gap = 8 * random.randint(0, 2)
    q_signs = None if layout.keys.signs is None else make(tokens, heads, dim, dtype=torch.float16, pad=gap)
    table = {"dtype": torch.int32, "pad": random.randint(0, 3)}
    return {
        "q": make(tokens, heads, dim, dtype=torch.float16, pad=gap),
        "new_kv": make(tokens + 2, kv_heads, 2 * dim, dtype=window_dtype, pad=8 * random.randint(0, 2), contiguous=2),
        "pages": make(3, kv_heads, layout.head_bytes, dtype=torch.uint8, pad=16 * random.randint(0, 2), contiguous=2),
        "window_cache": make(5, kv_heads, 16, 4 * dim, dtype=torch.uint8, pad=16, contiguous=3) if windows else None,
        "block_table": make(reqs + 1, 3, **table),
        "window_table": make(reqs, 24, **table) if windows else None,
        "query_start_loc": make(reqs + 1, dtype=torch.int32),
        "seq_lens": make(reqs, dtype=torch.int32),
        "v_unrotation": make(kv_heads, dim, dim, dtype=torch.float16) if random.random() < 0.5 else None,
        "out": make(tokens, heads, dim, dtype=random.choice((torch.float16, torch.bfloat16)), pad=8),
        "workspace": make(64, dtype=torch.float32),
        "q_signs": q_signs,
        "max_query_len": tokens,
        "head_dim": dim,
        **dict(zip(CODE, cuda_ops.code_arguments(layout), strict=True)),
        "page_means": page_means,
        "window_is_bf16": is_bf16,
        "sink_tokens": random.randint(0, 64),
        "recent_tokens": random.randint(0, 256),
        "scale": random.random(),
    }


def test_schemas(ops):
    for name, schema in SCHEMAS.items():
        assert str(getattr(ops, name).default._schema) == f"vllm_kvcompress::{name}{schema}"


def test_which_pages_the_op_reads():
    read = {
        (name, dim): arguments[0]
        for name in format_names()
        for dim in cuda_ops.HEAD_DIMS
        if (arguments := cuda_ops.code_arguments(get_format(name).layout(dim, PAGE_TOKENS)))
    }
    codes = dict.fromkeys(("oscar-int2", "oscar-int2-static", "hadamard-int2", "int2"), 2) | {
        "oscar-int2-qjl": 102, "turboquant-4": 4, "turboquant-3.5": 43, "turboquant-2.5": 32,
        "turboquant-3.5-qjl": 143, "turboquant-2.5-qjl": 132,
    }  # fmt: skip
    # A quarter of 64 channels is not a chunk of 32.
    assert read == {
        (name, dim): code for name, code in codes.items() for dim in cuda_ops.HEAD_DIMS if dim > 64 or "2.5" not in name
    }
    halves = get_format("turboquant-3.5-qjl").layout(128, PAGE_TOKENS)
    three, two, four = (lloyd_max.cubic(64, bits) for bits in (3, 2, 4))
    assert cuda_ops.code_arguments(halves) == (143, *three, *two, *four, *three)


def test_versions(ops):
    runtime, driver = ops.cuda_versions()
    assert runtime >= 12040 and driver >= 0


def test_workspace_for_the_largest_step_serves_every_smaller_one(ops):
    for _ in range(500):
        model = (random.randint(1, 16), random.randint(1, 16), random.choice(cuda_ops.HEAD_DIMS))
        largest = (random.randint(1, 512), random.randint(1, 64))
        smaller = tuple(random.randint(1, limit) for limit in largest)
        needed, allocated = (ops.decode_workspace_elements(*model, *step) for step in (smaller, largest))
        assert 0 <= needed <= allocated, (model, smaller, largest)


def test_workspace_refuses_sizes_out_of_range(ops):
    with pytest.raises(RuntimeError, match=r"max_num_reqs must lie in \[1, 2\^31\), got 0"):
        ops.decode_workspace_elements(8, 4, 128, 0, 1)


def test_a_valid_step_on_the_cpu_is_told_it_needs_a_gpu(ops):
    for _ in range(50):
        with pytest.raises(
            RuntimeError, match=r"decode: q must be on a CUDA device of capability 9\.0, it is on the CPU"
        ):
            ops.decode(**arguments("cpu"))


def replaced(name, change):
    return lambda step: {**step, name: change(step[name])}


def misaligned(tensor):
    """Same sizes and strides, one element further on."""
    storage = torch.zeros(tensor.untyped_storage().nbytes() // tensor.element_size() + 1, dtype=tensor.dtype)
    return storage.as_strided(tensor.shape, tensor.stride(), 1)


BAD = {
    "dtype of q": (replaced("q", torch.Tensor.float), r"q must be float16 \[\d+, \d+, 128\], got float32 \["),
    "dtype of out": (replaced("out", torch.Tensor.float), "out must be float16 or bfloat16, got float32"),
    "dtype of new_kv": (replaced("window_is_bf16", lambda x: not x), r"new_kv must be b?float16 \[any, \d+, 256\]"),
    "dtype of seq_lens": (replaced("seq_lens", torch.Tensor.long), "seq_lens must be int32"),
    "dtype of a table": (replaced("window_table", torch.Tensor.long), r"window_table must be int32 \[any, any\]"),
    "dtype of the rotation": (replaced("v_unrotation", torch.Tensor.bfloat16), "v_unrotation must be float16"),
    "dtype of the workspace": (replaced("workspace", torch.Tensor.half), r"workspace must be float32 \[any\]"),
    "rank of q": (replaced("q", lambda x: x.flatten(1)), r"q must be \[T, Hq, D\]"),
    "head size": (replaced("head_dim", lambda x: 96), "head_dim must be 64, 128 or 256, got 96"),
    "another head size": (replaced("head_dim", lambda x: 64), r"q must be float16 \[\d+, \d+, 64\]"),
    "rows of out": (replaced("out", lambda x: torch.cat((x, x))), "out must be b?float16"),
    "rows of new_kv": (replaced("new_kv", lambda x: x[:0]), "new_kv must have a row for each of q's"),
    "bytes of a page": (
        replaced("code", lambda x: {2: 4, 102: 132}.get(x, 2 if x < 100 else 102)),
        r"pages must be uint8 \[any, \d+, \d+\], got uint8|must have means",
    ),
    "signs": (
        lambda step: {**step, "q_signs": step["q"] if step["q_signs"] is None else None},
        "q_signs goes with codes that have signs",
    ),
    "code": (
        replaced("code", lambda x: 3),
        r"code must be 2 or 102 \(affine\), 4, 43, 32, 143 or 132 \(Lloyd-Max\), got 3",
    ),
    "rows of the table": (replaced("block_table", lambda x: x[:0]), "block_table must have a row for each of"),
    "query starts": (replaced("query_start_loc", lambda x: x[1:]), "query_start_loc must be int32"),
    "window rows": (replaced("window_cache", lambda x: x[..., 16:]), "window_cache must be uint8"),
    "windows without table": (replaced("window_table", lambda x: None), "must both be given, or neither"),
    "strides of q": (replaced("q", lambda x: x.mT.contiguous().mT), "the last 1 dimensions of q must be contiguous"),
    "strides of pages": (
        replaced("pages", lambda x: x.repeat(1, 1, 2)[..., ::2]),
        "the last 2 dimensions of pages must",
    ),
    "gaps in a block": (
        replaced("window_cache", lambda x: torch.cat((x, x), 2)[:, :, ::2]),
        "the last 3 dimensions of window_cache must be contiguous",
    ),
    "an overlapping out": (replaced("out", lambda x: x[:1].expand(x.shape)), "stride 0 of out must be at least 128"),
    "gap of pages": (
        replaced("pages", lambda x: torch.nn.functional.pad(x.flatten(1), (0, 8))[:, :-8].view_as(x)),
        r"stride 0 of pages must be at least \d+ elements and a multiple of 16 bytes",
    ),
    "start of pages": (replaced("pages", misaligned), "pages must begin at a multiple of 16 bytes"),
    "start of q": (replaced("q", misaligned), "q must begin at a multiple of 16 bytes"),
    "query length": (replaced("max_query_len", lambda x: 0), r"max_query_len must lie in \[1, 2\^31\), got 0"),
    "sinks": (replaced("sink_tokens", lambda x: -1), r"sink_tokens must lie in \[0, 2\^31\), got -1"),
    "recent": (replaced("recent_tokens", lambda x: 2**31), r"recent_tokens must lie in \[0, 2\^31\), got 2147483648"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case, ops):
    change, message = BAD[case]
    step = arguments("cpu", head_dim=128, windows=True)
    while step["seq_lens"].numel() < 2 or step["pages"].shape[1] < 2 or step["v_unrotation"] is None:
        step = arguments("cpu", head_dim=128, windows=True)
    with pytest.raises(RuntimeError, match=f"vllm_kvcompress::decode: .*{message}"):
        ops.decode(**change(step))


def test_heads_must_be_a_multiple_of_the_kv_heads(ops):
    step = arguments("cpu")
    heads = step["pages"].shape[1] * 2 + 1
    if step["pages"].shape[1] == 1:
        step["pages"] = step["pages"].repeat(1, 2, 1)
    step["q"] = step["q"].new_zeros(step["q"].shape[0], heads, step["head_dim"])
    with pytest.raises(RuntimeError, match=rf"q's {heads} heads are no multiple of pages' \d KV heads"):
        ops.decode(**step)


@pytest.mark.parametrize("device", ["cuda", "cpu", "meta"])
def test_on_fake_tensors(device, ops):
    def fake(x):
        """Made directly: a torch without CUDA cannot slice fake CUDA tensors."""
        return FakeTensor(mode, x, torch.device(device)) if isinstance(x, torch.Tensor) else x

    step = arguments("meta")
    with FakeTensorMode() as mode:
        assert ops.decode(**{name: fake(x) for name, x in step.items()}) is None


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_without_a_graph_break(backend, ops):
    """On meta tensors, so that the compiled code can run here."""
    inputs = arguments("meta")

    def step(inputs):
        # In the schema's order: by keyword, Dynamo takes `out` for that of an out= variant, and wants it contiguous.
        ops.decode(*inputs.values())
        return inputs["out"] + 1

    assert torch.compile(step, fullgraph=True, backend=backend)(inputs).shape == inputs["out"].shape


@pytest.mark.parametrize(
    "check", ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
)
def test_opcheck(check, ops):
    torch.library.opcheck(ops.decode.default, (), arguments("meta"), test_utils=check)


class TestReasons:
    """Why the ops are not to be had. Each on a state of its own: the extension is loaded once per process."""

    @pytest.fixture(autouse=True)
    def unloaded(self, monkeypatch):
        monkeypatch.setattr(cuda_ops, "_loaded", False)

    def test_not_compiled(self, tmp_path):
        reason = cuda_ops.load(tmp_path / "_C.so")
        assert "not compiled" in reason and "VLLM_KVCOMPRESS_BUILD_CUDA=1" in reason

    def test_old_torch(self, monkeypatch):
        monkeypatch.setattr(torch, "__version__", "2.10.1+cu128")
        assert cuda_ops.load() == "it needs torch >= 2.11, this is 2.10.1+cu128"

    def test_no_library(self, tmp_path):
        library = tmp_path / "_C.so"
        library.write_bytes(b"\x7fELF, or so it says")
        assert cuda_ops.load(library).startswith(f"{library} does not load: ")

    def test_other_devices(self):
        available, reason = cuda_ops.is_available(torch.device("cpu"))
        assert not available and reason.endswith("the device is cpu")

    def test_no_gpu(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        available, reason = cuda_ops.is_available.__wrapped__(torch.device("cuda"))
        assert not available and "finds no NVIDIA GPU" in reason

    @pytest.fixture
    def gpu(self, monkeypatch):
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    def test_another_gpu(self, gpu, monkeypatch):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA L4")
        available, reason = cuda_ops.is_available.__wrapped__(torch.device("cuda"))
        assert not available and reason.endswith("compute capability 9.0 (H100, H200), NVIDIA L4 has 8.9")

    @pytest.mark.parametrize(("driver", "enough"), [(12080, False), (13000, True), (13020, True)])
    def test_driver(self, driver, enough, gpu, monkeypatch):
        monkeypatch.setattr(cuda_ops, "load", lambda: None)
        monkeypatch.setattr(torch.ops.vllm_kvcompress, "cuda_versions", lambda: (13000, driver), raising=False)
        available, reason = cuda_ops.is_available.__wrapped__(torch.device("cuda"))
        assert available == enough
        assert ("built with CUDA 13.0 for" in reason) if enough else ("serves CUDA 12.8: update" in reason)
