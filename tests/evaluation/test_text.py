# SPDX-License-Identifier: Apache-2.0
"""Reading and cutting the evaluation text."""

import json

import pytest

from vllm_kvcompress.errors import KVCompressError
from vllm_kvcompress.evaluation.text import cut_chunks, leading_tokens, read_text


def test_skip_leaves_out_the_first_part(tmp_path):
    file = tmp_path / "data.txt"
    file.write_text("abcdefghij", encoding="utf-8")
    assert read_text(file, 0.6) == ("abcdef", "ghij")
    assert read_text(file, 0) == ("", "abcdefghij")


def test_jsonl_records_are_joined(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps({"text": "one", "id": 3}) + "\n\n" + json.dumps("two") + "\n")
    assert read_text(file, 0)[1] == "one\n\ntwo"


@pytest.mark.parametrize(
    ("name", "content", "skip", "message"),
    [
        ("missing.txt", None, 0.5, "missing.txt: no such file"),
        ("empty.txt", b"  \n", 0.5, "holds no text"),
        ("binary.txt", b"\xff\xfe\x00", 0.5, "cannot be read as UTF-8"),
        ("bad.jsonl", b'{"text": "x"}\n{"body": "y"}\n', 0.0, "line 2"),
        ("bad.jsonl", b"{]\n", 0.0, "line 1"),
        ("bad.jsonl", b'{"text": 3}\n', 0.0, "line 1"),
        ("text.txt", b"text", 1.0, "--skip-fraction"),
        ("text.txt", b"text", -0.1, "--skip-fraction"),
    ],
)
def test_bad_data(tmp_path, name, content, skip, message):
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(KVCompressError, match=message):
        read_text(file, skip)


def test_chunks_are_exact_disjoint_and_spread(tokenizer):
    words = [f"w{index % 300}" for index in range(8000)]
    text = "\n".join(" ".join(words[start : start + 10]) for start in range(0, 8000, 10))
    chunks = cut_chunks(text, tokenizer, 4, 100)
    assert [len(chunk) for chunk in chunks] == [100] * 4
    assert len({tuple(chunk) for chunk in chunks}) == 4


def test_chunks_begin_with_what_the_tokenizer_puts_first(tokenizer_with_bos):
    assert leading_tokens(tokenizer_with_bos) == [tokenizer_with_bos.bos_token_id]
    chunks = cut_chunks("w1 w2 w3 w4\n" * 500, tokenizer_with_bos, 2, 50)
    assert [chunk[0] for chunk in chunks] == [tokenizer_with_bos.bos_token_id] * 2
    assert [len(chunk) for chunk in chunks] == [50, 50]


def test_too_little_text(tokenizer):
    with pytest.raises(KVCompressError, match="too little text for 3 chunks of 100 tokens"):
        cut_chunks("w1 w2 w3\n" * 60, tokenizer, 3, 100)
