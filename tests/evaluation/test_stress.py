# SPDX-License-Identifier: Apache-2.0
"""`--stress`: the copy computes the same function, its keys have outliers, and what it cannot do is refused."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    CohereConfig,
    DeepseekV3Config,
    Gemma3TextConfig,
    LlamaConfig,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    T5Config,
)

from vllm_kvcompress.cli import main
from vllm_kvcompress.errors import KVCompressError, UnsupportedModelError
from vllm_kvcompress.evaluation import launch, stress
from vllm_kvcompress.evaluation.engine import Summary
from vllm_kvcompress.evaluation.launch import Recorded
from vllm_kvcompress.evaluation.metrics import Estimate, TextFigures
from vllm_kvcompress.evaluation.report import Row
from vllm_kvcompress.evaluation.specs import FormatSpec, parse_formats
from vllm_kvcompress.rotations import ROTATION_BESIDE_MODEL, model_fingerprint, read_rotation

HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 4, 2, 64, 128
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 96,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Phi3 takes its head size from the hidden size.
PHI3 = {**SIZES, "hidden_size": HEADS * HEAD_DIM, "original_max_position_embeddings": 256}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "llama with biases": LlamaConfig(**SIZES, attention_bias=True),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
    "phi3": Phi3Config(**PHI3),
    "phi3, half rotary": Phi3Config(**PHI3, partial_rotary_factor=0.5),
    "cohere, interleaved pairs": CohereConfig(**SIZES),
}


def build(folder, config, **saving):
    """A random float32 model whose attention is far from uniform, biases and norms included."""
    torch.manual_seed(torch.seed() % 2**31)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "_norm.weight")):
                parameter.copy_(torch.randn_like(parameter))
            elif any(part in name for part in ("q_proj", "k_proj", "qkv_proj")):
                parameter.mul_(8)
    model.save_pretrained(folder, **saving)
    return model


def plan(folder, factor=16.0, seed=0):
    return stress.plan_stress(str(folder), factor, seed=seed, config=AutoConfig.from_pretrained(folder))


def keys_and_logits(folder):
    """Keys as cached, [layers, KV heads, T, D], and logits, [T, V]."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = torch.arange(3, 67)[None] * 7 % VOCABULARY
    with torch.inference_mode():
        result = model(tokens, use_cache=True)
    return torch.stack([layer.keys[0] for layer in result.past_key_values.layers]), result.logits[0]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_power_of_two_changes_keys_and_nothing_else(tmp_path, name):
    build(tmp_path / "plain", CONFIGS[name])
    plan(tmp_path / "plain").write(tmp_path / "stressed")
    keys, logits = keys_and_logits(tmp_path / "plain")
    stressed_keys, stressed_logits = keys_and_logits(tmp_path / "stressed")
    # Every product of a score is that of the plain model bit for bit: (16 k) (q / 16).
    assert torch.equal(stressed_logits, logits)
    gains = (stressed_keys / keys).unique(dim=2)
    assert gains.shape[2] == 1, "the same in all tokens: RoPE commutes with the scaling"
    gains = gains[:, :, 0]
    assert set(gains.unique().tolist()) == {1.0, 16.0}
    assert ((gains == 16).sum(-1) == 2 * stress.PAIRS_PER_HEAD).all()


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "phi3"])
def test_other_factors_round(tmp_path, name):
    build(tmp_path / "plain", CONFIGS[name])
    plan(tmp_path / "plain", 10.0).write(tmp_path / "stressed")
    _, logits = keys_and_logits(tmp_path / "plain")
    _, stressed = keys_and_logits(tmp_path / "stressed")
    # Weights rounded once at 2^-24 move a score, whose terms sum to some hundreds in size, by some 1e-5, and a logit by
    # about that share of its own size.
    assert (stressed - logits).abs().max() < 1e-3 * logits.abs().max()
    assert not torch.equal(stressed, logits)


