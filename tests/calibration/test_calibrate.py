# SPDX-License-Identifier: Apache-2.0
"""The whole calibration on tiny random models, as functions and as the command."""

import json
import shutil
from dataclasses import fields

import pytest
import torch
from transformers import BertConfig, DeepseekV3Config, LlamaConfig, MistralConfig, T5Config

from vllm_kvcompress.calibration import sensitivity
from vllm_kvcompress.calibration.model import check_config, load
from vllm_kvcompress.calibration.pipeline import calibrate
from vllm_kvcompress.cli import main
from vllm_kvcompress.errors import KVCompressError, RotationError, UnsupportedModelError
from vllm_kvcompress.rotations import check_fits, model_fingerprint, read_rotation

CPU = torch.device("cpu")


def run(folder, sequences, name="tiny"):
    model, _ = load(folder, name, CPU)
    return calibrate(model, sequences, name=name, fingerprint="f" * 32, data="random", seed=0)


@pytest.mark.parametrize(
    ("name", "heads", "layers"),
    [("llama", (2, 6), [0, 1, 2]), ("qwen2", (2, 4), [0, 1, 2]), ("gemma3", (1, 4), [1, 2])],
)
def test_rotation_set(model_folders, sequences, name, heads, layers):
    """Of the layers whose cache grows: Gemma's first has a sliding window."""
    result = run(model_folders[name], sequences)
    metadata = result.rotation.metadata
    assert metadata.layer_ids == layers
    assert (metadata.num_kv_heads, metadata.num_query_heads, metadata.head_dim) == (*heads, 64)
    assert metadata.tokens == 4 * 160 and metadata.source == "calibrate"
    assert len(metadata.sensitivity) == len(layers)
    for layer in result.rotation.layers.values():
        for rotation in (layer.k_rotation, layer.v_rotation):
            wide = rotation.double()
            # float32 storage of orthonormal columns, see test_statistics.
            assert (wide.mT @ wide - torch.eye(64, dtype=torch.float64)).abs().max() <= 1e-6
        assert all(((clip > 0) & (clip <= 1)).all() for clip in (layer.k_clip, layer.v_clip))


def test_mean_keys_of_a_model_with_key_biases(model_folders, sequences):
    """Where RoPE barely turns (the last of the first half of the channels), the mean key is the bias."""
    model, _ = load(model_folders["qwen2"], "qwen2", CPU)
    found = run(model_folders["qwen2"], sequences).rotation.layers[0].k_mean
    bias = model.base_model.layers[0].self_attn.k_proj.bias.detach().unflatten(0, (2, 64))
    # Channel 31 turns by theta^(-31/32) < 2e-4 a token, 0.03 over 160 tokens; keys scatter by about |w x| / sqrt(480).
    assert (found[:, 31] - bias[:, 31]).abs().max() <= 1.0
    assert found.norm() > 0.3 * bias.norm()


def test_the_same_seed_gives_the_same_rotations(model_folders, sequences):
    first, second = (run(model_folders["llama"], sequences).rotation for _ in range(2))
    assert first.metadata == second.metadata
    for layer_id, layer in first.layers.items():
        for field in fields(layer):
            assert torch.equal(getattr(layer, field.name), getattr(second.layers[layer_id], field.name))


def test_one_sequence_serves_both_passes(model_folders, sequences):
    assert run(model_folders["llama"], sequences[:1]).rotation.metadata.recipe["held_back_sequences"] == 0


def test_memory_does_not_grow_with_the_text(model_folders, sequences):
    def size(count: int) -> int:
        moments = run(model_folders["llama"], sequences[:1] * count).moments
        return sum(getattr(m, f.name).nbytes for m in moments.layers.values() for f in fields(m) if f.name != "tokens")

    assert size(2) == size(8)


