# SPDX-License-Identifier: Apache-2.0
"""RotationZoo files v1 and v2, as their loaders and generators write them."""

import json

import pytest
import torch

from vllm_kvcompress.cli import main
from vllm_kvcompress.errors import RotationError
from vllm_kvcompress.rotations import read_rotation, read_zoo

HEADS, DIM, LAYERS = 2, 64, (3, 7)


def orthogonal(*shape: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(*shape, dtype=torch.float64))[0].float()


def zoo(version: int = 1, per_head: bool = False, string_keys: bool = False, **extra) -> dict:
    shape = (HEADS, DIM, DIM) if per_head else (DIM, DIM)
    layers = {
        (str(i) if string_keys else i): {
            "layer_id": i,
            "rotation": orthogonal(*shape),
            "eigenvalues": torch.rand(DIM),
            **extra,
        }
        for i in LAYERS
    }
    return {"format_version": version, "objective": "qqt_r_h_pbr", "source_grouping": "layer", "layers": layers}


@pytest.fixture
def load(tmp_path):
    def run(k: object, v: object, **changes):
        for name, content in (("k.pt", k), ("v.pt", v)):
            if isinstance(content, bytes):
                (tmp_path / name).write_bytes(content)
            elif content is not None:
                torch.save(content, tmp_path / name)
        geometry = {"num_kv_heads": HEADS, "num_query_heads": 2 * HEADS, "head_dim": DIM, **changes}
        return read_zoo(tmp_path / "k.pt", tmp_path / "v.pt", **geometry)

    return run


@pytest.mark.parametrize("string_keys", [False, True])
def test_shared_rotations_are_repeated(load, string_keys):
    k, v = zoo(string_keys=string_keys), zoo(string_keys=string_keys)
    found = load(k, v)
    assert found.metadata.source == "rotation-zoo v1"
    assert found.metadata.fingerprint == ""
    assert found.metadata.layer_ids == list(LAYERS)
    for i in LAYERS:
        layer = found.layers[i]
        for head in range(HEADS):
            assert torch.equal(layer.k_rotation[head], k["layers"][str(i) if string_keys else i]["rotation"])
            assert torch.equal(layer.v_rotation[head], v["layers"][str(i) if string_keys else i]["rotation"])
        assert layer.k_mean.eq(0).all()


@pytest.mark.parametrize("version", [1, 2])
def test_rotations_per_head_whatever_the_version_says(load, version):
    k, v = zoo(version, per_head=True), zoo(version, per_head=True)
    found = load(k, v)
    assert found.metadata.source == f"rotation-zoo v{version}"
    for i in LAYERS:
        assert torch.equal(found.layers[i].k_rotation, k["layers"][i]["rotation"])


@pytest.mark.parametrize("shape", [(DIM,), (HEADS, DIM)])
def test_mean_keys(load, shape):
    mean = torch.randn(shape)
    found = load(zoo(k_mean=mean), zoo())
    assert torch.equal(found.layers[LAYERS[0]].k_mean, mean.expand(HEADS, DIM))


def test_mixed_versions_and_some_layers(load):
    found = load(zoo(2, per_head=True), zoo(1), layer_ids=[7])
    assert list(found.layers) == [7]


class Payload:
    def __reduce__(self):
        return (print, ("this ran",))


@pytest.mark.parametrize(
    ("k", "changes", "words"),
    [
        (None, {}, "there is no file"),
        (b"", {}, "not a readable .pt file"),
        (b"no pickle at all" * 9, {}, "could run code|not a readable"),
        ({"layers": {}}, {}, "no table 'layers'"),
        ([1, 2], {}, "no table 'layers'"),
        ({"format_version": 3, "layers": {0: {}}}, {}, "format_version 3"),
        ({"layers": {"first": {}}}, {}, "'first' is not a layer number"),
        ({"layers": {3: {}}}, {}, "layer 3 has no tensor 'rotation'"),
        ({"layers": {3: {"rotation": torch.eye(DIM)}}}, {}, r"do not belong together.*\[7\]"),
        ({"layers": {3: {"rotation": torch.eye(DIM)}, "3": {"rotation": torch.eye(DIM)}}}, {}, "appears twice"),
        (zoo(), {"head_dim": 128}, "head size is 128"),
        (zoo(per_head=True), {"num_kv_heads": 8}, "2 heads; the model has 8"),
        (zoo(), {"layer_ids": [3, 7, 11]}, r"no rotation for layers \[11\]"),
        (zoo(q_rotation=torch.eye(DIM)), {}, "'q_rotation', so its key basis is not orthogonal"),
        (zoo(k_mean=torch.zeros(DIM + 1)), {}, r"k_mean is \[65\]; the model's head size is 64"),
        (zoo(k_mean=torch.zeros(1, 1, DIM)), {}, "k_mean has shape"),
        ({"layers": {i: {"rotation": torch.eye(DIM) * 1.1} for i in LAYERS}}, {}, "layer 3.*not orthogonal"),
        ({"layers": {i: {"rotation": torch.eye(DIM) * torch.nan} for i in LAYERS}}, {}, "layer 3.*NaN"),
        ({"layers": {i: {"rotation": torch.eye(DIM, dtype=torch.int64)} for i in LAYERS}}, {}, "not floating point"),
    ],
)
def test_refusals(load, k, changes, words):
    with pytest.raises(RotationError, match=words):
        load(k, zoo(), **changes)


def test_value_basis_that_is_not_orthogonal(load):
    with pytest.raises(RotationError, match="'o_rotation', so its value basis"):
        load(zoo(), zoo(o_rotation=torch.eye(DIM)))


def test_pickled_code_does_not_run(load, capsys):
    content = zoo()
    content["payload"] = Payload()
    with pytest.raises(RotationError, match="could run code"):
        load(content, zoo())
    assert "this ran" not in capsys.readouterr().out


def test_truncated_file(load, tmp_path):
    torch.save(zoo(), tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    for length in (10, len(whole) // 2, len(whole) - 10):
        with pytest.raises(RotationError):
            load(whole[:length], zoo())


def test_command(tmp_path, capsys):
    model = tmp_path / "model"
    model.mkdir()
    config = {
        "model_type": "llama",
        "hidden_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": HEADS,
        "head_dim": DIM,
    }
    (model / "config.json").write_text(json.dumps(config))
    torch.save(zoo(), tmp_path / "k.pt")
    torch.save(zoo(), tmp_path / "v.pt")
    command = ["import-zoo", str(tmp_path / "k.pt"), str(tmp_path / "v.pt"), "--model", str(model)]
    assert main(command) == 0
    path = model / "kvcompress" / "rotation.safetensors"
    assert read_rotation(path).metadata.num_query_heads == 4
    assert main(["inspect", str(path)]) == 0
    assert "any model of this geometry" in capsys.readouterr().out
    assert main([*command[:1], str(tmp_path / "none.pt"), *command[2:]]) == 2
    assert "there is no file" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "k.pt")]) == 2
    assert "kvcompress calibrate" in capsys.readouterr().err
