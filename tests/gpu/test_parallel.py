# SPDX-License-Identifier: Apache-2.0
"""Two GPUs through NCCL, heads or layers on each, against what the model itself says (tests/e2e has the CPU's)."""

import pytest
import torch

from ..e2e.features_model import EVERYTHING, Oracle, make_model, prompts, run
from ..e2e.test_features import GREEDY, check_greedy

ON_GPU = {
    "dtype": "float16",
    "enforce_eager": False,
    "gpu_memory_utilization": 0.1,
    "enable_flashinfer_autotune": False,
    # vLLM's own and NCCL's sums: FlashInfer compiles its own at first use, for which a machine needs ninja and nvcc.
    "compilation_config": {"pass_config": {"fuse_allreduce_rms": False}},
}


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason=f"needs two GPUs, found {torch.cuda.device_count()}")
@pytest.mark.parametrize("page_format", ["hadamard-int2", "turboquant-3.5"])
@pytest.mark.parametrize(
    "split",
    [
        pytest.param("tensor_parallel_size", marks=pytest.mark.feature("tensor parallelism", "works")),
        pytest.param("pipeline_parallel_size", marks=pytest.mark.feature("pipeline parallelism", "works")),
    ],
)
def test_two_gpus(page_format, split, tmp_path, monkeypatch):
    """With graphs, prefix hits and chunks; sums of 16-bit numbers, on one GPU or two, as in test_compiled_in_fp16."""
    monkeypatch.setenv("VLLM_ALLREDUCE_USE_FLASHINFER", "0")
    model, asked = make_model(tmp_path / "model"), prompts(700, 30, 300)
    oracle, rounds = Oracle(model), [{"prompts": asked, "sampling": GREEDY}] * 2
    for workers in (1, 2):
        report = run(model, page_format, rounds, windows=EVERYTHING, **ON_GPU, **{split: workers})
        for answers in report["rounds"]:
            for prompt, (answer,) in zip(asked, answers, strict=True):
                check_greedy(oracle, prompt, answer)
