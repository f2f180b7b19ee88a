# SPDX-License-Identifier: Apache-2.0
"""Calls of the decode kernel that cover its instantiations, for compute-sanitizer (it is too slow for the tests).

compute-sanitizer --tool memcheck python tests/gpu/sanitize.py
compute-sanitizer --tool racecheck python tests/gpu/sanitize.py
"""

import importlib.util
from pathlib import Path

import torch

from vllm_kvcompress.formats import get_format
from vllm_kvcompress.kernels import cuda_ops

_CASES = [
    # dim, group, most new tokens, format, (sinks, recent)
    (64, 3, 1, "oscar-int2", (20, 40)),
    (64, 7, 1, "int2", (0, 0)),
    (64, 5, 3, "oscar-int2", (16, 64)),
    (128, 4, 1, "oscar-int2", (20, 40)),
    (128, 6, 1, "int2", (16, 64)),
    (128, 9, 1, "oscar-int2", (16, 64)),
    (128, 4, 8, "oscar-int2", (20, 40)),
    (256, 4, 1, "oscar-int2", (20, 40)),
    (256, 8, 2, "int2", (16, 64)),
    (64, 4, 1, "turboquant-4", (20, 40)),
    (128, 4, 1, "turboquant-4", (20, 40)),
    (128, 6, 3, "turboquant-3.5", (16, 64)),
    (256, 4, 1, "turboquant-3.5", (20, 40)),
    (64, 4, 1, "turboquant-3.5", (20, 40)),
    (128, 4, 1, "turboquant-2.5", (20, 40)),
    (128, 9, 1, "turboquant-2.5-qjl", (20, 40)),
    (256, 4, 1, "turboquant-3.5-qjl", (20, 40)),
    (128, 4, 8, "oscar-int2-qjl", (20, 40)),
]


def main() -> None:
    path = Path(__file__).parent / "conftest.py"
    spec = importlib.util.spec_from_file_location("gpu_conftest", path)
    assert spec is not None and spec.loader is not None
    helpers = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(helpers)
    available, reason = cuda_ops.is_available(torch.device("cuda"))
    if not available:
        raise SystemExit(f"the CUDA kernels cannot run: {reason}")
    for dim, group, new, name, (sinks, recent) in _CASES:
        requests = [(past, 1 + past % new) for past in (0, 1, 17, 128, 200, 700)] + [(50, 0)]
        step = helpers.Step(
            requests, heads=2, group=group, dim=dim, page_format=get_format(name), sinks=sinks, recent=recent,
            missing=0.2, padding=2,
        )  # fmt: skip
        workspace = torch.empty(
            torch.ops.vllm_kvcompress.decode_workspace_elements(2, group, dim, len(requests), step.max_query_len),
            device="cuda",
        )
        torch.ops.vllm_kvcompress.decode(
            step.q, step.new_kv, step.pages, step.window_cache, step.table, step.window_table, step.starts, step.seq,
            step.v_unrotation, step.out, workspace, step.q_signs, step.max_query_len, dim,
            *cuda_ops.code_arguments(step.layout), step.layout.k_mean is not None, True, sinks, recent, step.scale,
        )  # fmt: skip
        torch.cuda.synchronize()
        print(f"head size {dim}, group {group}, up to {step.max_query_len} new tokens, {name}: ran", flush=True)


if __name__ == "__main__":
    main()
