# SPDX-License-Identifier: Apache-2.0
"""Rows of a step's table are told apart, whatever they still hold; layers are scored together."""

import random
import secrets
import weakref
from types import SimpleNamespace

import pytest
import torch

from vllm_kvcompress import compat
from vllm_kvcompress.attention.pages import PageSpec
from vllm_kvcompress.episodic import worker as worker_module
from vllm_kvcompress.episodic.connector import NullRange
from vllm_kvcompress.episodic.worker import EvictionWorker, match_rows


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


@pytest.mark.parametrize("at_once", [1, 2, 8])
def test_layers_wait_to_be_scored_together(at_once, monkeypatch):
    """Within the bound on queries, in whatever order the layers run; each gets its own queries and scores so far."""
    names = [f"layer {number}" for number in range(5)]
    layers = {name: SimpleNamespace(number=number) for number, name in enumerate(names)}
    compilation = SimpleNamespace(static_forward_context=layers)
    config = SimpleNamespace(compilation_config=compilation, device_config=SimpleNamespace(device=torch.device("cpu")))
    spec = PageSpec(block_size=128, num_kv_heads=1, head_size=64, dtype=torch.float16)
    groups = [SimpleNamespace(kv_cache_spec=spec, layer_names=part) for part in (names[:3], names[3:])]
    worker = EvictionWorker(config, SimpleNamespace(kv_cache_groups=groups))
    order = SimpleNamespace(num_tokens=100, nulls={0: (0, 0), 1: (0, 0)})
    queries = torch.zeros(4, 1, 64)
    monkeypatch.setattr(worker_module, "_QUERY_BYTES", at_once * queries.nbytes)
    asked = []

    def run(order, tokens, position, run_layers, listen):
        assert run_layers == names
        for number in torch.randperm(5).tolist():
            queries.fill_(number)  # as activations are written over
            listen(names[number], queries)

    def score(layers, table, num_slots, policy, heard, previous):
        numbers = [layer.number for layer in layers]
        asked.append(numbers)
        assert [set(one.flatten().tolist()) for one in heard] == [{number} for number in numbers]
        assert previous.flatten().tolist() == numbers and num_slots == 100
        return torch.tensor(numbers).view(-1, 1, 1) + 10

    monkeypatch.setattr(worker, "_run", run)
    monkeypatch.setattr(worker, "_score_layers", score)
    previous = {0: torch.tensor([0, 1, 2]).view(-1, 1, 1), 1: torch.tensor([3, 4]).view(-1, 1, 1)}
    found = worker._score_by_pass(order, None, [1, 2, 3, 4], 100, {0: None, 1: None}, previous)
    assert {group: scores.flatten().tolist() for group, scores in found.items()} == {0: [10, 11, 12], 1: [13, 14]}
    expected = {1: [[0], [1], [2], [3], [4]], 2: [[0, 1], [2], [3, 4]], 8: [[0, 1, 2], [3, 4]]}
    assert sorted(asked) == expected[at_once]
