# SPDX-License-Identifier: Apache-2.0
"""Rotation files: what is written is read; whatever else is read is refused with words, never with a traceback."""

import contextlib
import json
import math
import os
import stat
import tempfile
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from vllm_kvcompress.errors import RotationError
from vllm_kvcompress.rotations import check_fits, read_metadata, read_rotation, write_rotation

FIX = "kvcompress calibrate"


def test_round_trip(make_set, tmp_path):
    written = make_set()
    path = tmp_path / "new" / "folder" / "r.safetensors"
    write_rotation(path, written)
    found = read_rotation(path)
    assert found.metadata == written.metadata == read_metadata(path)
    for layer_id, layer in written.layers.items():
        for field in fields(layer):
            assert torch.equal(getattr(found.layers[layer_id], field.name), getattr(layer, field.name))
    assert os.listdir(path.parent) == [path.name]  # no temporary file is left
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_overwrites(make_set, tmp_path):
    path = tmp_path / "r.safetensors"
    write_rotation(path, make_set(model="old"))
    write_rotation(path, make_set(model="new"))
    assert read_rotation(path).metadata.model == "new"


def test_unwritable_place(make_set, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RotationError, match="cannot write"):
        write_rotation(tmp_path / "file" / "r.safetensors", make_set())


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("k_rotation", lambda t: t * 1.01, "not orthogonal"),
        ("v_rotation", lambda t: t.index_fill(0, torch.tensor([1]), 0.0), "KV head 1: v_rotation is not orthogonal"),
        ("k_mean", lambda t: t * float("nan"), "NaN"),
        ("v_rotation", lambda t: t + float("inf"), "NaN or infinite"),
        ("k_clip", lambda t: t * 0, "not within"),
        ("v_clip", lambda t: t + 1, "not within"),
    ],
)
def test_bad_values_are_neither_written_nor_read(make_set, tmp_path, monkeypatch, name, change, words):
    rotation = make_set()
    rotation.layers[3] = replace(rotation.layers[3], **{name: change(getattr(rotation.layers[3], name))})
    path = tmp_path / "r.safetensors"
    with pytest.raises(RotationError, match=f"layer 3.*{words}"):
        write_rotation(path, rotation)
    assert not path.exists()
    with monkeypatch.context() as patch:
        patch.setattr("vllm_kvcompress.rotations.file.check_values", lambda *args: None)
        write_rotation(path, rotation)
    with pytest.raises(RotationError, match=f"layer 3.*{words}") as caught:
        read_rotation(path)
    assert FIX in str(caught.value) and str(path) in str(caught.value)


def test_rotation_off_by_float_rounding_is_accepted(make_set, tmp_path):
    rotation = make_set()
    rotation.layers[0] = replace(rotation.layers[0], k_rotation=rotation.layers[0].k_rotation.bfloat16().float())
    # bfloat16 entries are 2^-9 relative off: |R^T R - I| of up to 4e-3 is beyond the tolerance of 1e-3 ...
    with pytest.raises(RotationError, match="not orthogonal"):
        write_rotation(tmp_path / "r.safetensors", rotation)
    # ... fp16 ones 2^-12 off: at most 2 * 2^-12 = 5e-4 on the diagonal.
    rotation = make_set()
    rotation.layers[0] = replace(rotation.layers[0], k_rotation=rotation.layers[0].k_rotation.half().float())
    write_rotation(tmp_path / "r.safetensors", rotation)


@pytest.mark.parametrize(
    "content", [b"", b"\0", b"x" * 7, b"not a file of tensors" * 100, b"\xff" * 64, b"\2" + b"\0" * 7]
)
def test_foreign_bytes(tmp_path, content):
    path = tmp_path / "r.safetensors"
    path.write_bytes(content)
    for read in (read_rotation, read_metadata):
        with pytest.raises(RotationError, match=FIX):
            read(path)


def test_missing_and_folder(tmp_path):
    with pytest.raises(RotationError, match=r"there is no rotation file.*kvcompress calibrate"):
        read_rotation(tmp_path / "none.safetensors")
    with pytest.raises(RotationError, match="is a folder"):
        read_rotation(tmp_path)


def test_other_safetensors_file(tmp_path):
    save_file({"weight": torch.zeros(2)}, tmp_path / "w.safetensors")
    with pytest.raises(RotationError, match=r"no rotation file of vllm-kvcompress.*import-zoo"):
        read_rotation(tmp_path / "w.safetensors")


