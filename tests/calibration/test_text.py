# SPDX-License-Identifier: Apache-2.0
"""Calibration text from files and from the model."""

import json

import pytest
import torch

from vllm_kvcompress.calibration.model import load
from vllm_kvcompress.calibration.text import file_sequences, generated_sequences
from vllm_kvcompress.errors import KVCompressError


def test_pieces_come_from_all_over_the_file(tmp_path, tokenizer):
    path = tmp_path / "t.txt"
    path.write_text(" ".join(f"word{i:05d}" for i in range(4000)))
    found = file_sequences(path, tokenizer, 512, 128)
    assert [len(ids) for ids in found] == [128] * 4
    starts = [int(tokenizer.decode(ids).split("word")[1][:5]) for ids in found]
    assert starts == sorted(starts) and starts[0] == 0 and starts[-1] >= 2900


def test_small_files_give_what_they_have(tmp_path, tokenizer):
    path = tmp_path / "t.txt"
    path.write_text("just thirty characters of text")
    found = file_sequences(path, tokenizer, 1024, 1024)
    assert [len(ids) for ids in found] == [30]


def test_jsonl(tmp_path, tokenizer):
    path = tmp_path / "t.jsonl"
    path.write_text(
        "\n".join([json.dumps({"text": "first " * 9}), "", json.dumps("second " * 9), '{"content": "third"}'])
    )
    text = tokenizer.decode(file_sequences(path, tokenizer, 512, 512)[0])
    assert "first" in text and "second" in text and "third" in text


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.txt", None, "no such file"),
        ("t.txt", b"", "holds no text"),
        ("t.txt", b"  \n ", "holds no text"),
        ("t.txt", b"short", "too short"),
        ("t.jsonl", b"\xff\xfe\x00", "cannot be read as UTF-8"),
        ("t.jsonl", b'{"text": "a"}\n{"text": ', "line 2: not JSON"),
        ("t.jsonl", b'{"words": "a"}', 'line 1: expected a string or an object with "text"'),
        ("t.jsonl", b"[1]", "line 1: expected"),
    ],
)
def test_bad_files(tmp_path, tokenizer, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(KVCompressError, match=words):
        file_sequences(tmp_path / name, tokenizer, 512, 128)


def test_generated_text_follows_the_seed(model_folders):
    model, tokenizer = load(model_folders["llama"], "llama", torch.device("cpu"))
    first = generated_sequences(model, tokenizer, 300, 100, seed=3)
    torch.rand(1)  # the global generator has no say
    again = generated_sequences(model, tokenizer, 300, 100, seed=3)
    other = generated_sequences(model, tokenizer, 300, 100, seed=4)
    assert [len(ids) for ids in first] == [100, 100, 100]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert [len(ids) for ids in generated_sequences(model, tokenizer, 5, 7, seed=0)] == [7]
