# SPDX-License-Identifier: Apache-2.0
"""How often a question reaches the episode with its evidence, by embedder: LoCoMo, no engine, minutes on a CPU.

    python benchmarks/episodic_routing.py LOCOMO_FOLDER --model MODEL [--model ...] [--sentence-transformers NAME]

`found` is the share of a question's windows of evidence that lie in the episode it is routed to, averaged over the
questions that name their evidence. `size` is what an episode of that size holds by chance, `largest` what always
choosing the largest episode would find. Rows of one model add what `TokenEmbedder` does to a plain mean one by one; the
last of them is `TokenEmbedder` itself. k-means starts at random: figures are means over seeds, with their spread.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer

from vllm_kvcompress.episodic import cluster
from vllm_kvcompress.episodic.embed import (
    Embedder,
    SentenceTransformerEmbedder,
    TokenEmbedder,
    token_embeddings,
    unit_rows,
)
from vllm_kvcompress.episodic.router import EpisodeRouter
from vllm_kvcompress.episodic.settings import EpisodicSettings
from vllm_kvcompress.evaluation.locomo import Conversation, read_folder
from vllm_kvcompress.evaluation.routing import RoutedQuestion, route_questions, routing_figures
from vllm_kvcompress.rotations import model_folder


@dataclass(frozen=True)
class Plain:
    """Mean of token embeddings with any of the steps before the last of `TokenEmbedder`."""

    encode: Callable[[list[str]], list[list[int]]]
    table: torch.Tensor
    common: torch.Tensor | None = None
    """Mean over the vocabulary, to subtract from tokens before they are divided by their norm."""
    weighted: bool = False
    around_mean: bool = False
    weights: np.ndarray | None = None
    mean: np.ndarray | float = 0.0

    @property
    def identity(self) -> str:
        return f"plain:{self.common is not None}:{self.weighted}:{self.around_mean}"

    def fitted(self, texts: Sequence[str]) -> Plain:
        seen = np.zeros(len(self.table), dtype=np.float32)
        for ids in self.encode(list(texts)):
            seen[np.unique(ids)] += 1
        fitted = replace(self, weights=np.log((len(texts) + 1) / (np.maximum(seen, 1) + 1)) if self.weighted else None)
        return replace(fitted, mean=fitted.embed(texts).mean(0)) if self.around_mean else fitted

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        rows = []
        for ids in self.encode(list(texts)):
            vectors = self.table[torch.tensor(ids)].float()
            if self.common is not None:
                vectors = torch.nn.functional.normalize(vectors - self.common, dim=-1)
            weights = np.ones(len(ids), np.float32) if self.weights is None else self.weights[ids].astype(np.float32)
            rows.append(weights @ vectors.numpy())
        return unit_rows(unit_rows(np.stack(rows)) - self.mean)


def token_variants(model: str) -> dict[str, Embedder]:
    folder = model_folder(model)
    assert folder is not None, f"{model} is not on this machine"
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def encode(texts: list[str]) -> list[list[int]]:
        return list(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])

    plain = Plain(encode, token_embeddings(folder))
    variants: dict[str, Embedder] = {
        "plain mean": plain,
        "+ vocabulary centred, unit tokens": (centred := replace(plain, common=plain.table.float().mean(0))),
        "+ weighted by rarity": (weighted := replace(centred, weighted=True)),
        "+ around the windows' mean": replace(weighted, around_mean=True),
        "+ lower case (TokenEmbedder)": TokenEmbedder(encode, plain.table, model),
    }
    return {f"{folder.name}: {name}": embedder for name, embedder in variants.items()}


def measure(conversations: list[Conversation], embedder: Embedder, settings: EpisodicSettings, seeds: int) -> dict:
    """Figures over all conversations, the mean and standard deviation of `found` over the seeds of k-means."""
    began = time.perf_counter()
    runs: list[list[RoutedQuestion]] = []
    for seed in range(seeds):
        cluster.SEED = 42 + seed
        router = EpisodeRouter(settings, embedder)
        runs.append([one for conversation in conversations for one in route_questions(conversation, router)])
    found = [routing_figures(run).found for run in runs]
    return {
        **asdict(routing_figures([one for run in runs for one in run])),
        "questions": len(runs[0]),
        "spread": float(np.std(found)),
        "seconds": (time.perf_counter() - began) / seeds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of LoCoMo files")
    parser.add_argument("--model", action="append", default=[], help="folder or name of a model on this machine")
    parser.add_argument("--sentence-transformers", action="append", default=[], metavar="NAME")
    parser.add_argument("--episodes", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="OUT")
    arguments = parser.parse_args()
    conversations = read_folder(arguments.data)
    variants: dict[str, Embedder] = {}
    for model in arguments.model:
        variants |= token_variants(model)
    for name in arguments.sentence_transformers:
        variants[name] = SentenceTransformerEmbedder(name)
    rows = []
    print("| embedder | routing | found | ± seeds | any | size (chance) | largest | found / size | s |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, embedder in variants.items():
        for routing in ("centroid", "window"):
            settings = EpisodicSettings(budget=4096, episodes=arguments.episodes, routing=routing)
            row = {"embedder": name, "routing": routing, **measure(conversations, embedder, settings, arguments.seeds)}
            rows.append(row)
            print(
                f"| {name} | {routing} | {row['found']:.3f} | {row['spread']:.3f} | {row['any_found']:.3f} | "
                f"{row['size']:.3f} | {row['largest']:.3f} | {row['found'] / row['size']:.2f} | {row['seconds']:.0f} |",
                flush=True,
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
