# SPDX-License-Identifier: Apache-2.0
"""The verbatim-quote probe: an unlikely sentence, filler, then its first words; is the rest repeated word for word?

Sentences are common words in random order, so a model can only copy them from its cache. The expected rest is fed
too (teacher forcing): the share of positions whose most likely token is the true one is the recall shown, the leading
run of them is exactly what greedy decoding would repeat before its first mistake.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vllm_kvcompress.errors import KVCompressError
from vllm_kvcompress.evaluation.prompts import Prompt
from vllm_kvcompress.evaluation.text import leading_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WORDS = (  # noqa: SIM905
    "amber anchor basket beaver bridge butter candle carpet castle copper cotton dragon engine falcon feather fiddle "
    "garden ginger hammer harbor hollow island jacket jungle kettle ladder lantern lemon marble meadow mirror monkey "
    "needle orange oyster paddle pepper pillow planet pocket puzzle rabbit ribbon rocket saddle salmon shadow silver "
    "spider spoon statue summer temple thunder ticket timber tunnel turtle velvet violin walnut window winter wizard"
).split()
_SENTENCE_WORDS = 24
_CUE_WORDS = 4
_INTRODUCTION = '\n\nRemember this sentence, word for word: "'
_QUESTION = '\n\nThe sentence to remember, word for word, was: "'


@dataclass(frozen=True)
class Probe:
    """One prompt of the probe."""

    prompt: Prompt
    point: int
    """Which point of the depth curve; sentences of one point differ in depth by a few tokens, as in length."""
    depth: int
    """Tokens between the end of the sentence and the first scored prediction."""


@dataclass(frozen=True)
class RecallFigures:
    """Recall at one depth, averaged over its sentences."""

    depth: int
    sentences: int
    reproduced: float
    """Share of the expected tokens greedy decoding repeats before its first mistake."""
    exact: float
    """Share of sentences repeated to the end."""
    forced: float
    """Share of the expected tokens that are most likely given the true ones before them."""
    loss: float
    """Mean negative log-likelihood of the expected tokens, nats."""


def sentence(rng: random.Random) -> tuple[str, str]:
    """(first words, rest) of an unlikely sentence."""
    words = rng.sample(_WORDS, _SENTENCE_WORDS)
    return " ".join(words[:_CUE_WORDS]), " " + " ".join(words[_CUE_WORDS:]) + '."'


def build_probes(
    tokenizer: PreTrainedTokenizerBase,
    filler: list[int],
    *,
    context: int,
    first_token: int,
    min_depth: int,
    depths: int,
    sentences: int,
    seed: int,
) -> list[Probe]:
    """Prompts of exactly `context` tokens with the sentence ever further from the question.

    Args:
        filler: at least `context` tokens of ordinary text.
        first_token: the sentence never begins before it (it must not lie in the sinks).
        min_depth: smallest distance, so that the sentence has left the recent window when it is asked for.
        depths: how many distances, evenly spaced from min_depth to as deep as the context allows.
        sentences: how many different sentences at each distance.

    Raises:
        KVCompressError: the context has no room between first_token and min_depth.
    """

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    rng = random.Random(seed)
    prefix = leading_tokens(tokenizer)
    introduction, question = encode(_INTRODUCTION), encode(_QUESTION)
    probes = []
    # The same sentences at every depth: only the distance differs between points of the curve.
    for cue, rest in ([encode(part) for part in sentence(rng)] for _ in range(sentences)):
        ask = len(question) + len(cue)
        told = len(introduction) + len(cue) + len(rest)
        max_depth = context - len(rest) - max(first_token, len(prefix)) - told
        if max_depth < min_depth:
            raise KVCompressError(
                f"--context {context} leaves no room for the recall probe: it needs at least "
                f"{context + min_depth - max_depth} tokens with these windows. Raise --context, or --recall-depths 0."
            )
        for point, depth in enumerate(np.linspace(min_depth, max_depth, depths).round().astype(int).tolist()):
            between = depth - ask
            before = context - len(prefix) - told - depth - len(rest)
            tokens = [
                *prefix,
                *filler[:before],
                *introduction,
                *cue,
                *rest,
                *filler[before : before + between],
                *question,
                *cue,
                *rest,
            ]
            assert len(tokens) == context, (len(tokens), context)
            start = context - len(rest) - 1
            probes.append(Probe(Prompt(tokens, start, context - 1), point, depth))
    return probes


def recall_figures(probes: list[Probe], logprob: list[np.ndarray], top1: list[np.ndarray]) -> list[RecallFigures]:
    """Figures by depth.

    Args:
        logprob, top1: one [T] array a probe, over its scored rows.
    """
    groups: dict[int, list[tuple[np.ndarray, float]]] = {}
    for probe, scores, guesses in zip(probes, logprob, top1, strict=True):
        prompt = probe.prompt
        right = np.asarray(guesses) == np.array(prompt.tokens[prompt.start + 1 : prompt.stop + 1])
        groups.setdefault(probe.point, []).append((right, -float(np.mean(scores))))
    figures = []
    for point, members in sorted(groups.items()):
        # Tokens before the first mistake: the cumulative product is 1 up to it and 0 after.
        runs = [float(np.cumprod(right).mean()) for right, _ in members]
        figures.append(
            RecallFigures(
                depth=round(float(np.mean([probe.depth for probe in probes if probe.point == point]))),
                sentences=len(members),
                reproduced=float(np.mean(runs)),
                exact=float(np.mean([right.all() for right, _ in members])),
                forced=float(np.mean([right.mean() for right, _ in members])),
                loss=float(np.mean([loss for _, loss in members])),
            )
        )
    return figures
