# SPDX-License-Identifier: Apache-2.0
"""Must the guide prompt run at every block, or is capturing its queries once good enough? A Hugging Face reference.

    python benchmarks/epicache_guide_study.py MODEL --data LOCOMO_FOLDER --out OUT.json [--conversations 1,8,9]
        [--methods exact,layers --rotation FILE --alpha 1.1]

EpiCache (arXiv 2509.17396) runs the episode's guide prompt at the end of every block, to read the cache as it then is.
An engine would rather run it once. Compared on LoCoMo (one JSON file a conversation), a history of whole sessions each:

    exact        the guide runs at every block
    once         captured alone after the system prompt, queries turned to the current position by RoPE
    once-fixed   the same, left at the position of their capture
    first-block  captured after the first block of the history, turned
    layers       exact with budgets by layer (`policies.layer_budgets`), as the rotation file's sensitivities say
    epicache-keydiff (the guide at every block), snapkv, keydiff, h2o, streaming
    full: nothing evicted; none: no history at all

Windows of four utterances are clustered by the mean of their token embeddings (centred on the conversation). A history
is compacted for the one episode that holds the evidence of most questions, and those are asked: the episode is an
oracle's, so that routing adds no noise. Reported, with intervals paired with exact over questions:

    ln p      of the gold answer, per token
    read      share of the attention that question and answer pay to the history of the full cache, past the system
              prompt, which falls on kept tokens; mean over layers and heads
    evidence  share of the tokens of the turns that LoCoMo names as evidence which are kept
    Jaccard   overlap of the kept tokens with those of exact, past the system prompt
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.cluster import KMeans

from vllm_kvcompress.calibration.model import load, pick_device
from vllm_kvcompress.episodic.policies import POLICIES, attention_weights, layer_budgets
from vllm_kvcompress.evaluation.epicache_reference import (
    Cache,
    Guide,
    answer_logprobs,
    forward,
    guide_captured,
    guide_every_block,
    prefill,
)
from vllm_kvcompress.evaluation.metrics import block_bootstrap_mean
from vllm_kvcompress.rotations import find_rotation
from vllm_kvcompress.rotations.file import read_metadata

METHODS = (
    "exact", "once", "once-fixed", "first-block", "layers", "epicache-keydiff", "snapkv", "keydiff", "h2o", "streaming"
)  # fmt: skip
EPISODES, WINDOW, MEDOIDS, SEED = 4, 4, 2, 42
ADVERSARIAL = 5
"""LoCoMo's category of questions without an answer."""
SYSTEM = "You answer questions about a conversation between two friends."
INSTRUCTION = (
    "\n\nExtract what matters from this part of the conversation: who speaks, events with dates and times, personal "
    "details, plans, opinions, feelings and relationships."
)
ASK = "\n\nQuestion: {}\nAnswer with a short phrase from the conversation."
END = "<|im_end|>\n<|im_start|>assistant\n"


@dataclass
class Question:
    text: str
    answer: str
    windows: set[int]
    """Those that hold its evidence."""
    spans: list[tuple[int, int]]
    """Where the turns that are its evidence lie in the history, in characters."""


@dataclass
class Conversation:
    history: str
    windows: list[str]
    questions: list[Question]


