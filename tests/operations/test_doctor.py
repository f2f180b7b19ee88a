# SPDX-License-Identifier: Apache-2.0
"""`kvcompress doctor` as typed, on this installation and on ones that are broken: what is wrong and what to do."""

import importlib.util
import json
import secrets
import shutil
import subprocess
import sys

import pytest
import torch

from vllm_kvcompress import compat, rotations
from vllm_kvcompress.cli import main
from vllm_kvcompress.kernels import cuda_ops
from vllm_kvcompress.operations import doctor, seams
from vllm_kvcompress.rotations import LayerRotation, RotationMetadata, RotationSet, write_rotation

HEADS, DIM, LAYERS = 2, 64, 2


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """An empty user cache, and no settings."""
    for name in ("ROTATION", "KERNELS"):
        monkeypatch.delenv(f"VLLM_KVCOMPRESS_{name}", raising=False)
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    monkeypatch.setenv("VLLM_KVCOMPRESS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


@pytest.fixture
def examine(capsys):
    """Findings of the command by status and name, from its JSON; what it printed as text says the same."""

    def examine(*model):
        status = main(["doctor", *map(str, model), "--json"])
        printed = json.loads(capsys.readouterr().out)
        found = printed["findings"]
        assert main(["doctor", *map(str, model)]) == status == (not printed["healthy"])
        text = capsys.readouterr().out
        for one in found:
            assert one["check"] in text and one["text"] in text and one["fix"] in text
        errors, warnings = ([one for one in found if one["status"] == kind] for kind in ("error", "warning"))
        assert text.endswith(f"{len(errors)} errors, {len(warnings)} warnings\n")
        return errors, warnings, {one["check"]: one for one in found}

    return examine


@pytest.fixture
def seams_are_fine(monkeypatch):
    """Not looked at again: it takes a second."""
    monkeypatch.setattr(seams, "moved", lambda name: None)


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(compat, "device_capability", lambda: cuda_ops.CAPABILITY)
    monkeypatch.setattr(cuda_ops, "_loaded", False)


def test_this_installation():
    """In a process of its own: vLLM's log, which goes to stdout while it is imported, must not spoil the JSON."""
    command = [sys.executable, "-m", "vllm_kvcompress", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {one["check"]: one for one in json.loads(done.stdout)["findings"]}
    assert all(one["status"] != "error" for one in found.values())
    assert compat.vllm_version() in found["vllm"]["text"] and torch.__version__ in found["packages"]["text"]
    assert f"all {len(seams.SEAMS)} places" in found["seams"]["text"]


def test_foreign_version(examine, monkeypatch, seams_are_fine):
    monkeypatch.setattr(compat, "vllm_version", lambda: "0.35.1")
    errors, _, _ = examine()
    (error,) = errors
    assert error["check"] == "vllm" and "serves vLLM >=0.32,<0.34 and found 0.35.1" in error["text"]
    assert "install a matching pair" in error["text"]


def test_no_vllm(examine, monkeypatch):
    def version():
        raise ModuleNotFoundError("No module named 'vllm'")

    find_spec = importlib.util.find_spec
    monkeypatch.setattr(compat, "vllm_version", version)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "vllm" else find_spec(name))
    errors, _, found = examine()
    (error,) = errors
    assert "not installed" in error["text"] and "pip install 'vllm-kvcompress[cuda]'" in error["fix"]
    assert "device" not in found and "seams" not in found


def test_a_vllm_that_does_not_load(examine, monkeypatch):
    def fail():
        raise OSError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr(compat, "device_capability", fail)
    errors, _, _ = examine()
    assert ["libcudart.so.13" in error["text"] for error in errors] == [True]


def test_a_seam_that_moved_is_named(examine, monkeypatch):
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

    monkeypatch.delattr(KVConnectorBase_V1, "bind_kv_cache_manager")
    errors, _, found = examine()
    (error,) = errors
    assert error["check"] == "seam eviction" and "hasattr(KVConnectorBase_V1, hook)" in error["text"]
    assert "install a version of vLLM that is served" in error["fix"] and "seams" not in found


def test_extension_that_is_missing_or_broken(examine, monkeypatch, tmp_path, hopper, seams_are_fine):
    monkeypatch.setattr(cuda_ops, "LIBRARY", tmp_path / "_C.so")
    errors, warnings, _ = examine()
    (missing,) = warnings
    assert not errors and "Triton decodes" in missing["text"] and "VLLM_KVCOMPRESS_BUILD_CUDA=1" in missing["text"]
    (tmp_path / "_C.so").write_bytes(b"\x7fELF, or so it says")
    errors, warnings, _ = examine()
    (broken,) = warnings
    assert not errors and f"{tmp_path / '_C.so'} does not load" in broken["text"] and "install" in broken["fix"]


def test_devices(examine, monkeypatch, seams_are_fine):
    assert "not needed" in examine()[2]["CUDA extension"]["text"]
    monkeypatch.setattr(compat, "device_capability", lambda: (7, 5))
    assert "too old" in examine()[2]["device"]["text"]
    monkeypatch.setattr(compat, "device_capability", lambda: (8, 0))
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else find_spec(name))
    errors, _, _ = examine()
    assert [error["fix"] for error in errors] == ["pip install triton"]


