# SPDX-License-Identifier: Apache-2.0
"""Rows of a step's table are told apart, whatever they still hold."""

import random
import secrets
import weakref
from types import SimpleNamespace

import pytest
import torch

from vllm_kvcompress import compat
from vllm_kvcompress.episodic.connector import NullRange
from vllm_kvcompress.episodic.worker import match_rows


def item(first, tail_index, tail):
    return NullRange("a request", 0, first, tail_index, tail, 2, 4, ())


def test_rows_of_one_episode_with_a_page_that_changed_hands():
    """Row 0 has lost page 9, which is the tail of row 1 now, in the same place; both begin with page 5."""
    table = torch.tensor([[5, 6, 0, 9, 8, 11], [5, 6, 0, 9, 0, 0], [7, 6, 0, 9, 0, 0]], dtype=torch.int32)
    lost, gained = item(5, 5, 11), item(5, 3, 9)
    for ranges in ([lost, gained], [gained, lost]):
        assert sorted(match_rows(table, ranges), key=lambda pair: pair[1]) == [(lost, 0), (gained, 1)]


@pytest.mark.parametrize("row", [[5, 6, 8], [4, 6, 9]])
def test_a_row_that_is_not_there(row):
    with pytest.raises(RuntimeError, match=r"page 9 is the tail of (no|0) request"):
        match_rows(torch.tensor([row], dtype=torch.int32), [item(5, 2, 9)])


def test_two_rows_that_cannot_be_told_apart():
    with pytest.raises(RuntimeError, match="page 9 is the tail of 2 requests"):
        match_rows(torch.tensor([[5, 6, 9], [5, 6, 9]], dtype=torch.int32), [item(5, 2, 9)])


def test_any_order_of_many_rows():
    rng = random.Random(seed := secrets.randbits(32))
    print("seed", seed)
    rows, width = 20, 12
    table = torch.full((rows, width), 99, dtype=torch.int32)
    table[:, 0] = torch.tensor([rng.randrange(3) for _ in range(rows)])  # three episodes
    ranges = []
    for row in range(rows):
        last = rng.randrange(4, width)
        table[row, last] = 100 + row
        ranges.append(item(int(table[row, 0]), last, 100 + row))
    # Pages that were evicted from one row and are the tail of another, which begins alike or not; never in a circle.
    for row in range(rows - 1):
        later = rng.randrange(row + 1, rows)
        if ranges[later].tail_index != ranges[row].tail_index:
            table[row, ranges[later].tail_index] = 100 + later
    expected = {found.tail: row for row, found in enumerate(ranges)}
    rng.shuffle(ranges)
    assert {found.tail: row for found, row in match_rows(table, ranges)} == expected


def test_the_model_is_the_one_whose_layers_these_are(monkeypatch):
    """Whatever has become of the configuration since: of two engines in a process each finds its own."""
    models = [torch.nn.Sequential(torch.nn.Linear(1, 1), torch.nn.ReLU()) for _ in range(3)]
    monkeypatch.setattr(compat, "_models", [weakref.ref(model) for model in models])

    def config(model):
        return SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context={"layer": model[1]}))

    assert [compat.loaded_model(config(model)) for model in models] == models
    gone = models.pop()
    layers = config(gone)
    del gone
    with pytest.raises(RuntimeError, match="not loaded by"):
        compat.loaded_model(layers)
