# SPDX-License-Identifier: Apache-2.0
"""What can be set, and how bad values are refused."""

import pytest
from pydantic import ValidationError

from vllm_kvcompress.episodic.settings import EpisodicSettings


def test_defaults():
    settings = EpisodicSettings(budget=4096)
    assert (settings.block_tokens, settings.episodes, settings.window_utterances, settings.medoids) == (2048, 4, 4, 4)
    assert (settings.embedder, settings.policy) == ("tokens", "epicache-keydiff")
    assert settings.threshold == 4096 + 2048
    assert EpisodicSettings(budget=4096, threshold_tokens=5000).threshold == 5000


def test_sizes_are_read_as_kvcompress_plan_reads_them():
    for given, expected in ((0, 0), (12345, 12345), ("4GiB", 4 << 30), ("500MB", 500 * 10**6)):
        assert EpisodicSettings(budget=4096, host_memory=given).host_memory == expected


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({}, "budget\n  Field required"),
        ({"budget": 511}, "greater than or equal to 512"),
        ({"budget": 4096, "block_tokens": 1000}, "multiple of 128"),
        ({"budget": 4096, "episodes": 0}, "greater than or equal to 1"),
        (
            {"budget": 4096, "policy": "lru"},
            "'epicache', 'epicache-keydiff', 'streaming', 'snapkv', 'h2o' or 'keydiff'",
        ),
        ({"budget": 4096, "growth": 1}, "greater than or equal to 1.1"),
        ({"budget": 4096, "threshold_tokens": 1024}, "threshold_tokens=1024 is below budget=4096.*Raise"),
        ({"budget": 4096, "host_memory": -1}, "greater than or equal to 0"),
        ({"budget": 4096, "host_memory": "4 gigs"}, "not a size: '4 gigs'; write bytes, or 80GiB"),
        ({"budget": 4096, "layer_budgets": "sensitivity", "alpha": -1}, "greater than or equal to 0"),
        ({"budget": 4096, "alpha": 1.5}, 'alpha=1.5 is of no use to uniform budgets: add "layer_budgets"'),
        ({"budget": 4096, "bugdet": 1}, "Extra inputs are not permitted"),
    ],
)
def test_bad_values_are_refused(given, problem):
    with pytest.raises(ValidationError, match=problem):
        EpisodicSettings.model_validate(given)


def test_identities_cover_every_setting_that_matters():
    """A new setting must be sorted into one of them, or be known to change neither episodes nor pages."""
    harmless = {"threshold_tokens", "routing", "host_memory"}
    others = {"embedder": "x", "policy": "snapkv", "routing": "centroid", "growth": 3, "block_tokens": 1024}
    others |= {"layer_budgets": "uniform", "alpha": 1.2}
    given = {"budget": 4096, "layer_budgets": "sensitivity"}
    base = EpisodicSettings.model_validate(given)
    for name in EpisodicSettings.model_fields:
        value = others[name] if name in others else (getattr(base, name) or 4096) + 1
        changed = EpisodicSettings.model_validate({**given, name: value})
        same = (
            changed.clustering_identity() == base.clustering_identity(),
            changed.page_identity() == base.page_identity(),
        )
        assert sum(same) == (2 if name in harmless else 1), name