def read(path: Path, tokenizer: Any, most_tokens: int) -> Conversation:
    """The first whole sessions of a LoCoMo file and the questions whose evidence lies in them."""
    data = json.loads(path.read_text())
    talk, history = data["conversation"], ""
    lines: list[str] = []
    place: dict[str, int] = {}
    spans: dict[str, tuple[int, int]] = {}
    for number in range(1, len(talk)):
        turns = talk.get(f"session_{number}")
        if not turns:
            continue
        said = [f'{turn["speaker"]} said, "{turn["text"]}"\n' for turn in turns]
        more = f"\nDATE: {talk[f'session_{number}_date_time']}\n" + "".join(said)
        if len(tokenizer(history + more)["input_ids"]) > most_tokens:
            break
        for turn, line in zip(turns, said, strict=True):
            begin = len(history) + more.index(line)
            spans[turn["dia_id"]] = begin, begin + len(line)
        history += more
        place |= {turn["dia_id"]: len(lines) + i for i, turn in enumerate(turns)}
        lines += said
    windows = ["".join(lines[i : i + WINDOW]) for i in range(0, len(lines), WINDOW)]
    questions = [
        Question(
            qa["question"],
            str(qa["answer"]),
            {place[turn] // WINDOW for turn in qa["evidence"]},
            [spans[turn] for turn in qa["evidence"]],
        )
        for qa in data["qa"]
        if qa["category"] != ADVERSARIAL and qa["evidence"] and all(turn in place for turn in qa["evidence"])
    ]
    return Conversation(history, windows, questions)


@dataclass
class Episode:
    guide: str
    questions: list[Question]
    routed: float
    """Share of all questions of the conversation that the nearest centroid sends to an episode of their evidence."""


def choose_episode(model: Any, tokenizer: Any, talk: Conversation) -> Episode:
    """Cluster the windows; the episode that holds all evidence of most questions."""

    def embed(texts: list[str]) -> np.ndarray:
        table = model.get_input_embeddings().weight.detach()
        return np.stack([table[tokenizer(text)["input_ids"]].float().mean(0).cpu().numpy() for text in texts])

    raw = embed(talk.windows)
    mean = raw.mean(0)

    def normalise(x: np.ndarray) -> np.ndarray:
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    points = normalise(raw - mean)
    labels = KMeans(EPISODES, n_init=10, random_state=SEED).fit(points).labels_
    centroids = normalise(np.stack([points[labels == e].mean(0) for e in range(EPISODES)]))
    nearest = (normalise(embed([q.text for q in talk.questions]) - mean) @ centroids.T).argmax(-1)
    homes = [{int(labels[w]) for w in q.windows} for q in talk.questions]
    asked = [[q for q, home in zip(talk.questions, homes, strict=True) if home == {e}] for e in range(EPISODES)]
    episode = max(range(EPISODES), key=lambda e: len(asked[e]))
    members = np.flatnonzero(labels == episode)
    medoids = sorted(members[np.argsort(-(points[members] @ centroids[episode]))[:MEDOIDS]])
    routed = float(np.mean([int(e) in home for e, home in zip(nearest, homes, strict=True)]))
    return Episode("".join(talk.windows[w] for w in medoids), asked[episode], routed)


def overlap(cache: Cache, exact: Cache, protected: int) -> float:
    """Jaccard index of the kept positions past the protected ones, mean over layers and heads."""
    found = []
    for index, layer in cache.layers.items():
        for mine, theirs in zip(layer.position.tolist(), exact.layers[index].position.tolist(), strict=True):
            a, b = set(mine[protected:]), set(theirs[protected:])
            found.append(len(a & b) / len(a | b))
    return float(np.mean(found))


def share_kept(cache: Cache, weight: dict[int, torch.Tensor]) -> float:
    """Share of a weight of tokens, [Hkv, length] a layer, that lies on kept ones: mean over layers and heads."""
    found = [
        (weight[index].gather(1, layer.position).sum(-1) / weight[index].sum(-1)).mean()
        for index, layer in cache.layers.items()
    ]
    return float(torch.stack(found).mean())


@dataclass
class Study:
    model: Any
    tokenizer: Any
    block: int
    shares: list[float]
    methods: list[str]
    sensitivity: list[float]
    """Of every layer; needed by the method layers only"""
    alpha: float

    def ids(self, text: str) -> torch.Tensor:
        return torch.tensor(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def asked(self, question: Question) -> tuple[torch.Tensor, torch.Tensor]:
        return self.ids(ASK.format(question.text) + END), self.ids(question.answer)

    def logprob(self, cache: Cache, questions: list[Question]) -> list[float]:
        """Mean ln p of the gold answer's tokens, one number a question."""
        return [float(answer_logprobs(self.model, cache, *self.asked(question)).mean()) for question in questions]

    def attention(self, full: Cache, question: Question, protected: int) -> dict[int, torch.Tensor]:
        """What question and answer pay to each token of the history: [Hkv, length] a layer."""
        ids = torch.cat(self.asked(question))[:-1]
        queries = forward(self.model, ids, full.branch())[1]
        paid = {}
        for index, layer in full.layers.items():
            weights = attention_weights(layer.key.transpose(0, 1), queries[index], scale=layer.scale).sum((1, 2))
            weights[:, :protected] = 0
            paid[index] = weights
        return paid

    def evidence(self, talk: Conversation, full: Cache, question: Question, protected: int) -> dict[int, torch.Tensor]:
        """1 for the tokens of its evidence, else 0: [Hkv, length] a layer."""
        offsets = self.tokenizer(talk.history, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        named = [any(first < end and begin < last for begin, end in question.spans) for first, last in offsets]
        weight = torch.cat([torch.zeros(protected), torch.tensor(named, dtype=torch.float32)])
        return {index: weight.expand(layer.key.shape[0], -1) for index, layer in full.layers.items()}

    def run(self, path: Path, most_tokens: int) -> dict[str, Any]:
        """All figures of one conversation."""
        model, block = self.model, self.block
        talk = read(path, self.tokenizer, most_tokens)
        episode = choose_episode(model, self.tokenizer, talk)
        system = self.ids(f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n")
        ids = torch.cat([system, self.ids(talk.history)])
        guide_ids = self.ids(INSTRUCTION + END + episode.guide)
        protected = len(system)
        print(
            f"{path.stem}: {len(ids)} tokens, guide {len(guide_ids)}, {len(episode.questions)} of "
            f"{len(talk.questions)} questions, routed right {episode.routed:.2f}",
            flush=True,
        )
        # Everything before the first eviction is common to all; H2O's scores, kept along, disturb no other policy.
        before = POLICIES["h2o" if "h2o" in self.methods else "streaming"]
        unlimited = [len(ids)] * model.config.num_hidden_layers
        states: dict[int, Cache] = {}
        state: Cache | None = None
        for part in ids.split(block):
            state = prefill(model, part, before, unlimited, block=block, cache=state)
            states[state.length] = state
        full = states[len(ids)]
        paid = [self.attention(full, question, protected) for question in episode.questions]
        evidence = [self.evidence(talk, full, question, protected) for question in episode.questions]
        start = Cache()
        forward(model, system, start)
        alone = forward(model, guide_ids, start.branch())[1]
        after_block = forward(model, guide_ids, states[block].branch())[1]
        guides: dict[str, Guide] = {
            "exact": guide_every_block(model, guide_ids),
            "once": guide_captured(model, alone, protected),
            "once-fixed": guide_captured(model, alone, protected, rephase=False),
            "first-block": guide_captured(model, after_block, block),
            "layers": guide_every_block(model, guide_ids),
            "epicache-keydiff": guide_every_block(model, guide_ids),
        }
        rows = [
            {"method": "full", "share": 1.0, "logprob": self.logprob(full, episode.questions)},
            {"method": "none", "share": 0.0, "logprob": self.logprob(start, episode.questions)},
        ]
        for share in self.shares:
            budget = int(len(ids) * share)
            exact: Cache | None = None
            for method in self.methods:
                budgets = [budget] * len(unlimited)
                if method == "layers":
                    budgets = layer_budgets(self.sensitivity, budget, self.alpha)
                # The last block end at which everything still fits.
                shared = min(budgets) // block * block
                started = time.process_time()
                cache = prefill(
                    model,
                    ids[shared:],
                    POLICIES[method if method in POLICIES else "epicache"],
                    budgets,
                    block=block,
                    protected=protected,
                    guide=guides.get(method),
                    cache=states.get(shared),
                )
                exact = cache if exact is None else exact
                row = {
                    "method": method,
                    "share": share,
                    "budget": budget,
                    "logprob": self.logprob(cache, episode.questions),
                    "read": [share_kept(cache, weight) for weight in paid],
                    "evidence": [share_kept(cache, weight) for weight in evidence],
                    "jaccard": overlap(cache, exact, protected),
                    "cpu_seconds": time.process_time() - started,
                }
                rows.append(row)
                print(
                    f"  {share:5.3f} {method:<16} ln p {np.mean(row['logprob']):.3f}  read {np.mean(row['read']):.3f}  "
                    f"evidence {np.mean(row['evidence']):.3f}  jaccard {row['jaccard']:.3f}  "
                    f"{row['cpu_seconds']:.0f} s, {time.process_time():.0f} s in all",
                    flush=True,
                )
        return {
            "conversation": path.stem,
            "tokens": len(ids),
            "guide_tokens": len(guide_ids),
            "questions": len(episode.questions),
            "all_questions": len(talk.questions),
            "routed": episode.routed,
            "rows": rows,
        }


def table(found: list[dict[str, Any]]) -> list[str]:
    """Markdown, questions of all conversations together. In brackets: minus exact, 95 % interval, paired."""
    by_key = [{(row["method"], row["share"]): row for row in talk["rows"]} for talk in found]

    def cell(method: str, share: float, figure: str, against: float | None) -> str:
        """Over the conversations that measured the figure of both this method and, if paired, exact."""
        wanted = (method, share)
        talks = [rows for rows in by_key if figure in rows.get(wanted, {})]
        if against is not None:
            talks = [rows for rows in talks if figure in rows.get(("exact", against), {})]
        if not talks:
            return ""
        mine = np.concatenate([np.atleast_1d(rows[wanted][figure]) for rows in talks])
        if against is None or method == "exact" or figure == "jaccard":
            return f"{mine.mean():.3f}"
        exact = np.concatenate([rows["exact", against][figure] for rows in talks])
        paired = block_bootstrap_mean([mine - exact], block=1, resamples=10000)
        return f"{mine.mean():.3f} ({paired.value:+.3f}: {paired.low:+.3f} to {paired.high:+.3f})"

    figures = ("logprob", "read", "evidence", "jaccard")
    lines = ["| budget | method | ln p per token | read | evidence | Jaccard |", "|---|---|---|---|---|---|"]
    for method, share in (("none", 0.0), ("full", 1.0)):
        lines.append(f"| {share:.0%} | {method} | {cell(method, share, 'logprob', None)} | | | |")
    for share in sorted({share for rows in by_key for _, share in rows} - {0.0, 1.0}):
        lines.append(f"| {share:.1%} | full | {cell('full', 1.0, 'logprob', share)} | | | |")
        for method in (m for m in METHODS if any((m, share) in rows for rows in by_key)):
            cells = " | ".join(cell(method, share, figure, share) for figure in figures)
            lines.append(f"| {share:.1%} | {method} | {cells} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="folder of LoCoMo's files Chat_<n>_*.json")
    parser.add_argument("--conversations", default="1,8,9")
    parser.add_argument("--tokens", type=int, default=5120, help="of a history, at most")
    parser.add_argument("--block", type=int, default=1024)
    parser.add_argument("--shares", default="0.125,0.25,0.5", help="budgets as shares of the history")
    parser.add_argument("--methods", default=",".join(m for m in METHODS if m != "layers"), help="exact first")
    parser.add_argument("--rotation", type=Path, help="of the method layers; default: where the engine finds it")
    parser.add_argument("--alpha", type=float, default=1.1, help="sharpness of its budgets")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = load(args.model, str(args.model), pick_device(args.device), "float32")
    sensitivity: list[float] = []
    if "layers" in args.methods.split(","):
        sensitivity = read_metadata(find_rotation(str(args.model), args.model, args.rotation)).sensitivity
    found: list[dict[str, Any]] = []
    for number in args.conversations.split(","):
        (path,) = args.data.glob(f"Chat_{number}_*.json")
        shares, methods = [float(share) for share in args.shares.split(",")], args.methods.split(",")
        study = Study(model, tokenizer, args.block, shares, methods, sensitivity, args.alpha)
        found.append(study.run(path, args.tokens))
        lines = table(found)
        args.out.write_text(json.dumps({"block": args.block, "conversations": found, "table": lines}, indent=1) + "\n")
        print("\n".join(lines), flush=True)


if __name__ == "__main__":
    main()
