# SPDX-License-Identifier: Apache-2.0
"""The recall probe's prompts and scores."""

import re

import numpy as np
import pytest

from vllm_kvcompress.errors import KVCompressError
from vllm_kvcompress.evaluation.prompts import Prompt
from vllm_kvcompress.evaluation.recall import _CUE_WORDS, _SENTENCE_WORDS, Probe, build_probes, recall_figures


class SpacedWords:
    """A tokenizer with one token a word, numbered as they come; quotes and punctuation stick to their word."""

    def __init__(self):
        self.numbers = {}

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [self.numbers.setdefault(word, len(self.numbers) + 1000) for word in text.split()]}


def build(**changes):
    arguments = {
        "context": 400,
        "first_token": 32,
        "min_depth": 100,
        "depths": 3,
        "sentences": 2,
        "seed": 7,
    } | changes
    return build_probes(SpacedWords(), list(range(400)), **arguments)


def test_prompts_hold_the_sentence_twice_at_the_stated_distance():
    probes = build()
    assert len(probes) == 6
    rest = _SENTENCE_WORDS - _CUE_WORDS
    for probe in probes:
        tokens, start = probe.prompt.tokens, probe.prompt.start
        assert len(tokens) == 400
        assert probe.prompt.stop - start == rest
        asked = tokens[start + 1 : probe.prompt.stop + 1]
        told_end = start + 1 - probe.depth
        assert tokens[told_end - rest : told_end] == asked
        cue = tokens[start + 1 - _CUE_WORDS : start + 1]
        assert tokens[told_end - rest - _CUE_WORDS : told_end - rest] == cue
    depths = [probe.depth for probe in probes[:3]]
    assert depths[0] == 100
    assert depths == sorted(depths)
    # The deepest sentence begins right behind the sinks and its introduction.
    introduction = SpacedWords()('\n\nRemember this sentence, word for word: "')["input_ids"]
    deepest = probes[2]
    told_start = deepest.prompt.start + 1 - deepest.depth - rest - _CUE_WORDS - len(introduction)
    assert told_start == 32


def test_prompts_follow_the_seed():
    assert [p.prompt.tokens for p in build()] == [p.prompt.tokens for p in build()]
    first, second = build(depths=1)
    assert first.prompt.tokens != second.prompt.tokens


def test_too_short_a_context_is_refused_with_what_it_needs():
    with pytest.raises(KVCompressError, match=r"needs at least (\d+) tokens") as refusal:
        build(context=150)
    needed = int(re.search(r"at least (\d+)", str(refusal.value))[1])
    build(context=needed, depths=1)
    with pytest.raises(KVCompressError):
        build(context=needed - 1, depths=1)


def test_scores_by_hand():
    prompt = Prompt([9, 1, 2, 3, 4], 0, 4)
    probes = [Probe(prompt, 0, 10), Probe(prompt, 0, 12), Probe(prompt, 1, 50)]
    top1 = [np.array([1, 2, 3, 4]), np.array([1, 0, 3, 4]), np.array([0, 2, 3, 4])]
    logprob = [np.full(4, -0.5), np.full(4, -1.5), np.full(4, -4.0)]
    near, far = recall_figures(probes, logprob, top1)
    assert (near.depth, near.sentences, near.exact, near.loss) == (11, 2, 0.5, 1.0)
    assert near.reproduced == pytest.approx((1 + 0.25) / 2)
    assert near.forced == pytest.approx((1 + 0.75) / 2)
    assert (far.depth, far.reproduced, far.exact, far.forced, far.loss) == (50, 0, 0, 0.75, 4.0)
