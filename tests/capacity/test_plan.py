# SPDX-License-Identifier: Apache-2.0
"""Plans without an engine: figures recorded on a GPU, tensor parallelism, the longest request, refusals."""

from dataclasses import replace

import pytest

from vllm_kvcompress import compat
from vllm_kvcompress.capacity.geometry import head_bytes_per_token, read_geometry
from vllm_kvcompress.capacity.plan import FORMATS, _layer_specs, configure, default_block_size, plan
from vllm_kvcompress.errors import KVCompressError, UnsupportedModelError
from vllm_kvcompress.formats import is_ours

from .conftest import save_config

WINDOWS = (64, 256)


@pytest.fixture(scope="module")
def config(llama):
    return configure("llama", llama)


def on_gpu(config, name, memory, length, windows=WINDOWS):
    return plan(config, name, memory, max_model_len=length, block_size=default_block_size(name, "gpu"), windows=windows)


def test_what_a_gpu_reported(config):
    """vLLM 0.33 on an H100 (benchmarks/results/benchmark_engine.json): Llama-3.1-8B's shape, 4 layers."""
    memory, length = 17785946112, 33920
    auto, fp8, ours = (on_gpu(config, name, memory, length) for name in ("auto", "fp8", "oscar-int2"))
    assert (auto.block_size, auto.blocks, auto.tokens, auto.requests) == (16, 67848, 1085568, 32.00377358490566)
    assert (fp8.block_size, fp8.blocks, fp8.tokens, fp8.requests) == (16, 135696, 2171136, 64.00754716981132)
    # Its windows were larger then; blocks do not depend on them.
    assert (ours.block_size, ours.blocks) == (128, 58679)
    assert on_gpu(config, "auto", memory, 131072).requests == 8.2822265625
    assert on_gpu(config, "fp8", memory, 32768).requests == 66.2578125


def test_bytes_per_token(config, llama):
    """The same as from the Hugging Face configuration alone; fp8 is half of auto."""
    geometry = read_geometry(llama)
    found = {name: on_gpu(config, name, 1 << 30, 8192).bytes_per_token for name in FORMATS}
    assert found["fp8"] * 2 == found["auto"]
    for name in FORMATS:
        if name != "fp8":
            assert found[name] == head_bytes_per_token(name, geometry.head_dim) * geometry.heads


def test_float32(llama):
    """The 16-bit windows stay at 16 bits, the pages too small to notice."""
    config = configure("llama", llama, dtype="float32")
    assert on_gpu(config, "auto", 1 << 30, 8192).bytes_per_token == 2 * 4 * 128 * 8 * 4
    assert on_gpu(config, "int2", 1 << 30, 8192) == on_gpu(configure("llama", llama), "int2", 1 << 30, 8192)


