# SPDX-License-Identifier: Apache-2.0
"""Real engines that evict on a GPU: captured graphs and async scheduling change nothing (tests/e2e has the rest)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from .answers import check_alike

README = Path(__file__).resolve().parents[2] / "README.md"
TOKENS = 300
BUDGET, BLOCK = 512, 512
RUN = f"""
import json, sys
from vllm import LLM, SamplingParams
model, text_file, graphs, page_format = sys.argv[1:5]
llm = LLM(model, kv_cache_dtype=page_format, max_model_len=8192, max_num_batched_tokens=1024, max_num_seqs=8,
          gpu_memory_utilization=0.1, kv_cache_memory_bytes=1 << 30, enable_flashinfer_autotune=False, seed=0,
          compilation_config={{}} if graphs == "graphs" else {{"cudagraph_mode": "NONE"}},
          additional_config={{"kvcompress": {{"episodic": {{"budget": {BUDGET}, "block_tokens": {BLOCK}}}}}}})
ids = llm.get_tokenizer()(open(text_file, encoding="utf-8").read())["input_ids"]
guide = llm.get_tokenizer()("Which format should I pick, and what does it cost?")["input_ids"]
cases = [("epicache", 3000), ("snapkv", 3000), ("keydiff", 1300), ("streaming", 2048), ("h2o", 1700),
         (None, 700)]
found = []
def sampling(policy, **more):
    asked = {{"kvcompress_budget": {BUDGET}, "kvcompress_policy": policy, **more}} if policy else None
    if policy == "epicache":
        asked["kvcompress_guide"] = guide
    return SamplingParams(max_tokens={TOKENS}, temperature=0, ignore_eos=True, logprobs=0, extra_args=asked)
def answers(cases, **more):
    prompts = [{{"prompt_token_ids": ids[:length]}} for _, length in cases]
    outputs = [o.outputs[0] for o in llm.generate(prompts, [sampling(p, **more) for p, _ in cases])]
    chosen = [[step[token].logprob for step, token in zip(o.logprobs, o.token_ids)] for o in outputs]
    return [[list(o.token_ids), logprobs] for o, logprobs in zip(outputs, chosen)]
# One at a time: batches differ from run to run with the timing of requests, and 16-bit sums with them.
found += [answers([case])[0] for case in cases]
answers([("epicache", 2900)], kvcompress_keep="first")
found += answers([("epicache", 2990)], kvcompress_episode="first")
print("TOKENS", json.dumps(found))
# All at once, for what a graph's padding may touch: as long as each, and nothing that is not a token.
print("LENGTHS", json.dumps([len(tokens) for tokens, _ in answers(cases)]))
"""


def generate(model, graphs, page_format):
    arguments = [str(model), str(README), graphs, page_format]
    done = subprocess.run([sys.executable, "-c", RUN, *arguments], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    lines = dict(line.split(" ", 1) for line in done.stdout.splitlines() if line.startswith(("TOKENS ", "LENGTHS ")))
    return json.loads(lines["TOKENS"]), json.loads(lines["LENGTHS"])


@pytest.mark.feature("eviction and episodes", "works")
@pytest.mark.skipif(not README.is_file(), reason="the text is the README of the source tree")
@pytest.mark.parametrize("page_format", ["auto", "oscar-int2", "turboquant-3.5"])
def test_evicting_text_is_the_same_with_and_without_cuda_graphs(demo_model, page_format):
    """The answers run over a block's end, so that generated tokens are compacted as well.

    Numbers differ and in the end tokens do: what decodes splits a request's keys into other shares in a captured graph
    (FlashAttention's for `auto`, Triton's otherwise), so 16-bit sums differ. See `answers.check_alike` for by how much;
    a page that is read after it was freed, or a gap that a graph does not see, is several nats.
    """
    (with_graphs, lengths), (without, _) = (generate(demo_model, graphs, page_format) for graphs in ("graphs", "none"))
    assert [len(tokens) for tokens, _ in with_graphs] == [TOKENS] * 7 and lengths == [TOKENS] * 6
    for answer, expected in zip(with_graphs, without, strict=True):
        check_alike(answer, expected)
