# SPDX-License-Identifier: Apache-2.0
"""Routing figures by hand."""

import numpy as np
import pytest

from vllm_kvcompress.episodic.router import EpisodeRouter
from vllm_kvcompress.episodic.segment import Utterance
from vllm_kvcompress.episodic.settings import EpisodicSettings
from vllm_kvcompress.evaluation.locomo import Category, Conversation, Question, Session
from vllm_kvcompress.evaluation.routing import RoutedQuestion, route_questions, routing_figures


class Axes:
    """A text's vector has a 1 for each of the letters x, y, z in it."""

    identity = "axes"

    def fitted(self, texts):
        return self

    def embed(self, texts):
        rows = np.array([[letter in text for letter in "xyz"] for text in texts], np.float32).reshape(-1, 3)
        return rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1)


def test_routed_by_hand():
    # Eight windows of one utterance: a member of the series for growth 2, so all are clustered.
    said = ["x", "y", "x", "z", "x", "", "x", "y", "x"]
    turns = tuple(Utterance("A", text, f"D1:{number}") for number, text in enumerate(said, 1))
    asked = [
        ("x", ("D1:1", "D1:3")),  # found, in the largest episode
        ("x", ("D1:1", "D1:4")),  # one of two found
        ("y", ("D1:9",)),  # not found, in the largest
        ("z", ("D1:4", "D1:6")),  # D1:6 has no text and counts for nothing
        ("z", ("D1:6",)),  # not counted
        ("z", ()),  # not counted
    ]
    questions = tuple(Question(text, "?", evidence, Category.SINGLE_HOP) for text, evidence in asked)
    talk = Conversation("talk", ("A", "B"), (Session(1, "today", turns),), questions)
    settings = EpisodicSettings(budget=4096, window_utterances=1, episodes=3, growth=2)
    routed = route_questions(talk, EpisodeRouter(settings, Axes()))
    assert routed == [
        RoutedQuestion(1, 5 / 8, 1),
        RoutedQuestion(0.5, 5 / 8, 0.5),
        RoutedQuestion(0, 2 / 8, 1),
        RoutedQuestion(1, 1 / 8, 0),
    ]
    figures = routing_figures(routed)
    assert (figures.questions, figures.any_found) == (4, 0.75)
    assert (figures.found, figures.size, figures.largest) == pytest.approx((2.5 / 4, 13 / 32, 2.5 / 4))
