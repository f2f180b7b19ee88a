# SPDX-License-Identifier: Apache-2.0
"""Does a question reach the episode that holds its evidence?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vllm_kvcompress.episodic.router import EpisodeRouter
from vllm_kvcompress.evaluation.locomo import Conversation


@dataclass(frozen=True)
class RoutedQuestion:
    """How one question with evidence fared; all are shares, 0 to 1."""

    found: float
    """Of the windows with evidence, those in the episode the question was routed to."""
    size: float
    """Of all windows, those in that episode: what an episode of its size would hold of the evidence by chance."""
    largest: float
    """Of the windows with evidence, those in the largest episode."""


@dataclass(frozen=True)
class RoutingFigures:
    """Means over questions."""

    questions: int
    found: float
    any_found: float
    """Share of questions with at least one window of evidence in their episode."""
    size: float
    largest: float


def route_questions(conversation: Conversation, router: EpisodeRouter) -> list[RoutedQuestion]:
    """Route every question that names its evidence."""
    episodes = router.episodes(conversation.utterances)
    holders: dict[str, set[int]] = {}
    for index, window in enumerate(episodes.windows):
        for name in window.ids:
            holders.setdefault(name, set()).add(index)
    members = [set(episode.windows) for episode in episodes.episodes]
    largest = max(members, key=len)
    routed = []
    for question in conversation.questions:
        # An utterance without text is in no window.
        evidence = set().union(*(holders.get(name, set()) for name in question.evidence))
        if evidence:
            chosen = members[episodes.route(question.text).episode]
            routed.append(
                RoutedQuestion(
                    found=len(evidence & chosen) / len(evidence),
                    size=len(chosen) / len(episodes.windows),
                    largest=len(evidence & largest) / len(evidence),
                )
            )
    return routed


def routing_figures(routed: Sequence[RoutedQuestion]) -> RoutingFigures:
    """Means over at least one question."""
    return RoutingFigures(
        questions=len(routed),
        found=float(np.mean([one.found for one in routed])),
        any_found=float(np.mean([one.found > 0 for one in routed])),
        size=float(np.mean([one.size for one in routed])),
        largest=float(np.mean([one.largest for one in routed])),
    )
