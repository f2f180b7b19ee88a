# SPDX-License-Identifier: Apache-2.0
"""Figures against float64 written out by hand, on random distributions drawn anew in every run."""

import math
import secrets

import numpy as np
import pytest
import torch

from vllm_kvcompress.evaluation.metrics import block_bootstrap_mean, score_rows, text_figures


@pytest.fixture
def generator():
    seed = secrets.randbits(32)
    print(f"seed {seed}")  # shown by pytest when the test fails
    return torch.Generator().manual_seed(seed)


def softmax64(row):
    shifted = [value - max(row) for value in row]
    total = math.fsum(math.exp(value) for value in shifted)
    return [math.exp(value) / total for value in shifted]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_match_float64(generator, dtype):
    logits = (torch.randn(7, 53, generator=generator) * 6).to(dtype)
    reference = (torch.randn(7, 53, generator=generator) * 6).to(dtype)
    targets = torch.randint(53, (7,), generator=generator)
    rows = score_rows(logits, targets, reference)
    for index in range(7):
        p = softmax64(reference[index].double().tolist())
        q = softmax64(logits[index].double().tolist())
        kl = math.fsum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))
        # float32 sums of 53 terms of size <= ~50: far below the figures reported to 1e-4.
        assert rows.kl[index].item() == pytest.approx(kl, rel=1e-4, abs=1e-5)
        assert rows.logprob[index].item() == pytest.approx(math.log(q[targets[index]]), rel=1e-5, abs=1e-5)
        assert rows.top1[index] == max(range(53), key=q.__getitem__)
        assert bool(rows.agree[index]) == (max(range(53), key=p.__getitem__) == max(range(53), key=q.__getitem__))


def test_kl_of_equal_distributions_is_zero(generator):
    logits = torch.randn(5, 1000, generator=generator) * 10
    rows = score_rows(logits + 3.0, torch.zeros(5, dtype=torch.int64), logits)
    assert rows.kl.abs().max() < 1e-5
    assert rows.agree.all()


def test_token_ruled_out_by_the_reference_adds_nothing():
    reference = torch.tensor([[0.0, 0.0, -torch.inf]])
    rows = score_rows(torch.zeros(1, 3), torch.tensor([0]), reference)
    assert rows.kl.item() == pytest.approx(math.log(3 / 2), abs=1e-6)


def test_reference_rows_have_no_comparison():
    rows = score_rows(torch.zeros(2, 4), torch.tensor([1, 2]))
    assert rows.kl is None
    assert rows.agree is None
    assert rows.logprob.tolist() == pytest.approx([-math.log(4)] * 2)


def test_perplexity_ratio_kl_and_agreement_by_hand():
    rng = np.random.default_rng(secrets.randbits(32))
    mine = [-rng.exponential(3, size) for size in (200, 131)]
    theirs = [-rng.exponential(3, size) for size in (200, 131)]
    kl = [rng.exponential(0.05, size) for size in (200, 131)]
    agree = [rng.random(size) < 0.9 for size in (200, 131)]
    figures = text_figures(mine, theirs, kl, agree)

    def mean(parts):
        flat = [float(value) for part in parts for value in part]
        return math.fsum(flat) / len(flat)

    assert figures.positions == 331
    assert figures.perplexity.value == pytest.approx(math.exp(-mean(mine)))
    assert figures.ratio.value == pytest.approx(math.exp(mean(theirs) - mean(mine)))
    assert figures.kl.value == pytest.approx(mean(kl))
    assert figures.top1.value == pytest.approx(mean(agree))
    for estimate in (figures.perplexity, figures.ratio, figures.kl, figures.top1):
        assert estimate.low <= estimate.value <= estimate.high


def test_the_reference_against_itself_is_exact():
    logprob = [-np.random.default_rng(1).exponential(3, 100)]
    figures = text_figures(logprob, logprob, None, None)
    assert (figures.ratio.value, figures.ratio.low, figures.ratio.high) == (1, 1, 1)
    assert (figures.kl.value, figures.kl.high) == (0, 0)
    assert figures.top1.low == 1


def test_interval_covers_the_mean_and_widens_with_dependence():
    """Of many samples with known mean, about 95 % of intervals hold it; repeated values do not narrow the interval."""
    rng = np.random.default_rng(secrets.randbits(32))
    held = 0
    for trial in range(200):
        # 60 independent values, each 64 times over: only blocks of 64 see that there are just 60 of them.
        values = np.repeat(rng.normal(2.0, 1.0, 60), 64)
        estimate = block_bootstrap_mean([values], resamples=400, seed=trial)
        held += estimate.low <= 2.0 <= estimate.high
    # Binomial(200, ~0.94): below 170 or so is < 1e-6 likely; single positions as blocks would give about 40.
    assert 168 <= held <= 200


def test_blocks_never_span_chunks():
    estimate = block_bootstrap_mean([np.zeros(10), np.ones(10)], block=64, resamples=500)
    # Two blocks: every resampled mean is 0, 0.5 or 1.
    assert (estimate.low, estimate.value, estimate.high) == (0, 0.5, 1)
