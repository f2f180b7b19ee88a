# SPDX-License-Identifier: Apache-2.0
"""A real engine on a GPU with real weights: captured graphs change nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vllm_kvcompress.formats import get_format
from vllm_kvcompress.formats.base import PAGE_TOKENS
from vllm_kvcompress.kernels import cuda_ops

from .answers import check_alike

README = Path(__file__).resolve().parents[2] / "README.md"
TOKENS = 48
HEAD_DIM = 64
"""Of the demo model"""
RUN = f"""
import json, sys
from vllm import LLM, SamplingParams
model, text_file, graphs, page_format = sys.argv[1:5]
# Memory is given, not measured: vLLM refuses to start where another process frees memory meanwhile. The utilisation is
# what must be free at the start.
llm = LLM(model, kv_cache_dtype=page_format, max_model_len=8192, max_num_batched_tokens=1024, max_num_seqs=8,
          gpu_memory_utilization=0.1, kv_cache_memory_bytes=1 << 30, enable_flashinfer_autotune=False,
          enable_prefix_caching=False, seed=0,
          compilation_config={{}} if graphs == "graphs" else {{"cudagraph_mode": "NONE"}})
ids = llm.get_tokenizer()(open(text_file, encoding="utf-8").read())["input_ids"]
prompts = [{{"prompt_token_ids": ids[:length]}} for length in (5, 129, 700, 3000)]
sampling = SamplingParams(max_tokens={TOKENS}, temperature=0, ignore_eos=True, logprobs=0)
def answer(prompt):
    output = llm.generate([prompt], sampling)[0].outputs[0]
    chosen = [step[token].logprob for step, token in zip(output.logprobs, output.token_ids)]
    return [list(output.token_ids), chosen]
# One at a time: batches differ from run to run with the timing of requests, and 16-bit sums with them.
print("TOKENS", json.dumps([answer(prompt) for prompt in prompts]))
"""


def generate(model, graphs, page_format):
    arguments = [str(model), str(README), graphs, page_format]
    done = subprocess.run([sys.executable, "-c", RUN, *arguments], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    (line,) = (x for x in done.stdout.splitlines() if x.startswith("TOKENS "))
    return json.loads(line.removeprefix("TOKENS "))


@pytest.mark.feature("CUDA graphs", "works")
@pytest.mark.skipif(not README.is_file(), reason="the text is the README of the source tree")
@pytest.mark.parametrize("page_format", ["oscar-int2", "turboquant-3.5", "turboquant-2.5-qjl"])
def test_greedy_text_is_the_same_with_and_without_cuda_graphs(demo_model, page_format):
    """To the bit with the CUDA kernel, whose shares are those of the request.

    Triton's, which serves 2.5 bits at this head size, takes as many shares as fill the device with the longest request
    that a graph may be replayed for, so its sums are in another order there.
    """
    with_graphs, without = (generate(demo_model, graphs, page_format) for graphs in ("graphs", "none"))
    assert [len(tokens) for tokens, _ in with_graphs] == [TOKENS] * 4
    if has_cuda_kernel(page_format):
        assert [tokens for tokens, _ in with_graphs] == [tokens for tokens, _ in without]
    for answer, expected in zip(with_graphs, without, strict=True):
        check_alike(answer, expected)


def has_cuda_kernel(page_format):
    available, _ = cuda_ops.is_available(torch.device("cuda"))
    layout = get_format(page_format).layout(HEAD_DIM, PAGE_TOKENS)
    return available and cuda_ops.code_arguments(layout) is not None
