# SPDX-License-Identifier: Apache-2.0
"""What the log says at start, of configurations as `vllm serve` makes them; no engine is started."""

import pytest

from vllm_kvcompress import checks, compat, plugin
from vllm_kvcompress.operations import facts
from vllm_kvcompress.operations.facts import find_facts, is_observed, start_line

EPISODIC = {"episodic": {"budget": 512, "block_tokens": 256}}


@pytest.fixture(scope="module")
def configure(tmp_path_factory):
    """An engine's configuration: a model of head size 64 whose weights nobody reads."""
    from transformers import LlamaConfig
    from vllm.engine.arg_utils import EngineArgs

    plugin.register()
    folder = tmp_path_factory.mktemp("model")
    shape = {"hidden_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2, "max_position_embeddings": 4096}
    LlamaConfig(**shape, vocab_size=128, architectures=["LlamaForCausalLM"]).save_pretrained(folder)

    def configure(cache_dtype, settings=None, **arguments):
        given = {"kvcompress": settings} if settings else {}
        return EngineArgs(
            model=str(folder),
            kv_cache_dtype=cache_dtype,
            skip_tokenizer_init=True,
            additional_config=given,
            **{"dtype": "bfloat16", **arguments},
        ).create_engine_config()

    return configure


def test_pages(configure):
    config = configure("hadamard-int2", {"sink_tokens": 32, "recent_tokens": 96})
    assert is_observed(config)
    assert start_line(config, 12345, 3.014) == (
        "KV cache format hadamard-int2: 41 bytes per token, layer and KV head (16-bit: 256, 6.2x), 12,345 tokens fit "
        "(3.01 requests of 4,096), keys centred: page, 16-bit windows: first 32 and last 96 tokens, rotation file: "
        "none needed, attention kernels: torch (this engine runs on the CPU)"
    )


def test_pages_on_a_gpu(configure, monkeypatch):
    config = configure("hadamard-int2", EPISODIC)
    monkeypatch.setattr(checks, "kernel_path", lambda config: ("gpu", "kernels=auto"))
    monkeypatch.setattr(compat, "device_capability", lambda: (8, 9))
    assert find_facts(config).kernels == "triton"
    monkeypatch.setattr(facts, "expected_decode", lambda *asked: "cuda")
    line = start_line(config, 1, 1.0)
    assert line.endswith("eviction: budget 512 tokens (epicache-keydiff), attention kernels: cuda (kernels=auto)")


@pytest.mark.parametrize("dtype,number,ratio", [("float32", 512, "0.5"), ("bfloat16", 256, "1.0")])
def test_eviction_alone(configure, monkeypatch, dtype, number, ratio):
    monkeypatch.setattr(compat, "cpu_cache_is_plain", lambda config: True)
    config = configure("auto", EPISODIC, dtype=dtype)
    assert is_observed(config) and find_facts(config).kernels == "vllm"
    line = start_line(config, 1, 1.0)
    assert line.startswith(f"KV cache format auto: {number} bytes per token, layer and KV head (16-bit: 256, {ratio}x)")
    assert "rotation" not in line and "windows" not in line


def test_other_engines_are_left_alone(configure):
    config = configure("auto")
    assert not is_observed(config)
    assert plugin._observe(type("Scheduler", (), {"vllm_config": config})) is None
