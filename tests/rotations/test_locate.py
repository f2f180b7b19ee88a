# SPDX-License-Identifier: Apache-2.0
"""Fingerprints of weights, and where rotation files are looked for and written."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vllm_kvcompress.errors import RotationError
from vllm_kvcompress.rotations import (
    ROTATION_BESIDE_MODEL,
    default_output,
    find_optional_rotation,
    find_rotation,
    model_fingerprint,
    model_folder,
    user_cache_path,
)


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {f"layer.{i}.weight": torch.randn(64, 64, generator=generator) for i in range(6)}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 64, "head_dim": 64}))
    save_file(tensors(), folder / "model.safetensors")
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("VLLM_KVCOMPRESS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_fingerprint_is_of_the_weights_only(model, tmp_path):
    found = model_fingerprint(model)
    assert len(found) == 32 and int(found, 16) >= 0
    (model / "README.md").write_text("words")
    (model / "kvcompress").mkdir()
    (model / "kvcompress" / "rotation.safetensors").write_bytes(b"x")
    os.utime(model / "model.safetensors", (0, 0))
    assert model_fingerprint(model) == found
    copy = shutil.copytree(model, tmp_path / "elsewhere")
    (copy / "model.safetensors").rename(copy / "weights.safetensors")
    assert model_fingerprint(copy) == found
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "use_cache": False}))
    assert model_fingerprint(model) == found


@pytest.mark.parametrize("touched", range(6))
def test_a_fine_tune_of_any_one_tensor_differs(model, touched):
    found = model_fingerprint(model)
    changed = tensors()
    changed[f"layer.{touched}.weight"] += 0.01 * torch.randn(64, 64)
    save_file(changed, model / "model.safetensors")
    assert model_fingerprint(model) != found


def test_geometry_counts(model):
    found = model_fingerprint(model)
    (model / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 64, "head_dim": 32}))
    assert model_fingerprint(model) != found


def test_sharded_weights_follow_the_index(model):
    found = model_fingerprint(model)
    weights = tensors()
    names = list(weights)
    for part, keys in (("a.safetensors", names[:3]), ("b.safetensors", names[3:])):
        save_file({key: weights[key] for key in keys}, model / part)
    index = {"weight_map": {key: "a.safetensors" if key in names[:3] else "b.safetensors" for key in names}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    sharded = model_fingerprint(model)
    assert sharded != found
    (model / "model.safetensors").unlink()
    assert model_fingerprint(model) == sharded


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.gguf"])
def test_other_weight_files(tmp_path, name):
    (tmp_path / name).write_bytes(os.urandom(5000))
    found = model_fingerprint(tmp_path)
    content = bytearray((tmp_path / name).read_bytes())
    content[2500] ^= 1
    (tmp_path / name).write_bytes(content)
    assert model_fingerprint(tmp_path) != found


def test_a_large_file_is_only_sampled(tmp_path):
    with (tmp_path / "model.safetensors").open("wb") as file:
        header = b'{"w":{"dtype":"U8","shape":[8000000000],"data_offsets":[0,8000000000]}}'
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 8_000_000_000)  # sparse
    started = time.monotonic()
    model_fingerprint(tmp_path)
    # Reading 8 GB takes seconds on any disk; samples take milliseconds, with a wide margin for a busy machine.
    assert time.monotonic() - started < 1.0


def test_no_weights(tmp_path):
    with pytest.raises(RotationError, match="holds no weights"):
        model_fingerprint(tmp_path)


@pytest.mark.parametrize("content", ["{", "[1", "\x00"])
def test_damaged_config(model, content):
    (model / "config.json").write_text(content)
    with pytest.raises(RotationError, match=r"config\.json cannot be read"):
        model_fingerprint(model)


def test_model_folder(model, tmp_path):
    assert model_folder(str(model)) == model
    assert model_folder(str(model / "model.safetensors")) == model
    assert model_folder("nobody/has-this-model", download_dir=str(tmp_path)) is None
    assert model_folder("no such path at all", download_dir=str(tmp_path)) is None


def test_model_folder_of_a_downloaded_model(tmp_path):
    snapshot = tmp_path / "models--org--name" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    refs = tmp_path / "models--org--name" / "refs"
    refs.mkdir()
    (refs / "main").write_text("a" * 40)
    found = model_folder("org/name", download_dir=str(tmp_path))
    assert found is not None and found.resolve() == snapshot.resolve()
    assert model_folder("org/name", revision="other", download_dir=str(tmp_path)) is None


def test_order_of_places(model, cache, tmp_path):
    with pytest.raises(RotationError) as caught:
        find_rotation(str(model), model, None)
    assert f"kvcompress calibrate {model}" in str(caught.value)
    assert ROTATION_BESIDE_MODEL in str(caught.value) and str(cache) in str(caught.value)

    cached = user_cache_path(model_fingerprint(model))
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"")
    assert find_rotation(str(model), model, None) == cached
    beside = model / ROTATION_BESIDE_MODEL
    beside.parent.mkdir()
    beside.write_bytes(b"")
    assert find_rotation(str(model), model, None) == beside
    explicit = tmp_path / "mine.safetensors"
    with pytest.raises(RotationError, match=r"asked for does not exist.*--out"):
        find_rotation(str(model), model, explicit)
    explicit.write_bytes(b"")
    assert find_rotation(str(model), model, explicit) == explicit
    assert find_rotation("org/model", None, str(explicit)) == explicit


def test_model_that_is_not_here():
    with pytest.raises(RotationError, match=r"not downloaded yet.*kvcompress calibrate org/model"):
        find_rotation("org/model", None, None)


def test_default_output(model, cache, monkeypatch):
    assert default_output(str(model), model) == model / ROTATION_BESIDE_MODEL
    assert default_output("org/model", model).parent == cache
    monkeypatch.setattr("os.access", lambda *args: False)
    assert default_output(str(model), model).parent == cache


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("VLLM_KVCOMPRESS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_cache_path("f") == tmp_path / "vllm-kvcompress" / "f.safetensors"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert user_cache_path("f") == Path.home() / ".cache" / "vllm-kvcompress" / "f.safetensors"


def test_optional_rotation(tmp_path):
    """None where there is none; a file that was asked for must exist."""
    model = tmp_path / "model"
    model.mkdir()
    assert find_optional_rotation(str(model), model, None) is None
    with pytest.raises(RotationError, match="does not exist"):
        find_optional_rotation(str(model), model, tmp_path / "absent.safetensors")
    beside = model / ROTATION_BESIDE_MODEL
    beside.parent.mkdir()
    beside.touch()
    assert find_optional_rotation(str(model), model, None) == beside
