# SPDX-License-Identifier: Apache-2.0
"""A vocabulary of whole words with random embeddings, and talks about topics that share no words."""

import random
import secrets

import pytest
import torch

from vllm_kvcompress.episodic.embed import TokenEmbedder
from vllm_kvcompress.episodic.segment import Utterance

_LINES = """\
garden: tomato seedling compost trellis watering greenhouse pruning harvest soil basil
music: violin rehearsal sonata orchestra tempo melody concert cello encore chord
travel: passport ferry hostel luggage itinerary mountain harbour ticket border train
work: invoice meeting deadline manager contract spreadsheet salary interview office client
common: the and so then we you it was really nice i think that with a of to in"""
TOPICS = {topic: words.split() for topic, words in (line.split(": ") for line in _LINES.splitlines())}
COMMON = TOPICS.pop("common")


class Words:
    """Token ids of whole words, by table; unknown words are one token of their own."""

    def __init__(self):
        words = ["<unknown>", "ann:", "bob:", "user:", "assistant:", *COMMON]
        words += [word for topic in TOPICS.values() for word in topic]
        self.ids = {word: index for index, word in enumerate(words)}

    def __call__(self, texts):
        return [[self.ids.get(word, 0) for word in text.split()] for text in texts]


@pytest.fixture
def rng():
    seed = secrets.randbits(32)
    print(f"seed {seed}")  # shown by pytest when the test fails
    return random.Random(seed)


@pytest.fixture
def words():
    return Words()


@pytest.fixture
def embedder(rng, words):
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    # A large common component, as real input embeddings have.
    table = torch.randn(len(words.ids), 48, generator=generator) + 3 * torch.randn(48, generator=generator)
    return TokenEmbedder(words, table, "toy")


def say(rng, topic):
    """A sentence of common words and words of the topic."""
    chosen = rng.choices(TOPICS[topic], k=5) + rng.choices(COMMON, k=4)
    rng.shuffle(chosen)
    return " ".join(chosen)


def talk(rng, turns, per_topic=4):
    """Utterances of two speakers who stay with a topic for `per_topic` turns."""
    topics = list(TOPICS)
    return [
        Utterance("Ann" if index % 2 else "Bob", say(rng, topics[index // per_topic % len(topics)]), f"u{index}")
        for index in range(turns)
    ]
