# SPDX-License-Identifier: Apache-2.0
"""Figures of answers under eviction: likelihood of the gold answer and F1, with intervals paired by question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from vllm_kvcompress.evaluation.metrics import Estimate, block_bootstrap_mean

BASELINE = "epicache"
"""The policy that others are compared with, at the same budget."""


@dataclass(frozen=True)
class Setup:
    """What is kept of a history."""

    policy: str | None = None
    """None: everything"""
    share: float | None = None
    """The budget, as a share of the history's tokens"""

    @property
    def label(self) -> str:
        return "full" if self.policy is None else f"{self.policy} {self.share:.4g}"

    def budget(self, history: int, page: int) -> int:
        """Tokens, in whole pages, of a history of so many."""
        assert self.share is not None
        return -(-int(np.ceil(self.share * history)) // page) * page


FULL = Setup()


@dataclass(frozen=True)
class Outcome:
    """Of one setup, one entry a question."""

    logprob: list[np.ndarray]
    """[T] ln p of the gold answer's tokens"""
    f1: list[float]
    answers: list[str]
    seconds: list[float]
    """Of scoring and answering together"""


@dataclass(frozen=True)
class SetupFigures:
    """Of one setup over all questions; differences are paired by question, this setup's minus the other's."""

    likelihood: Estimate
    """Mean ln p a token of the gold answers, nats"""
    likelihood_to_full: Estimate
    likelihood_to_baseline: Estimate | None
    """None for the baseline itself, for the full cache and where the baseline did not run"""
    f1: Estimate
    f1_to_full: Estimate
    f1_to_baseline: Estimate | None
    seconds: float
    """Mean of a question"""


def setup_figures(outcomes: Mapping[Setup, Outcome], setup: Setup, seed: int = 0) -> SetupFigures:
    """Figures of one setup of one format.

    Questions are resampled whole: an answer's tokens stand and fall together. Questions about one conversation share
    its history, which these intervals do not account for.

    Args:
        outcomes: of all setups of the format, `FULL` among them.
    """
    mine, full = outcomes[setup], outcomes[FULL]
    baseline = outcomes.get(Setup(BASELINE, setup.share)) if setup.policy not in (None, BASELINE) else None

    def mean(values: Sequence[np.ndarray]) -> Estimate:
        return block_bootstrap_mean(list(values), block=max(map(len, values)), seed=seed)

    def likelihood(other: Outcome) -> Estimate:
        return mean([a - b for a, b in zip(mine.logprob, other.logprob, strict=True)])

    def f1(other: Outcome) -> Estimate:
        return mean([np.array([a - b]) for a, b in zip(mine.f1, other.f1, strict=True)])

    return SetupFigures(
        likelihood=mean(mine.logprob),
        likelihood_to_full=likelihood(full),
        likelihood_to_baseline=None if baseline is None else likelihood(baseline),
        f1=mean([np.array([value]) for value in mine.f1]),
        f1_to_full=f1(full),
        f1_to_baseline=None if baseline is None else f1(baseline),
        seconds=float(np.mean(mine.seconds)),
    )
