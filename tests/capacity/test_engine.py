# SPDX-License-Identifier: Apache-2.0
"""Real engines on a tiny model report the blocks, tokens and requests of the plan, to the last digit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vllm_kvcompress.capacity.plan import configure, default_block_size, plan

MEMORY = 10_000_019
"""Bytes; a multiple of no page."""
NO_WINDOWS = {"kvcompress": {"sink_tokens": 0, "recent_tokens": 0}}
FORMATS = [("auto", (0, 0)), ("hadamard-int2", (64, 256)), ("hadamard-int2", (0, 0))]
# 1000 tokens fill no last block, neither of 128 nor of 16.
CASES = [(name, windows, length) for name, windows in FORMATS for length in (2048, 1000)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128,
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        dtype="bfloat16",
    )
    folder = tmp_path_factory.mktemp("tiny-llama")
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def test_what_engines_report(model):
    arguments = [
        {
            "model": str(model),
            "kv_cache_dtype": name,
            "kv_cache_memory_bytes": MEMORY,
            "max_model_len": length,
            "additional_config": {} if any(windows) else NO_WINDOWS,
        }
        for name, windows, length in CASES
    ]
    script = Path(__file__).with_name("engine_figures.py")
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(arguments)], capture_output=True, text=True, timeout=900
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("REPORT ")]
    assert lines, done.stdout[-3000:] + done.stderr[-3000:]
    reported = json.loads(lines[0].removeprefix("REPORT "))
    config = configure(str(model), model)
    device = "gpu" if torch.cuda.is_available() else "cpu"
    for (name, windows, length), (blocks, tokens, requests) in zip(CASES, reported, strict=True):
        block_size = default_block_size(name, device)
        planned = plan(config, name, MEMORY, max_model_len=length, block_size=block_size, windows=windows)
        assert (planned.blocks, planned.tokens, planned.requests) == (blocks, tokens, requests), (name, windows, length)
        assert planned.longest == 2048
