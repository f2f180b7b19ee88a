# SPDX-License-Identifier: Apache-2.0
"""Every kernel compiles for every kind of GPU we claim, without one: the interpreter accepts more than the compiler.

A row of `ROWS` calls a public launcher on CPU tensors of the dtypes, strides and sizes that matter. In a process of its
own, where Triton is not an interpreter, each launch is compiled and goes no further.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

# Bytes of shared memory a block may have: a kernel that wants more compiles, and fails when launched.
SHARED_MEMORY = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 120: 99 << 10}
HEADS, GROUP, REQUESTS = 8, 3, 4


def rotate(tokens, dim, dtype):
    from vllm_kvcompress.triton_kernels.rotate import rotate

    x = torch.empty(tokens, HEADS * GROUP, dim, dtype=dtype)
    rotate(x, torch.empty(HEADS, dim, dim, dtype=torch.float16), torch.empty_like(x, dtype=torch.float16))


def store(name, tokens, dim, dtype, window_dtype=torch.bfloat16, rotated=True, optional=True):
    from vllm_kvcompress.formats import get_format
    from vllm_kvcompress.triton_kernels.store import store

    page_format = get_format(name)
    layout = page_format.layout(dim, 128)
    fused = torch.empty(tokens, 3 * HEADS * dim, dtype=dtype)
    key, value = (part.view(tokens, HEADS, dim) for part in fused.chunk(3, dim=1)[1:])
    rotation = torch.empty(HEADS, dim, dim, dtype=torch.float16) if rotated else None
    slots = torch.zeros(tokens, dtype=torch.int64)
    store(
        torch.empty(2, HEADS, layout.head_bytes, dtype=torch.uint8),
        layout,
        key,
        value,
        slots,
        torch.zeros(REQUESTS + 1, dtype=torch.int32),
        torch.zeros(REQUESTS, dtype=torch.int32),
        torch.zeros(REQUESTS, 16, dtype=torch.int32),
        k_rotation=rotation,
        v_rotation=rotation,
        k_mean=torch.empty(HEADS, dim) if page_format.centring == "static" else None,
        clip_k=torch.empty(HEADS),
        clip_v=torch.empty(HEADS),
        window_cache=torch.empty(2, HEADS, 16, 4 * dim, dtype=torch.uint8) if optional else None,
        window_slots=slots if optional else None,
        window_dtype=window_dtype,
        new_kv=torch.empty(tokens, HEADS, 2 * dim, dtype=window_dtype) if optional else None,
        max_query_len=tokens if tokens > 256 else 1,
        sketch=torch.empty(dim, dim, dtype=torch.float16) if layout.keys.signs is not None else None,
    )


def _history(name, dim, window_dtype, windows):
    """Pages, layout, block table, windows and their table."""
    from vllm_kvcompress.formats import get_format

    layout = get_format(name).layout(dim, 128)
    return {
        "pages": torch.empty(2, HEADS, layout.head_bytes, dtype=torch.uint8),
        "layout": layout,
        "block_table": torch.zeros(REQUESTS, 16, dtype=torch.int32),
        "query_start_loc": torch.zeros(REQUESTS + 1, dtype=torch.int32),
        "seq_lens": torch.zeros(REQUESTS, dtype=torch.int32),
        "window_cache": torch.empty(2, HEADS, 16, 4 * dim, dtype=torch.uint8) if windows else None,
        "window_table": torch.zeros(REQUESTS, 128, dtype=torch.int32) if windows else None,
        "window_dtype": window_dtype,
        "sink_tokens": 64,
        "recent_tokens": 256,
        "sketch": torch.empty(dim, dim, dtype=torch.float16) if layout.keys.signs is not None else None,
    }


def attend(name, dim, new, num_splits=1, window_dtype=torch.bfloat16, windows=True, out_dtype=torch.float16):
    from vllm_kvcompress.triton_kernels.attend import attend, workspace_elements

    q = torch.empty(REQUESTS * new, HEADS * GROUP, dim, dtype=torch.float16)
    attend(
        q,
        torch.empty(len(q), HEADS, 2 * dim, dtype=window_dtype),
        out=torch.empty_like(q, dtype=out_dtype),
        scale=0.1,
        max_query_len=new,
        num_splits=num_splits,
        workspace=torch.empty(workspace_elements(*q.shape, num_splits)),
        **_history(name, dim, window_dtype, windows),
    )


def gather(name, dim, window_dtype=torch.bfloat16, windows=True):
    from vllm_kvcompress.triton_kernels.gather import gather_history

    dense = torch.empty(2, 1024, HEADS, dim, dtype=torch.float16)
    gather_history(
        cu_history=torch.zeros(REQUESTS + 1, dtype=torch.int32),
        first_token=0,
        keys=dense[0],
        values=dense[1],
        tile_tokens=1024,
        **_history(name, dim, window_dtype, windows),
    )


def compact(name, dim, policy, group=GROUP, budget=1, offset=False):
    from vllm_kvcompress.episodic.policies import POLICIES
    from vllm_kvcompress.formats import get_format
    from vllm_kvcompress.triton_kernels.compact import compact
    from vllm_kvcompress.triton_kernels.score import Slots, score

    layout = get_format(name).layout(dim, 128)
    pages = torch.zeros(2, HEADS, layout.head_bytes, dtype=torch.uint8)
    table = torch.ones(budget + 1, dtype=torch.int64)
    workspace = torch.empty(1024, HEADS, dim, dtype=torch.float16)
    sketch = torch.empty(dim, dim, dtype=torch.float16) if layout.keys.signs is not None else None
    queries = torch.empty(2, 64, HEADS * group, dim, dtype=torch.float16)
    slots = Slots([pages, pages], layout, table, budget * 128 + 100, workspace, sketch)
    scores = score(POLICIES[policy], slots, queries, torch.empty(2, HEADS, dim) if offset else None, 0.1)
    assert scores.shape == (2, HEADS, budget * 128 + 100)
    kept = torch.arange(budget * 128).expand(2, HEADS, -1).contiguous()
    for is_first in (True, False):
        compact([pages, pages], layout, table, table[:budget], kept, is_first, torch.ones(2, HEADS), sketch=sketch)


def merge(dim, dtype, rotated=True):
    from vllm_kvcompress.triton_kernels.merge import merge_states

    out = torch.empty(1024, HEADS * GROUP, dim, dtype=dtype)
    lse = torch.empty(HEADS * GROUP, 1024)
    rotation = torch.empty(HEADS, dim, dim, dtype=torch.float16) if rotated else None
    merge_states(out, out, lse, out.half(), lse, rotation)


def gaps(width, block_tokens):
    from vllm_kvcompress.triton_kernels.gaps import close_rows

    table, lengths, packed = (torch.zeros(*shape, dtype=torch.int32) for shape in ((4, width), (4,), (20,)))
    close_rows(table, lengths, packed, 4, block_tokens)


ROWS = {
    "rotate": [
        lambda: rotate(32, 128, torch.bfloat16),
        lambda: rotate(8192, 256, torch.float32),
        lambda: rotate(8192, 96, torch.float16),
    ],
    "store": [
        lambda: store("oscar-int2", 32, 128, torch.bfloat16),
        lambda: store("oscar-int2", 8192, 128, torch.bfloat16),
        lambda: store("hadamard-int2", 1024, 96, torch.float16, torch.float16, optional=False),
        lambda: store("oscar-int2-static", 8192, 256, torch.float32),
        lambda: store("int2", 1024, 64, torch.bfloat16, rotated=False),
        lambda: store("turboquant-4", 32, 64, torch.bfloat16),
        lambda: store("turboquant-3.5", 1024, 128, torch.bfloat16),
        lambda: store("turboquant-2.5-qjl", 1024, 96, torch.float16, torch.float16),
        lambda: store("turboquant-2.5-qjl", 1024, 256, torch.bfloat16),
        lambda: store("oscar-int2-qjl", 32, 256, torch.float32),
        lambda: store("oscar-int2-qjl", 8192, 128, torch.bfloat16),
    ],
    "attend": [
        lambda: attend("oscar-int2", 128, 1, num_splits=4),
        lambda: attend("oscar-int2", 256, 8),
        lambda: attend("int2", 96, 8, windows=False, out_dtype=torch.float32),
        lambda: attend("turboquant-4", 128, 1),
        lambda: attend("turboquant-3.5", 128, 8, windows=False),
        lambda: attend("turboquant-2.5-qjl", 64, 1, windows=False, num_splits=4),
        lambda: attend("oscar-int2-qjl", 96, 1, windows=False),
    ],
    "gather": [
        lambda: gather("oscar-int2", 128),
        lambda: gather("int2", 96, windows=False),
        lambda: gather("oscar-int2", 256),
        lambda: gather("turboquant-4", 128),
        lambda: gather("turboquant-3.5", 96, windows=False),
        lambda: gather("turboquant-2.5-qjl", 64),
        lambda: gather("oscar-int2-qjl", 256, windows=False),
    ],
    "compact": [
        lambda: compact("oscar-int2", 128, "epicache"),
        lambda: compact("oscar-int2", 96, "snapkv", group=7, budget=20),
        lambda: compact("oscar-int2-static", 256, "keydiff", offset=True),
        lambda: compact("turboquant-2.5-qjl", 64, "epicache", group=16),
        lambda: compact("oscar-int2-qjl", 256, "epicache", budget=3),
        lambda: compact("turboquant-4", 256, "h2o", group=4, budget=3),
    ],
    "gaps": [lambda: gaps(6400, 16), lambda: gaps(801, 128)],
    "merge": [
        lambda: merge(96, torch.float16, rotated=False),
        lambda: merge(128, torch.bfloat16),
        lambda: merge(256, torch.bfloat16),
    ],
}


@pytest.fixture(scope="module")
def compilations():
    """Processes that compile every row for every capability, as many at a time as there are processors."""
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}

    def run(case):
        command = [sys.executable, __file__, case[0], str(case[1])]
        return subprocess.run(command, capture_output=True, text=True, env=environ)

    cases = [(module, capability) for module in ROWS for capability in SHARED_MEMORY]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {case: pool.submit(run, case) for case in cases}


@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("module", ROWS)
def test_compiles(compilations, module, capability):
    done = compilations[module, capability].result()
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kernels) >= len(ROWS[module])
    for kernel in kernels:
        assert kernel["shared"] <= SHARED_MEMORY[capability], kernel


def compile_rows(module: str, capability: int) -> None:
    """Compile what the launches of a module's rows would run; print a line of JSON for each kernel."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class NoDriver:
        """All that compiling asks of a driver."""

        def get_current_target(self):
            return GPUTarget("cuda", capability, 32)

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        print(json.dumps({"kernel": self.__name__, "shared": kernel.metadata.shared}), flush=True)
        return kernel

    driver.set_active(NoDriver())
    JITFunction.run = compile_only
    for launch in ROWS[module]:
        launch()


if __name__ == "__main__":
    compile_rows(sys.argv[1], int(sys.argv[2]))