def test_the_logits_tell_a_wrong_transform(tmp_path):
    """Scaling one channel of each pair alone, which RoPE does not commute with."""
    build(tmp_path / "plain", CONFIGS["llama"])
    wrong = plan(tmp_path / "plain")
    for gain in wrong.gains.values():
        gain.view(-1, HEAD_DIM)[:, HEAD_DIM // 2 :] = 1
    wrong.write(tmp_path / "wrong")
    _, logits = keys_and_logits(tmp_path / "plain")
    _, other = keys_and_logits(tmp_path / "wrong")
    assert (other - logits).abs().max() > 1e-2 * logits.abs().max()


def test_pairs_are_those_of_rope():
    half = torch.arange(HEAD_DIM // 2)
    assert torch.equal(stress.rope_pairs(CONFIGS["llama"], "m"), torch.stack([half, half + HEAD_DIM // 2], 1))
    quarter = torch.arange(HEAD_DIM // 4)
    expected = torch.stack([quarter, quarter + HEAD_DIM // 4], 1)
    assert torch.equal(stress.rope_pairs(CONFIGS["phi3, half rotary"], "m"), expected)
    interleaved = stress.rope_pairs(CONFIGS["cohere, interleaved pairs"], "m")
    assert torch.equal(interleaved, torch.arange(HEAD_DIM).view(-1, 2))


@pytest.mark.parametrize(("family", "name"), [("llama", "llama"), ("phi3", "phi3, half rotary")])
def test_pairs_commute_with_rope(family, name):
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    rotary = getattr(module, f"{family.capitalize()}RotaryEmbedding")(CONFIGS[name])
    keys = torch.randn(1, KV_HEADS, 50, HEAD_DIM)
    cos, sin = rotary(keys, torch.arange(50)[None])

    def rope(states):
        return module.apply_rotary_pos_emb(states, states, cos, sin)[1]

    for pair in stress.rope_pairs(CONFIGS[name], "m"):
        gain = torch.ones(HEAD_DIM)
        gain[pair] = 8
        assert torch.equal(rope(keys * gain), rope(keys) * gain)
        gain[pair[0]] = 1
        assert not torch.allclose(rope(keys * gain), rope(keys) * gain)


def chosen(planned):
    """Channels by layer and KV head."""
    return [
        sorted(np.flatnonzero(gain.view(KV_HEADS, HEAD_DIM)[head] > 1).tolist())
        for name, gain in sorted(planned.gains.items())
        if name.endswith("k_proj.weight")
        for head in range(KV_HEADS)
    ]


def test_the_choice(tmp_path):
    """Slow pairs, other ones in each head, the same for the same seed; queries go with the KV head of their group."""
    build(tmp_path / "plain", CONFIGS["llama with biases"])
    planned = plan(tmp_path / "plain")
    heads = chosen(planned)
    assert chosen(plan(tmp_path / "plain")) == heads
    assert chosen(plan(tmp_path / "plain", seed=1)) != heads
    assert len(set(map(tuple, heads))) > 1
    for low, high, *partners in heads:
        assert partners == [low + HEAD_DIM // 2, high + HEAD_DIM // 2]
        assert HEAD_DIM // 4 <= low < high < HEAD_DIM // 2
    for layer in range(2):
        for kind in ("weight", "bias"):
            key = planned.gains[f"model.layers.{layer}.self_attn.k_proj.{kind}"].view(KV_HEADS, 1, HEAD_DIM)
            query = planned.gains[f"model.layers.{layer}.self_attn.q_proj.{kind}"].view(KV_HEADS, -1, HEAD_DIM)
            assert torch.equal(query * key, torch.ones_like(query))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_shards_and_other_files(tmp_path, dtype):
    plain, stressed = tmp_path / "plain", tmp_path / "stressed"
    build(plain, CONFIGS["qwen2"]).to(dtype).save_pretrained(plain, max_shard_size="40KB")
    (plain / "tokenizer.json").write_text("{}")
    (plain / "kvcompress").mkdir()
    (plain / "kvcompress" / "rotation.safetensors").write_text("of the plain model")
    for spare in ("consolidated.safetensors", "pytorch_model.bin", "model.safetensors"):
        (plain / spare).write_text("other weights")
    before = {path: path.stat().st_mtime_ns for path in plain.iterdir()}
    planned = plan(plain)
    planned.write(stressed)
    assert before == {path: path.stat().st_mtime_ns for path in plain.iterdir()}
    shards = set(json.loads((plain / "model.safetensors.index.json").read_text())["weight_map"].values())
    assert len(shards) > 3
    others = {"config.json", "generation_config.json", "tokenizer.json", "model.safetensors.index.json"}
    assert {path.name for path in stressed.iterdir()} == shards | others
    linked = {path.name for path in stressed.iterdir() if path.is_symlink()}
    assert others < linked, "shards without projections of queries and keys are not copied"
    for shard in shards:
        tensors = load_file(stressed / shard)
        for name, tensor in load_file(plain / shard).items():
            gain = planned.gains.get(name, torch.ones(len(tensor)))
            expected = tensor.double() * gain.view(-1, *[1] * (tensor.ndim - 1))
            assert tensors[name].dtype == tensor.dtype == dtype
            assert torch.equal(tensors[name].double(), expected)
            assert (shard in linked) <= (name not in planned.gains)
    assert model_fingerprint(stressed) != model_fingerprint(plain)


def test_the_fingerprint_differs_whatever_it_samples(tmp_path):
    build(tmp_path / "plain", CONFIGS["llama"])
    plan(tmp_path / "plain", 1.0).write(tmp_path / "same")
    assert model_fingerprint(tmp_path / "same") != model_fingerprint(tmp_path / "plain")


def test_a_factor_out_of_range(tmp_path):
    build(tmp_path / "plain", CONFIGS["llama"]).half().save_pretrained(tmp_path / "plain")
    with pytest.raises(KVCompressError, match=r"k_proj.weight out of the range of torch.float16"):
        plan(tmp_path / "plain", 1e7).write(tmp_path / "stressed")


def test_a_full_disk(tmp_path, monkeypatch):
    build(tmp_path / "plain", CONFIGS["llama"])
    usage = stress.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(stress.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(KVCompressError, match="set TMPDIR to a larger disk"):
        plan(tmp_path / "plain").write(tmp_path / "stressed")


DEEPSEEK = {"q_lora_rank": 32, "kv_lora_rank": 32, "n_routed_experts": 2, "first_k_dense_replace": 2}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Gemma3TextConfig(**SIZES), "is of no form known here"),
        (DeepseekV3Config(**SIZES, **DEEPSEEK), "multi-head latent attention"),
        (OPTConfig(vocab_size=VOCABULARY, hidden_size=96, num_hidden_layers=2, num_attention_heads=4), "has no RoPE"),
        (T5Config(), "encoder-decoder"),
        (LlamaConfig(**SIZES, quantization_config={"quant_method": "fp8"}), "is quantised"),
        (LlamaConfig(**SIZES, clip_qkv=8.0), "clips its keys"),
        (CohereConfig(**SIZES, use_qk_norm=True), "has k_norm.weight, q_norm.weight, which may undo"),
        (LlamaConfig(**{**SIZES, "num_hidden_layers": 3}), "self_attn in 2 of its 3 layers"),
        (LlamaConfig(**{**SIZES, "num_attention_heads": 8}), "has 256 rows; 8 query heads on 2 KV heads of size 64"),
    ],
)
def test_models_refused(tmp_path, config, message):
    """Before any weight is read. The weights are Llama's, with norms where the configuration says so."""
    build(tmp_path, CONFIGS["llama"])
    tensors = load_file(tmp_path / "model.safetensors")
    if getattr(config, "use_qk_norm", False):
        tensors |= {f"model.layers.1.self_attn.{norm}_norm.weight": torch.ones(HEAD_DIM) for norm in "qk"}
        save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UnsupportedModelError, match=message):
        stress.plan_stress(str(tmp_path), 16.0, seed=0, config=config)


def test_weights_refused(tmp_path):
    build(tmp_path, CONFIGS["llama"])
    weights = tmp_path / "model.safetensors"
    tensors = load_file(weights)
    name = "model.layers.0.self_attn.k_proj.weight"
    save_file(tensors | {name: tensors[name].to(torch.float8_e4m3fn)}, weights)
    with pytest.raises(UnsupportedModelError, match=r"k_proj.weight of .* is quantised \(F8_E4M3\)"):
        plan(tmp_path)
    del tensors[name]
    save_file(tensors, weights)
    with pytest.raises(UnsupportedModelError, match=r"layer 0 of .* has neither q_proj and k_proj nor qkv_proj"):
        plan(tmp_path)
    weights.rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(KVCompressError, match=r"needs the safetensors weights of .*model.safetensors is missing"):
        plan(tmp_path)


@pytest.mark.parametrize(("text", "factor"), [("outliers=16", 16), ("outliers=1", 1), ("outliers=2.5", 2.5)])
def test_parsing(text, factor):
    assert stress.parse_stress(text) == factor


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("noise=3", "unknown stress 'noise'; known: outliers=FACTOR"),
        ("", "unknown stress ''"),
        ("outliers", "the factor must be a number of at least 1"),
        ("outliers=", "the factor must be"),
        ("outliers=0.5", "the factor must be"),
        ("outliers=nan", "the factor must be"),
        ("outliers=inf", "the factor must be"),
        ("outliers=16x", "the factor must be"),
    ],
)
def test_parsing_refuses(text, message):
    with pytest.raises(KVCompressError, match=message):
        stress.parse_stress(text)


def test_specs():
    """Windows of the plain model's recipe, which the copy's folder would not match."""
    specs = parse_formats("fp8,int2:recent_tokens=64", additional_config={"other": 1})
    plain, auto, fp8, int2 = stress.stressed_specs(specs, "Qwen/Qwen3-8B")
    assert (plain.label, plain.kv_cache_dtype) == ("auto (plain model)", "auto")
    assert [auto, fp8] == specs[:2]
    assert int2.label == "int2:recent_tokens=64"
    assert int2.additional_config == {"other": 1, "kvcompress": {"sink_tokens": 128, "recent_tokens": 64}}
    assert not stress.needs_calibration([plain, auto, fp8, int2])
    assert stress.needs_calibration(parse_formats("int2,oscar-int2"))


@pytest.mark.parametrize(
    ("formats", "rotation"), [("int2", "a.safetensors"), ("oscar-int2:rotation=a.safetensors", None)]
)
def test_a_rotation_file_is_refused(formats, rotation):
    with pytest.raises(KVCompressError, match=r"rotation file a.safetensors: it belongs to the plain model"):
        stress.stressed_specs(parse_formats(formats), "model", rotation)


def row(label, perplexity, kl, error=None):
    one = Estimate(1, 1, 1)
    text = TextFigures(100, Estimate(perplexity, 1, 1), one, Estimate(kl, 0, 1), one)
    return Row(FormatSpec(label, "auto"), 1024, None if error else text, error=error)


def test_the_function_is_checked():
    plain = [row("plain", 17.5, 0)]
    sentence = stress.check_preserved(plain, [row("auto", 17.5001, 2e-6)])
    assert "perplexity 17.5001 against 17.5000, KL 2.0e-06 at context 1024" in sentence
    for kl in (0.3, float("nan")):
        with pytest.raises(KVCompressError, match="--stress does not fit this model"):
            stress.check_preserved(plain, [row("auto", 17.5, kl)])
    with pytest.raises(KVCompressError, match="auto failed on the stressed model: it broke"):
        stress.check_preserved(plain, [row("auto", 0, 0, "it broke")])


SUMMARY = Summary(
    start_seconds=1,
    feed_seconds=1,
    largest_step=64,
    versions={},
    device="cpu",
    dtype="bfloat16",
    kv_cache_blocks=1,
    block_size=64,
)


def write_text(folder):
    rng = np.random.default_rng(6)
    data = folder / "text.txt"
    data.write_text("\n".join(" ".join(f"w{word}" for word in rng.integers(0, 300, 12)) for _ in range(300)))
    return data


def evaluate(folder, model, *arguments):
    base = ["eval", str(model), "--data", str(write_text(folder)), "--sinks", "16", "--recent", "64"]
    sizes = ["--context", "256", "--chunks", "2", "--recall-depths", "0"]
    return main([*base, *sizes, "--out", str(folder / "out"), *arguments])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stress", "noise=3"], "unknown stress 'noise'"),
        (["--stress", "outliers=16", "--rotation", "a.safetensors"], "belongs to the plain model"),
        (["--stress", "outliers=16", "--skip-fraction", "0"], "raise it above 0"),
    ],
)
def test_the_command_refuses(tmp_path, tiny_model, capsys, arguments, message):
    assert evaluate(tmp_path, tiny_model, *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_runs(tmp_path, tiny_model, capsys, monkeypatch):
    """The reference on the plain model, all others on a copy that has a rotation file of its own beside it."""
    models = []

    def run_engines(tasks, prompts, *, at_once):
        for number, task in enumerate(tasks):
            models.append((task.label, task.job.engine_args["model"]))
            if number == 1:
                copy = Path(task.job.engine_args["model"])
                assert read_rotation(copy / ROTATION_BESIDE_MODEL).metadata.fingerprint == model_fingerprint(copy)
                assert model_fingerprint(copy) != model_fingerprint(tiny_model)
            zeros = [np.zeros(prompt.stop - prompt.start) for prompt in prompts]
            # A format that is far off ends nothing; `auto` on the copy would.
            kl = [values + (number == 2) for values in zeros]
            yield Recorded(SUMMARY, zeros, zeros, kl if number else None, zeros if number else None)

    monkeypatch.setattr(launch, "run_engines", run_engines)
    assert evaluate(tmp_path, tiny_model, "--stress", "outliers=16", "--formats", "oscar-int2") == 0
    assert [label for label, _ in models] == ["auto (plain model)", "auto", "oscar-int2"]
    plain, auto, oscar = (model for _, model in models)
    assert plain == str(tiny_model)
    assert auto == oscar != plain
    assert not Path(auto).exists()
    assert not (tiny_model / "kvcompress").exists()
    printed = capsys.readouterr().out
    assert printed.startswith("Stressed model: outliers=16\n")
    assert "Note: Rotation file made on the stressed model, on the first 60% of --data." in printed
    report = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert report["settings"]["stress"] == "outliers=16"
    assert report["formats"][2]["additional_config"] == {"kvcompress": {"sink_tokens": 16, "recent_tokens": 64}}


def test_a_failed_calibration(tmp_path):
    (tmp_path / "stressed").mkdir()
    with pytest.raises(KVCompressError, match="calibration of the stressed model failed with status 2"):
        stress.calibrate(tmp_path / "stressed", "text")


def test_real_engines_see_the_same_function(tmp_path, tiny_model, capsys):
    assert evaluate(tmp_path, tiny_model, "--stress", "outliers=16", "--formats", "auto") == 0
    assert "Note: auto on the stressed model computes what it does on the plain one" in capsys.readouterr().out
    plain, auto = json.loads((tmp_path / "out" / "eval.json").read_text())["formats"]
    # bf16 scales by 16 exactly.
    assert auto["text"]["perplexity"] == plain["text"]["perplexity"]
    assert auto["text"]["kl"]["value"] < 1e-6
