# SPDX-License-Identifier: Apache-2.0
"""Which numbers belong to which context."""

import argparse

import pytest

from vllm_kvcompress.errors import KVCompressError
from vllm_kvcompress.evaluation import command
from vllm_kvcompress.evaluation.plan import Plan, Sizes, pair_sizes
from vllm_kvcompress.evaluation.prompts import Prompt
from vllm_kvcompress.evaluation.recall import Probe


def test_lists_follow_their_context_and_one_number_serves_all():
    sizes = pair_sizes([8192, 2048, 32768], chunks=[4, 8, 2], recall_depths=[5], recall_sentences=[3, 2, 1])
    assert sizes == [
        Sizes(context=2048, chunks=8, recall_depths=5, recall_sentences=2),
        Sizes(context=8192, chunks=4, recall_depths=5, recall_sentences=3),
        Sizes(context=32768, chunks=2, recall_depths=5, recall_sentences=1),
    ]
    one = pair_sizes([64], chunks=[1], recall_depths=[0], recall_sentences=[3])
    assert one == [Sizes(context=64, chunks=1, recall_depths=0, recall_sentences=3)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"contexts": [64, 128, 64]}, "--context names 64 more than once"),
        ({"chunks": [1, 2]}, "--chunks has 2 numbers for the 3 of --context"),
        ({"recall_depths": [1, 2, 3, 4]}, "--recall-depths has 4 numbers for the 3 of --context"),
        ({"contexts": [64], "recall_sentences": [1, 2]}, "--recall-sentences has 2 numbers for the 1 of --context"),
    ],
)
def test_refusals(changes, message):
    arguments = {"contexts": [64, 128, 256], "chunks": [1], "recall_depths": [1], "recall_sentences": [1]} | changes
    with pytest.raises(KVCompressError, match=message):
        pair_sizes(arguments.pop("contexts"), **arguments)


def test_text_is_fed_before_probes():
    text = [Prompt([1, 2, 3], 0, 2), Prompt([4, 5, 6], 0, 2)]
    probe = Probe(Prompt([7, 8, 9], 1, 2), 0, 1)
    assert Plan(3, text, [probe]).prompts == [*text, probe.prompt]


def parsed(*arguments):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(["MODEL", "--data", "FILE", *arguments])


def test_runs_of_different_formats_compare_past_the_same_windows():
    def tokenizer(text, **_):
        return {"input_ids": [ord(letter) for letter in text]}

    args = parsed("--past-windows", "128,1024")
    command._check_numbers(args)
    plan = command._plan(Sizes(2048, 1, 0, 1), "a" * 5000, tokenizer, [(64, 256), tuple(args.past_windows)], args)
    assert [prompt.start for prompt in plan.text] == [1152]
    with pytest.raises(KVCompressError, match="--past-windows takes two numbers"):
        command._check_numbers(parsed("--past-windows", "128"))
    with pytest.raises(KVCompressError, match="--past-windows must be at least 0, got -1"):
        command._check_numbers(parsed("--past-windows", "0,-1"))
