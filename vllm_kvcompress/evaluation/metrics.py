# SPDX-License-Identifier: Apache-2.0
"""Figures from logits, and their intervals. Arrays of two formats are paired: the same tokens at the same positions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Rows:
    """What is kept of each scored position."""

    logprob: torch.Tensor
    """[T] float32: ln p(next token)"""
    top1: torch.Tensor
    """[T] int64: most likely token"""
    kl: torch.Tensor | None = None
    """[T] float32: KL(reference || this), nats; None for the reference itself"""
    agree: torch.Tensor | None = None
    """[T] bool: same most likely token as the reference"""


def score_rows(logits: torch.Tensor, targets: torch.Tensor, reference_logits: torch.Tensor | None = None) -> Rows:
    """Reduce logits to one number a position and figure.

    Args:
        logits: [T, V] float; targets: [T] int64, the token that follows; reference_logits: [T, V] float or None.
    """
    log_p = logits.float().log_softmax(-1)
    logprob = log_p.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    top1 = logits.argmax(-1)
    if reference_logits is None:
        return Rows(logprob, top1)
    log_ref = reference_logits.float().log_softmax(-1)
    # A token the reference rules out (-inf) adds nothing: 0 * anything is 0, not NaN.
    difference = torch.where(log_ref > -torch.inf, log_ref - log_p, 0.0)
    kl = (log_ref.exp() * difference).sum(-1)
    return Rows(logprob, top1, kl, top1 == reference_logits.argmax(-1))


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float


def block_bootstrap_mean(
    chunks: list[np.ndarray],
    *,
    block: int = 64,
    resamples: int = 2000,
    seed: int = 0,
    transform: Callable[[np.ndarray], np.ndarray] = lambda mean: mean,
) -> Estimate:
    """Mean over all positions with a 95 % percentile interval from resampled blocks of consecutive positions.

    Neighbouring positions share history, so single positions are not independent and would give too narrow an interval.
    The same seed and shapes draw the same blocks, which keeps figures of different formats paired.

    Args:
        chunks: one [T_i] float array a text chunk; blocks never span two chunks.
        block: positions a block.
        transform: applied to the mean, e.g. exp.
    """
    sums, counts = [], []
    for values in chunks:
        for start in range(0, len(values), block):
            part = np.asarray(values[start : start + block], dtype=np.float64)
            sums.append(part.sum())
            counts.append(len(part))
    total, count = np.array(sums), np.array(counts, dtype=np.float64)
    drawn = np.random.default_rng(seed).integers(len(total), size=(resamples, len(total)))
    means = total[drawn].sum(1) / count[drawn].sum(1)
    low, high = transform(np.quantile(means, [0.025, 0.975]))
    value = transform(np.array([total.sum() / count.sum()]))[0]
    return Estimate(float(value), float(low), float(high))


@dataclass(frozen=True)
class TextFigures:
    """Quality over the scored positions of all text chunks."""

    positions: int
    perplexity: Estimate
    ratio: Estimate
    """Perplexity over the reference's, paired."""
    kl: Estimate
    """KL(reference || format), nats."""
    top1: Estimate
    """Share of positions with the reference's most likely token."""


def text_figures(
    logprob: list[np.ndarray],
    reference_logprob: list[np.ndarray],
    kl: list[np.ndarray] | None,
    agree: list[np.ndarray] | None,
    seed: int = 0,
) -> TextFigures:
    """Figures of one format from one [T] array a chunk; kl and agree are None for the reference."""
    zeros = [np.zeros(len(values)) for values in logprob]
    loss = [-np.asarray(values, dtype=np.float64) for values in logprob]
    extra = [mine + np.asarray(theirs, dtype=np.float64) for mine, theirs in zip(loss, reference_logprob, strict=True)]
    return TextFigures(
        positions=sum(len(values) for values in logprob),
        perplexity=block_bootstrap_mean(loss, transform=np.exp, seed=seed),
        ratio=block_bootstrap_mean(extra, transform=np.exp, seed=seed),
        kl=block_bootstrap_mean(zeros if kl is None else kl, seed=seed),
        top1=block_bootstrap_mean([values + 1 for values in zeros] if agree is None else agree, seed=seed),
    )