@pytest.mark.parametrize("gpus,heads", [(2, 4), (8, 1), (16, 1)])
def test_tensor_parallel(llama, config, gpus, heads):
    """KV heads are split, and where there are more GPUs than heads, repeated: so is the capacity of a GPU's memory."""
    split = configure("llama", llama, tensor_parallel=gpus)
    for name in ("auto", "hadamard-int2"):
        one = on_gpu(config, name, 8 << 30, 8192)
        found = on_gpu(split, name, (8 << 30) * heads // 8, 8192)
        assert found.bytes_per_token * 8 == one.bytes_per_token * heads
        # Blocks of the windows are rounded to the pages' bytes, which scale with the heads.
        assert (found.blocks, found.tokens, found.requests) == (one.blocks, one.tokens, one.requests)


@pytest.mark.parametrize("name", ["auto", "hadamard-int2", "int2"])
@pytest.mark.parametrize("windows", [WINDOWS, (0, 0), (0, 100), (1000, 0)])
@pytest.mark.parametrize("blocks", [3, 41, 42, 500])
def test_longest_request(config, name, windows, blocks):
    """One token more needs more blocks than there are besides the null block."""
    block_size = default_block_size(name, "gpu")
    memory = blocks * block_size * on_gpu(config, name, 1 << 30, 8192).bytes_per_token

    def blocks_needed(length):
        found = on_gpu(config, name, memory, length, windows)
        assert found.blocks == blocks
        return round(blocks / found.requests)

    longest = on_gpu(config, name, memory, 8192, windows).longest
    assert blocks_needed(longest) <= blocks - 1 < blocks_needed(longest + 1)


def test_windows(config):
    """They cost the less the longer requests are, and nothing that a window does not hold."""
    with_windows, without = (
        [on_gpu(config, "int2", 8 << 30, length, windows).requests for length in (1024, 65536)]
        for windows in (WINDOWS, (0, 0))
    )
    shares = [ours / all_ for ours, all_ in zip(with_windows, without, strict=True)]
    assert shares[0] < shares[1] < 1
    assert on_gpu(config, "auto", 8 << 30, 1024) == on_gpu(config, "auto", 8 << 30, 1024, (0, 0))
    assert config.model_config.max_model_len == 131072 and config.cache_config.cache_dtype == "auto"


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("windows", [WINDOWS, (0, 0)])
def test_budgets_by_layer_take_no_memory(tmp_path, classes, windows):
    """Classes of equally many layers: each a group beside its windows, in blocks of a class instead of all layers.

    So there are as many times more blocks, and a rest of memory that held no block of all layers may hold some.
    """
    config = configure("llama", save_config(tmp_path, num_hidden_layers=6))
    memory, length = 1 << 30, 8192
    uniform = on_gpu(config, "int2", memory, length, windows)
    config.cache_config.cache_dtype, config.cache_config.block_size = "int2", 128
    _, specs = _layer_specs(config, windows)
    class_of = {index: index % classes for index in range(6)}
    specs = {name: replace(spec, budget_share=0.5 + class_of[int(name[7])]) for name, spec in specs.items()}
    found, _ = compat.fit_kv_cache(config, specs, memory)
    members = [{int(name[7]) for name in group.layer_names} for group in found.kv_cache_groups]
    expected = [{index for index in class_of if class_of[index] == number} for number in range(classes)]
    assert sorted(map(sorted, members)) == sorted(map(sorted, expected * (2 if any(windows) else 1)))
    assert classes * uniform.blocks <= found.num_blocks < classes * (uniform.blocks + 1)
    config.model_config.max_model_len = length
    tokens, requests = compat.kv_cache_capacity(config, found)
    assert uniform.requests <= requests < uniform.requests * (1 + 1 / uniform.blocks)
    assert uniform.tokens <= tokens


@pytest.mark.parametrize("name", FORMATS)
def test_no_memory(config, name):
    """One block is the null block: nothing fits."""
    found = on_gpu(config, name, 1000, 8192)
    assert "not enough" in found.problem and found.tokens == found.longest == found.requests == 0


def test_head_size(tmp_path):
    """What our formats cannot hold, the others still can."""
    config = configure("m", save_config(tmp_path, head_dim=80))
    for name in FORMATS:
        found = on_gpu(config, name, 1 << 30, 8192)
        assert ("80" in found.problem) == is_ours(name) == (found.tokens == 0)


MLA = {
    "config_class": "DeepseekV2Config",
    "architecture": "DeepseekV2ForCausalLM",
    "num_key_value_heads": 32,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
}
SLIDING = {"config_class": "MistralConfig", "architecture": "MistralForCausalLM", "sliding_window": 4096}
HYBRID = {"config_class": "MambaConfig", "architecture": "MambaForCausalLM"}


@pytest.mark.parametrize("changes,reason", [(MLA, "MLA"), (SLIDING, "sliding window"), (HYBRID, "attention")])
def test_refused_models(tmp_path, changes, reason):
    with pytest.raises(UnsupportedModelError, match=f"the-model cannot be planned: .*{reason}"):
        configure("the-model", save_config(tmp_path, **changes))


@pytest.mark.parametrize("gpus,reason", [(3, "divisible"), (64, "divisible")])
def test_refused_by_vllm(llama, gpus, reason):
    with pytest.raises(KVCompressError, match=rf"the-model.*{reason}.*\({gpus}\)"):
        configure("the-model", llama, tensor_parallel=gpus)


def test_heads_that_cannot_be_split(tmp_path):
    folder = save_config(tmp_path, hidden_size=3072, num_attention_heads=24, num_key_value_heads=6)
    with pytest.raises(KVCompressError, match=r"--tp 4 .* 6 KV heads"):
        configure("the-model", folder, tensor_parallel=4)


@pytest.mark.parametrize(
    "config", ["{", '{"model_type": "llama", "num_hidden_layers": "x"}', '{"model_type": "no-such"}']
)
def test_bad_configurations(tmp_path, config):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(KVCompressError, match="the-model: "):
        configure("the-model", tmp_path)


def test_bad_dtype(llama):
    with pytest.raises(KVCompressError, match=r"the-model.*float13"):
        configure("the-model", llama, dtype="float13")
