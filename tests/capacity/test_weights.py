# SPDX-License-Identifier: Apache-2.0
"""Bytes of the weights from headers and indices alone, and a model that is not there."""

import json
import types

import huggingface_hub
import pytest
import torch

from vllm_kvcompress.capacity.weights import find_config, weight_bytes
from vllm_kvcompress.errors import KVCompressError


@pytest.fixture(scope="module")
def model():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128,
        hidden_size=128,
        intermediate_size=192,
        num_hidden_layers=3,
        num_attention_heads=2,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def elements(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_one_file(tmp_path, model):
    """Floats count in the dtype they are loaded in; quantised weights as they are stored."""
    model.save_pretrained(tmp_path)
    assert find_config(str(tmp_path)) == tmp_path
    assert weight_bytes("m", tmp_path, None) == 4 * elements(model)
    assert weight_bytes("m", tmp_path, 2) == 2 * elements(model)
    # A spare copy of the weights, as some repositories hold, does not count.
    (tmp_path / "consolidated.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes())
    assert weight_bytes("m", tmp_path, 2) == 2 * elements(model)


def test_several_files_and_their_index(tmp_path, model):
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    shards = list(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert weight_bytes("m", tmp_path, 2) == 2 * elements(model)
    for shard in shards[1:]:
        shard.unlink()
    # One is missing: the index states all of them, as they are stored.
    assert weight_bytes("m", tmp_path, 2) == 4 * elements(model)


def test_other_dtypes_stay(tmp_path):
    from safetensors.torch import save_file

    tensors = {"codes": torch.zeros(64, 8, dtype=torch.int32), "scales": torch.zeros(6, dtype=torch.float16)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert weight_bytes("m", tmp_path, 4) == 64 * 8 * 4 + 6 * 4
    assert weight_bytes("m", tmp_path, None) == 64 * 8 * 4 + 6 * 2


@pytest.mark.parametrize(
    "name,content",
    [
        ("model.safetensors", b""),
        ("model.safetensors", b"\xff" * 100),
        ("model.safetensors", (20).to_bytes(8, "little") + b'{"a": {"dtype": "F'),
        ("model.safetensors", (12).to_bytes(8, "little") + b'{"a": {"b":1}}'[:12]),
        ("model.safetensors", (16).to_bytes(8, "little") + b'{"a": {"b": 1}} '),
        ("model.safetensors", (2).to_bytes(8, "little") + b"[]"),
        ("model.safetensors.index.json", b"{"),
        ("model.safetensors.index.json", b"[]"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": 1}}'),
    ],
)
def test_corrupt_files(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(KVCompressError, match=rf"{name}.*--weights") as caught:
        weight_bytes("m", tmp_path, 2)
    assert str(tmp_path) in str(caught.value)


def test_nothing_to_read(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(KVCompressError, match="--weights"):
        weight_bytes(str(tmp_path), tmp_path, 2)
    with pytest.raises(KVCompressError, match=rf"{tmp_path}.*config\.json"):
        find_config(str(tmp_path))
    with pytest.raises(KVCompressError, match="no folder /nowhere/at-all"):
        find_config("/nowhere/at-all")


@pytest.fixture
def empty_hub(tmp_path, monkeypatch):
    """An empty local cache and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def test_offline(empty_hub):
    with pytest.raises(KVCompressError, match="some/model is neither a folder nor a model on this machine"):
        find_config("some/model")


def test_hub_model_that_is_not_here(tmp_path, monkeypatch):
    """Small files are fetched; without an index, the headers are read over the network."""
    asked = []

    def snapshot_download(name, local_files_only=False, **patterns):
        if local_files_only:
            raise FileNotFoundError(name)
        asked.append(patterns)
        (tmp_path / "config.json").write_text("{}")
        return str(tmp_path)

    tensor = types.SimpleNamespace(dtype="F32", shape=[6], data_offsets=(0, 24), parameter_count=6)
    file = types.SimpleNamespace(tensors={"a": tensor, "b": tensor})
    found = types.SimpleNamespace(files_metadata={"model.safetensors": file})
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", lambda name: found)
    assert find_config("some/model") == tmp_path
    assert asked and "*.safetensors" not in json.dumps(asked)
    assert weight_bytes("some/model", tmp_path, 2) == 2 * 6 * 2