@pytest.mark.parametrize("allowed,fix", [("", "VLLM_PLUGINS=kvcompress,"), ("other", "VLLM_PLUGINS=other,kvcompress")])
def test_plugins_that_vllm_may_not_load(examine, monkeypatch, seams_are_fine, allowed, fix):
    monkeypatch.setenv("VLLM_PLUGINS", allowed)
    errors, _, _ = examine()
    (error,) = errors
    assert error["check"] == "plugin" and fix in error["fix"]
    monkeypatch.setenv("VLLM_PLUGINS", "other,kvcompress")
    assert examine()[0] == []


def test_not_installed(examine, monkeypatch, seams_are_fine):
    monkeypatch.setattr(doctor.importlib.metadata, "entry_points", lambda group: ())
    (error,) = examine()[0]
    assert error["check"] == "plugin" and "install it with pip" in error["fix"]


def test_bad_settings_in_the_environment(examine, monkeypatch, seams_are_fine):
    monkeypatch.setenv("VLLM_KVCOMPRESS_KERNELS", "fast")
    (error,) = examine()[0]
    assert error["check"] == "settings" and "kernels='fast'" in error["text"]


def random_rotation(fingerprint):
    metadata = RotationMetadata(
        model="tiny",
        fingerprint=fingerprint,
        layer_ids=list(range(LAYERS)),
        num_kv_heads=HEADS,
        num_query_heads=HEADS,
        head_dim=DIM,
        source="calibrate",
    )
    matrices = torch.linalg.qr(torch.randn(LAYERS, 2, HEADS, DIM, DIM, dtype=torch.float64))[0].float()
    layers = {
        layer: LayerRotation(*matrices[layer], torch.randn(HEADS, DIM), torch.ones(HEADS), torch.ones(HEADS))
        for layer in range(LAYERS)
    }
    return RotationSet(metadata, layers)


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    # Past the header, whose every byte does not matter.
    place = secrets.randbelow(LAYERS * HEADS * DIM * DIM * 4) + len(content) - LAYERS * HEADS * DIM * DIM * 4
    content[place] ^= 1 << secrets.randbelow(8)
    path.write_bytes(content)


def test_corrupt_file_in_the_user_cache(examine, cache, seams_are_fine):
    for name in ("good", "bad"):
        write_rotation(cache / f"{name}.safetensors", random_rotation("ab" * 16))
    flip_a_byte(cache / "bad.safetensors")
    errors, _, found = examine()
    (error,) = errors
    assert f"{cache / 'bad.safetensors'}" in error["text"] and "kvcompress calibrate tiny" in error["text"]
    assert f"delete {cache / 'bad.safetensors'}" in error["fix"]
    assert found["rotation file"]["status"] == "ok" and "ab" * 16 in found["rotation file"]["text"]


@pytest.fixture
def model(tmp_path):
    """A folder with weights, of a sort."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    shape = {"hidden_size": HEADS * DIM, "num_attention_heads": HEADS, "num_hidden_layers": LAYERS}
    LlamaConfig(**shape, head_dim=DIM, num_key_value_heads=HEADS).save_pretrained(tmp_path / "model")
    save_file({"w": torch.randn(8)}, tmp_path / "model" / "model.safetensors")
    return tmp_path / "model"


def test_the_rotation_file_of_a_model(examine, model, cache, seams_are_fine):
    assert "is not on this machine" in examine(model / "nowhere")[2]["model"]["text"]
    errors, warnings, _ = examine(model)
    assert not errors and f"kvcompress calibrate {model}" in warnings[0]["text"]
    fingerprint, beside = rotations.model_fingerprint(model), model / rotations.ROTATION_BESIDE_MODEL
    write_rotation(beside, random_rotation(fingerprint))
    errors, warnings, found = examine(model)
    assert not errors and not warnings and str(beside) in found["model"]["text"]
    flip_a_byte(beside)
    (error,) = examine(model)[0]
    assert error["check"] == "model" and "kvcompress calibrate tiny" in error["text"]
    write_rotation(beside, random_rotation("cd" * 16))
    (error,) = examine(model)[0]
    assert "calibrated on other weights" in error["text"] and fingerprint in error["text"]
    shutil.rmtree(beside.parent)
    write_rotation(cache / f"{fingerprint}.safetensors", random_rotation(fingerprint))
    assert str(cache) in examine(model)[2]["model"]["text"]
