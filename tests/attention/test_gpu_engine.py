# SPDX-License-Identifier: Apache-2.0
"""Real engines on the GPU kernels, interpreted on the CPU, and drafts on either path.

What the CPU's engine has of a GPU's: chunked prefill, mixed batches, prefix hits, companion blocks. Not: CUDA graphs,
FlashAttention.
"""

import json
import math
import os
import random
import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs engines on the GPU")

MAX_LEN = 512
EVERYTHING = {"sink_tokens": MAX_LEN, "recent_tokens": 0}
# bf16 windows move the tiny model's log-probabilities by a few times 0.01 (tests/e2e/test_engine.py); a wrong token's
# key or value by more than 1.
BF16_WINDOWS = 0.1
# KL divergence of next tokens, nats, where both paths keep the same tokens: below 1e-4. It grows with the square of how
# far log-probabilities differ; another policy's tokens make it 0.08 to 0.2 on such models.
SAME_TOKENS = 0.01
NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 1, "prompt_lookup_max": 3}

RUNNER = """
import json, os, sys
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

def main():
    from vllm import LLM, SamplingParams
    job = json.loads(sys.argv[1])
    llm = LLM(enforce_eager=True, disable_log_stats=False, **job["engine"])
    pool = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    report = {"rounds": [], "free_before": pool.get_num_free_blocks()}
    for prompts in job["rounds"]:
        extra = job["extra"] or [None] * len(prompts)
        params = [SamplingParams(**job["sampling"], extra_args=arguments) for arguments in extra]
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        report["rounds"].append([
            {
                "tokens": list(out.outputs[0].token_ids),
                "cached": out.num_cached_tokens,
                "logprobs": [e[t].logprob for e, t in zip(out.outputs[0].logprobs, out.outputs[0].token_ids)],
                "first": {token: entry.logprob for token, entry in out.outputs[0].logprobs[0].items()},
            }
            for out in outputs
        ])
    report["free_after"] = pool.get_num_free_blocks()
    report["metrics"] = {m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")}
    print("REPORT " + json.dumps(report))

if __name__ == "__main__":
    main()
"""


def save_model(folder, layers=2, heads=6, kv_heads=2):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(random.randrange(1 << 30))
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=64,
        max_position_embeddings=2 * MAX_LEN,
        initializer_range=0.08,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("tiny-llama"))


def run(model, cache_dtype, *rounds, kvcompress=None, max_tokens=4, extra=None, logprobs=0, **engine):
    arguments = {
        "model": str(model),
        "skip_tokenizer_init": True,
        "kv_cache_dtype": cache_dtype,
        "max_model_len": MAX_LEN,
        "max_num_batched_tokens": 96,
        "max_num_seqs": 8,
        "kv_cache_memory_bytes": 32 << 20,
        "dtype": "float32",
        "additional_config": {"kvcompress": kvcompress} if kvcompress else {},
    }
    sampling = {"temperature": 0, "max_tokens": max_tokens, "ignore_eos": True, "logprobs": logprobs}
    job = {"engine": arguments | engine, "rounds": rounds, "sampling": sampling, "extra": extra}
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", RUNNER, json.dumps(job)], capture_output=True, text=True, timeout=900, env=environment
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("REPORT ")]
    assert lines, f"the engine failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    report = json.loads(lines[0].removeprefix("REPORT "))
    assert report["free_after"] == report["free_before"], "every block came back"
    return report


def prompts(*lengths):
    return [[random.randrange(3, 512) for _ in range(length)] for length in lengths]


def assert_same(ours, theirs):
    """One text, until a tie within the rounding is broken the other way."""
    for a, b in zip(ours, theirs, strict=True):
        for x, y, p, q in zip(a["tokens"], b["tokens"], a["logprobs"], b["logprobs"], strict=True):
            assert abs(p - q) < BF16_WINDOWS
            if x != y:
                break


def test_windows_that_hold_everything_equal_auto(tiny_model):
    """Chunks, mixed batches, decodes and prefix hits through store, rotate and attend in a real engine."""
    batch = prompts(200, 30, 140)
    auto = run(tiny_model, "auto", batch, batch)["rounds"]
    ours = run(tiny_model, "hadamard-int2", batch, batch, kvcompress={**EVERYTHING, "kernels": "triton"})["rounds"]
    assert [out["cached"] for out in ours[1]] == [128, 0, 128]
    assert_same(ours[0], auto[0])
    assert_same(ours[1], auto[1])


@pytest.mark.parametrize("kernels,max_tokens", [("auto", 60), ("triton", 12)])
@pytest.mark.feature("n-gram speculative decoding", "works")
def test_rejected_drafts_leave_no_trace(tiny_model, kernels, max_tokens):
    """Their keys and values are written over before they are read, in pages and windows, across page boundaries."""
    pattern = prompts(7)[0]
    # Ends right before a page does: the first drafts lie on either side.
    batch = [pattern * 18, prompts(118)[0] + pattern, prompts(10)[0] * 3]
    settings = {**EVERYTHING, "kernels": kernels}
    plain = run(tiny_model, "hadamard-int2", batch, kvcompress=settings, max_tokens=max_tokens)
    drafted = run(
        tiny_model, "hadamard-int2", batch, kvcompress=settings, max_tokens=max_tokens, speculative_config=NGRAM
    )
    drafts = drafted["metrics"]["vllm:spec_decode_num_draft_tokens"]
    accepted = drafted["metrics"]["vllm:spec_decode_num_accepted_tokens"]
    assert drafts > accepted, "there must be something to take back"
    assert_same(drafted["rounds"][0], plain["rounds"][0])


@pytest.mark.parametrize("policy", ["epicache", pytest.param("h2o", marks=pytest.mark.long)])
def test_eviction_is_that_of_the_torch_path(policy, tmp_path):
    """Passes for queries, scores, compactions, steps without evicted pages, beside a request that keeps everything."""
    model = save_model(tmp_path / "model", layers=1, heads=3, kv_heads=1)
    batch = prompts(650, 30)
    asked = {"kvcompress_budget": 256, "kvcompress_policy": policy}
    if policy == "epicache":
        asked["kvcompress_guide"] = prompts(20)[0]
    extra = [asked, None]
    settings = {"sink_tokens": 16, "recent_tokens": 32, "episodic": {"budget": 512, "block_tokens": 128}}
    torch_path, kernels = (
        run(
            model,
            "turboquant-4",
            batch,
            kvcompress={**settings, "kernels": kernels},
            extra=extra,
            max_model_len=2 * MAX_LEN,
            max_num_batched_tokens=256,
            logprobs=512,  # of all tokens
            max_logprobs=512,
        )["rounds"][0]
        for kernels in ("torch", "triton")
    )
    for a, b in zip(kernels, torch_path, strict=True):
        ours, theirs = a["first"], b["first"]
        assert len(ours) == 512
        divergence = sum(math.exp(theirs[token]) * (theirs[token] - ours[token]) for token in theirs)
        assert divergence < SAME_TOKENS