def test_sensitivity_is_zero_where_nothing_is_hidden(model_folders, sequences, monkeypatch):
    model, _ = load(model_folders["llama"], "llama", CPU)
    found = sensitivity.measure(model, sequences)
    assert found[0] == pytest.approx(0, abs=1e-6)  # the first layer's keys depend on their token alone
    assert all(0 <= value <= 2 for value in list(found.values())[1:]) and found[2] > 1e-4
    monkeypatch.setattr(
        sensitivity, "block_mask", lambda length, *_, **__: torch.ones(length, length, dtype=torch.bool)
    )
    # Full attention twice, by two routines: cosines differ from 1 by float32 rounding.
    assert max(abs(value) for value in sensitivity.measure(model, sequences).values()) <= 1e-4


def test_sensitivity_is_the_mean_over_tokens(model_folders, sequences):
    """Past the first two blocks, of an eighth of the sequence each."""
    model, _ = load(model_folders["llama"], "llama", CPU)
    long, short = sequences[0], sequences[1][:87]
    counts = [len(ids) - 2 * (len(ids) // 8) for ids in (long, short)]
    apart = [sensitivity.measure(model, [ids]) for ids in (long, short)]
    for layer_id, found in sensitivity.measure(model, [long, short]).items():
        expected = sum(n * one[layer_id] for n, one in zip(counts, apart, strict=True)) / sum(counts)
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_sensitivity_reads_a_few_sequences_from_all_over(model_folders, sequences):
    model, _ = load(model_folders["llama"], "llama", CPU)
    many = [ids[:64] for ids in sequences for _ in range(3)]
    few = [many[index] for index in (0, 3, 6, 9)]
    assert sensitivity.measure(model, many) == sensitivity.measure(model, few)


def test_no_text(model_folders):
    with pytest.raises(KVCompressError, match="no text"):
        run(model_folders["llama"], [])


def test_values_that_are_not_finite(model_folders, sequences):
    model, _ = load(model_folders["llama"], "llama", CPU)
    model.base_model.layers[1].self_attn.q_proj.weight.data[:] = torch.nan
    with pytest.raises(KVCompressError, match=r"layer 1 .* not finite.*--dtype"):
        calibrate(model, sequences, name="tiny", fingerprint="", data="", seed=0)


def test_model_that_goes_around_the_interface(model_folders, sequences):
    model, _ = load(model_folders["llama"], "llama", CPU)
    model.set_attn_implementation("eager")
    with pytest.raises(UnsupportedModelError, match="AttentionInterface"):
        calibrate(model, sequences, name="tiny", fingerprint="", data="", seed=0)


def test_layers_of_different_shapes(model_folders, sequences):
    model, _ = load(model_folders["llama"], "llama", CPU)
    attention = model.base_model.layers[2].self_attn
    attention.k_proj = torch.nn.Linear(96, 3 * 64, bias=False)
    attention.v_proj = torch.nn.Linear(96, 3 * 64, bias=False)
    attention.num_key_value_groups = 2
    with pytest.raises(UnsupportedModelError, match="different shapes"):
        calibrate(model, sequences, name="tiny", fingerprint="", data="", seed=0)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (T5Config(), "encoder-decoder"),
        (DeepseekV3Config(), "multi-head latent attention"),
        (LlamaConfig(hidden_size=320, num_attention_heads=4), "heads of size 80"),
        (LlamaConfig(head_dim=32), "heads of size 32"),
        (MistralConfig(sliding_window=48), "sliding window of 48 tokens"),
    ],
)
def test_unsupported_configurations(config, words):
    with pytest.raises(UnsupportedModelError, match=words):
        check_config(config, "this model")


def test_encoder(tmp_path, tokenizer, sequences):
    from transformers import BertForMaskedLM

    config = BertConfig(
        vocab_size=256, hidden_size=128, num_attention_heads=2, num_hidden_layers=1, intermediate_size=64
    )
    BertForMaskedLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"not causal|encoder"):
        run(tmp_path, sequences, "bert")