def rewrite(path: Path, strings=None, tensors=None) -> None:
    """Write the file again with changed metadata strings or tensors."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        old = file.metadata()
        content = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    save_file({**content, **(tensors or {})}, path, metadata={**old, **(strings or {})})


@pytest.mark.parametrize(
    ("strings", "words"),
    [
        ({"metadata": "{"}, "metadata is not JSON"),
        ({"metadata": "[]"}, "schema version None"),
        ({"metadata": json.dumps({"schema_version": 2})}, "schema version 2"),
        ({"metadata": json.dumps({"schema_version": 1})}, "metadata field model"),
        ({"format": "other"}, "no rotation file"),
        ({"sha256": "0"}, "checksum"),
    ],
)
def test_bad_metadata(make_set, tmp_path, strings, words):
    path = tmp_path / "r.safetensors"
    write_rotation(path, make_set())
    rewrite(path, strings)
    with pytest.raises(RotationError, match=words):
        read_rotation(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layer_ids": [3, 0]}, "not ascending"),
        ({"layer_ids": [0, 0]}, "not ascending"),
        ({"num_kv_heads": 4}, "k_mean|truncated|expected F32|does not order"),
        ({"head_dim": 512}, "truncated|does not order"),
        ({"sensitivity": [0.5]}, "1 sensitivities for 2 layers"),
        ({"sensitivity": [0.5, math.nan]}, "sensitivity.1: Input should be a finite number"),
        ({"k_channels": [[list(range(8))] * 2]}, "k_channels does not order the 8 channels of 2 KV heads in 2 layers"),
        ({"k_channels": [[list(range(8))]] * 2}, "k_channels does not order"),
        ({"v_channels": [[[0, *range(7)]] * 2] * 2}, "v_channels does not order"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_metadata_that_contradicts_itself(make_set, tmp_path, change, words):
    path = tmp_path / "r.safetensors"
    rotation = make_set()
    write_rotation(path, rotation)
    rewrite(path, {"metadata": json.dumps({**rotation.metadata.model_dump(), **change})})
    with pytest.raises(RotationError, match=words):
        read_rotation(path)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"extra": torch.zeros(1)}, "holds tensors"),
        ({"k_mean": torch.zeros(2, 2, 9)}, r"k_mean is torch.float32 \[2, 2, 9\]"),
        ({"k_clip": torch.ones(2, 2, dtype=torch.float64)}, "k_clip is torch.float64"),
        ({"k_clip": torch.full((2, 2), 0.125)}, "checksum"),
    ],
)
def test_wrong_tensors(make_set, tmp_path, tensors, words):
    path = tmp_path / "r.safetensors"
    write_rotation(path, make_set())
    rewrite(path, tensors=tensors)
    with pytest.raises(RotationError, match=words):
        read_rotation(path)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_bytes_give_a_rotation_error(make_set, data):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "r.safetensors"
        write_rotation(path, make_set())
        whole = path.read_bytes()
        kind = data.draw(st.sampled_from(["truncate", "flip", "overwrite", "append"]))
        at = data.draw(st.integers(0, len(whole) - 1))
        if kind == "truncate":
            damaged = whole[:at]
        elif kind == "append":
            damaged = whole + data.draw(st.binary(min_size=1, max_size=64))
        else:
            piece = bytearray(whole)
            if kind == "flip":
                piece[at] ^= 1 << data.draw(st.integers(0, 7))
            else:
                new = data.draw(st.binary(min_size=1, max_size=16))
                piece[at : at + len(new)] = new
            damaged = bytes(piece)
        path.write_bytes(damaged)
        try:
            found = read_rotation(path)
        except RotationError:
            pass
        else:
            # Only bytes that carry no meaning (spaces of the header's padding) may change unnoticed.
            path.write_bytes(whole)
            original = read_rotation(path)
            assert found.metadata == original.metadata
            for layer_id, layer in original.layers.items():
                for field in fields(layer):
                    assert torch.equal(getattr(found.layers[layer_id], field.name), getattr(layer, field.name))
        # The cheap reader does not see the tensors, but breaks no other way.
        path.write_bytes(damaged)
        with contextlib.suppress(RotationError):
            read_metadata(path)


def fits(rotation, **changes):
    expected = {
        "fingerprint": "ab" * 16,
        "layer_ids": (0, 3),
        "num_kv_heads": 2,
        "head_dim": 8,
        "path": "r.safetensors",
    }
    check_fits(rotation, **{**expected, **changes})


def test_fitting_model(make_set):
    fits(make_set())
    fits(make_set(), layer_ids=[3])
    fits(make_set(), fingerprint=None)
    fits(make_set(fingerprint=""), fingerprint="cd" * 16)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fingerprint": "cd" * 16}, "other weights"),
        ({"layer_ids": [0, 1, 3]}, "no rotation for layer 1 "),
        ({"num_kv_heads": 4}, "2 KV heads of size 8"),
        ({"head_dim": 64}, "2 KV heads of size 8"),
    ],
)
def test_foreign_model(make_set, changes, words):
    with pytest.raises(RotationError, match=words) as caught:
        fits(make_set(), **changes)
    assert FIX in str(caught.value) and "r.safetensors" in str(caught.value)