@pytest.mark.parametrize("content", [None, "{", '{"model_type": "no-such-model"}'])
def test_unreadable_folder(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(KVCompressError, match="the configuration of tiny cannot be read"):
        load(tmp_path, "tiny", CPU)


def test_command(model_folders, tmp_path, capsys):
    folder = model_folders["qwen2"]
    before = model_fingerprint(folder)
    arguments = ["calibrate", str(folder), "--tokens", "256", "--seed", "5", "--device", "cpu"]
    assert main([*arguments, "--report", str(tmp_path / "report")]) == 0
    printed = capsys.readouterr().out
    path = folder / "kvcompress" / "rotation.safetensors"
    assert str(path) in printed
    assert f"vllm serve {folder} --kv-cache-dtype oscar-int2\n" in printed
    assert model_fingerprint(folder) == before
    rotation = read_rotation(path)
    assert rotation.metadata.seed == 5
    check_fits(rotation, fingerprint=before, layer_ids=range(3), num_kv_heads=2, head_dim=64, path=path)
    with pytest.raises(RotationError, match="other weights"):
        check_fits(
            rotation,
            fingerprint=model_fingerprint(model_folders["llama"]),
            layer_ids=range(3),
            num_kv_heads=2,
            head_dim=64,
            path=path,
        )

    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert [row["layer"] for row in report["layers"]] == [0, 1, 2]
    for row in report["layers"]:
        assert sum(row["query_spectrum"]) == pytest.approx(1)
        assert row["key_error"] <= row["key_error_unclipped"] * 2
    text = (tmp_path / "report" / "report.md").read_text()
    for name in ("spectra.png", "errors.png", "clips.png"):
        assert (tmp_path / "report" / name).read_bytes().startswith(b"\x89PNG")
        assert name in text

    assert main(["inspect", str(path)]) == 0
    assert before in capsys.readouterr().out

    data = tmp_path / "text.txt"
    data.write_text("some words to read. " * 200)
    out = tmp_path / "elsewhere" / "r.safetensors"
    assert main([*arguments, "--data", str(data), "--out", str(out)]) == 0
    assert f'"rotation": "{out}"' in capsys.readouterr().out
    assert read_rotation(out).metadata.data == "text.txt"


@pytest.mark.parametrize("place", ["beside the model", "user cache", "--out"])
def test_if_missing(place, model_folders, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("VLLM_KVCOMPRESS_CACHE", str(tmp_path / "cache"))
    folder = shutil.copytree(model_folders["llama"], tmp_path / "model")
    arguments = ["calibrate", str(folder), "--tokens", "64", "--device", "cpu", "--if-missing"]
    path = {
        "beside the model": folder / "kvcompress" / "rotation.safetensors",
        "user cache": tmp_path / "cache" / f"{model_fingerprint(folder)}.safetensors",
        "--out": tmp_path / "r.safetensors",
    }[place]
    if place == "--out":
        arguments += ["--out", str(path)]
        assert main(arguments) == 0 and read_rotation(path).metadata.seed == 0
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"not looked into")
    before = path.read_bytes()
    capsys.readouterr()
    assert main([*arguments, "--seed", "1"]) == 0
    assert capsys.readouterr().out == f"rotation: {path} is there already\n"
    assert path.read_bytes() == before


def test_if_missing_leaves_what_another_made_meanwhile(model_folders, tmp_path, capsys, monkeypatch):
    out = tmp_path / "r.safetensors"

    def calibrate_beside_another(*args, **kwargs):
        out.write_bytes(b"of another")
        return calibrate(*args, **kwargs)

    monkeypatch.setattr("vllm_kvcompress.calibration.pipeline.calibrate", calibrate_beside_another)
    arguments = ["calibrate", str(model_folders["llama"]), "--tokens", "64", "--device", "cpu", "--out", str(out)]
    assert main([*arguments, "--if-missing"]) == 0
    assert capsys.readouterr().out.endswith(f"rotation: {out} is there already, of another calibration meanwhile\n")
    assert out.read_bytes() == b"of another"
    assert main(arguments) == 0
    assert read_rotation(out).metadata.seed == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nobody/nothing"], "neither a folder nor a model downloaded"),
        (["MODEL", "--tokens", "3"], "--tokens must be at least 64"),
        (["MODEL", "--data", "none.txt"], "no such file"),
        (["MODEL", "--device", "abacus"], "--device abacus"),
    ],
)
def test_command_refusals(model_folders, capsys, arguments, words):
    arguments = [str(model_folders["llama"]) if word == "MODEL" else word for word in arguments]
    assert main(["calibrate", *arguments]) == 2
    assert words in capsys.readouterr().err
