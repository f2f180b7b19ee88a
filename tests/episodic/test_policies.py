# SPDX-License-Identifier: Apache-2.0
"""Scores against a loop in float64, selection and budgets by their properties, on fresh random input."""

import itertools
import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_kvcompress.episodic import policies
from vllm_kvcompress.episodic.policies import POLICIES, Layer

SHAPES = [(40, 2, 6, 16, 9), (300, 1, 4, 64, 280), (70, 3, 3, 32, 70), (1, 2, 2, 64, 1), (100, 2, 8, 64, 64)]
"""T, Hkv, Hq, D, Q; more than one part of queries in the second."""


@pytest.fixture(autouse=True)
def fresh_seed():
    torch.manual_seed(torch.seed() % 2**31)


def random_layer(slots: int, heads: int, query_heads: int, dim: int, count: int, **kwargs: object) -> Layer:
    # Twice as long as normal: attention that is far from uniform.
    return Layer(torch.randn(slots, heads, dim) * 2, torch.randn(count, query_heads, dim) * 2, **kwargs)


def weights(layer: Layer, head: int, query_head: int, query: int, seen: int) -> torch.Tensor:
    """[T] float64 attention of one query, zero past the first `seen` slots."""
    assert layer.queries is not None
    scale = layer.scale or 1 / math.sqrt(layer.keys.shape[-1])
    scores = layer.keys[:seen, head].double() @ layer.queries[query, query_head].double() * scale
    found = torch.zeros(len(layer.keys), dtype=torch.float64)
    found[:seen] = (scores - scores.max()).exp() / (scores - scores.max()).exp().sum()
    return found


def all_weights(layer: Layer, last: int | None = None, causal: bool = False) -> torch.Tensor:
    """[Hkv, G, Q, T] float64, of the last queries."""
    assert layer.queries is not None
    slots, heads, _ = layer.keys.shape
    count, query_heads, _ = layer.queries.shape
    group = query_heads // heads
    first = 0 if last is None else max(0, count - last)
    return torch.stack(
        [
            torch.stack(
                [
                    torch.stack(
                        [
                            weights(layer, h, h * group + g, q, slots - count + q + 1 if causal else slots)
                            for q in range(first, count)
                        ]
                    )
                    for g in range(group)
                ]
            )
            for h in range(heads)
        ]
    )


def assert_close(found: torch.Tensor, expected: torch.Tensor, terms: int = 1) -> None:
    """float32 scores of size ~50 are off by 64 * 2^-24 * 50 = 2e-4 at worst, and so is a weight, relative to itself."""
    assert found.dtype == torch.float32 and found.shape == expected.shape
    assert (found.double() - expected).abs().max() <= 2e-4 * terms
    assert ((found.double() - expected).abs() <= 2e-3 * expected.abs() + 1e-6).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_epicache(shape, scale):
    layer = random_layer(*shape, scale=scale)
    assert_close(POLICIES["epicache"].score(layer), all_weights(layer).amax((1, 2)))


@pytest.mark.parametrize("pooling", ["max", "mean"])
@pytest.mark.parametrize(("window", "kernel"), [(64, 7), (5, 3), (8, 1)])
@pytest.mark.parametrize("shape", SHAPES)
def test_snapkv(shape, window, kernel, pooling):
    layer = random_layer(*shape)
    expected = all_weights(layer, last=window, causal=True).mean((1, 2))
    before = shape[0] - min(window, shape[4])
    pooled = expected.clone()
    for slot in range(before):
        near = [expected[:, i] for i in range(slot - kernel // 2, slot + kernel // 2 + 1) if 0 <= i < before]
        # As in the authors' code, the mean counts the slots past the ends as zeros.
        pooled[:, slot] = torch.stack(near).amax(0) if pooling == "max" else torch.stack(near).sum(0) / kernel
    policy = policies.SnapKV(window=window, kernel=kernel, pooling=pooling)
    assert_close(policy.score(layer), pooled)
    assert policy.recent(1000) == window


@pytest.mark.parametrize("shape", SHAPES)
def test_h2o(shape):
    layer = random_layer(*shape)
    slots, heads, query_heads, _, count = shape
    expected = all_weights(layer, causal=True).sum((1, 2))
    assert_close(POLICIES["h2o"].score(layer), expected, terms=count * query_heads // heads)
    previous = torch.rand(heads, slots // 2) * 3
    carried = Layer(layer.keys, layer.queries, layer.scale, previous)
    expected[:, : slots // 2] += previous
    assert_close(POLICIES["h2o"].score(carried), expected, terms=count * query_heads // heads)
    assert POLICIES["h2o"].recent(101) == 50


def test_h2o_in_two_blocks_is_h2o_in_one():
    layer = random_layer(90, 2, 4, 64, 90)
    whole = POLICIES["h2o"].score(layer)
    assert layer.queries is not None
    first = POLICIES["h2o"].score(Layer(layer.keys[:37], layer.queries[:37]))
    both = POLICIES["h2o"].score(Layer(layer.keys, layer.queries[37:], previous=first))
    torch.testing.assert_close(both, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_keydiff(shape):
    layer = random_layer(*shape)
    unit = layer.keys.double() / layer.keys.double().norm(dim=-1, keepdim=True)
    mean = unit.mean(0)
    expected = -(unit * mean).sum(-1) / mean.norm(dim=-1)
    assert_close(POLICIES["keydiff"].score(layer), expected.T)


@pytest.mark.parametrize("shape", SHAPES)
def test_epicache_keydiff(shape):
    """Against ranks that are counted: how many slots of the head score lower, or alike and earlier."""
    layer = random_layer(*shape)
    found = POLICIES["epicache-keydiff"].score(layer)
    ranks = []
    for name in ("epicache", "keydiff"):
        scores = POLICIES[name].score(layer)
        below = (scores.unsqueeze(-1) > scores.unsqueeze(-2)).sum(-1)
        earlier = (scores.unsqueeze(-1) == scores.unsqueeze(-2)).tril(-1).sum(-1)
        ranks.append(below + earlier)
    assert found.dtype == torch.float32 and torch.equal(found, torch.maximum(*ranks).float())


def test_equal_scores_rank_in_their_order():
    assert policies.highest_rank(torch.tensor([[2.0, 0.0, 0.0, 1.0]])).tolist() == [[3, 0, 1, 2]]


def test_streaming():
    found = POLICIES["streaming"].score(Layer(torch.randn(5, 3, 16)))
    assert found.dtype == torch.float32 and torch.equal(found, torch.arange(5.0).repeat(3, 1))


@pytest.mark.parametrize("name", POLICIES)
def test_heads_do_not_mix(name):
    """Other keys and queries of one KV head change its own scores alone; streaming reads neither."""
    layer = random_layer(50, 2, 4, 64, 20)
    assert layer.queries is not None
    keys, queries = layer.keys.clone(), layer.queries.clone()
    keys[:, 1], queries[:, 2:] = torch.randn(50, 64), torch.randn(20, 2, 64)
    before, after = POLICIES[name].score(layer), POLICIES[name].score(Layer(keys, queries))
    assert torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1]) == (name == "streaming")


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_input_that_is_not_finite_is_never_selected_from(name, poison):
    layer = random_layer(50, 2, 4, 64, 20)
    layer.keys[7, 1, 3] = poison
    scores = POLICIES[name].score(layer)
    if name == "streaming":
        assert torch.isfinite(scores).all()
        return
    assert torch.isfinite(scores[0]).all()
    with pytest.raises(ValueError, match="NaN"):
        policies.select(scores, 10)
    if POLICIES[name].queries != "none":
        layer = random_layer(50, 2, 4, 64, 20)
        assert layer.queries is not None
        layer.queries[-1, 3, 0] = poison
        with pytest.raises(ValueError, match="NaN"):
            policies.select(POLICIES[name].score(layer), 10)


@pytest.mark.parametrize("name", [name for name, policy in POLICIES.items() if policy.queries != "none"])
def test_refusals_of_policies(name):
    keys = torch.randn(30, 2, 16)
    for queries in (None, torch.empty(0, 4, 16)):
        with pytest.raises(ValueError, match="needs the queries"):
            POLICIES[name].score(Layer(keys, queries))
    for queries in (torch.randn(5, 3, 16), torch.randn(5, 4, 8)):
        with pytest.raises(ValueError, match="do not fit"):
            POLICIES[name].score(Layer(keys, queries))
    if POLICIES[name].queries in ("window", "block"):
        for count in (31, 400):
            with pytest.raises(ValueError, match=r"queries of \d+ slots"):
                POLICIES[name].score(Layer(keys, torch.randn(count, 4, 16)))


def test_refusals_of_settings():
    for previous in (torch.zeros(2, 31), torch.zeros(3, 10)):
        with pytest.raises(ValueError, match="previous scores"):
            POLICIES["h2o"].score(Layer(torch.randn(30, 2, 16), torch.randn(5, 4, 16), previous=previous))
    for kernel, window in ((4, 64), (0, 64), (7, 0)):
        with pytest.raises(ValueError, match="odd"):
            policies.SnapKV(window=window, kernel=kernel)


@st.composite
def selections(draw: st.DrawFn) -> tuple[torch.Tensor, int, torch.Tensor]:
    heads, slots = draw(st.integers(1, 4)), draw(st.integers(1, 60))
    # Few values, so that many are equal, and infinities.
    values = st.sampled_from([-math.inf, -1.0, -0.0, 0.0, 1e-30, 0.5, 1.0, math.inf])
    scores = torch.tensor(draw(st.lists(values, min_size=heads * slots, max_size=heads * slots))).view(heads, slots)
    protected = torch.tensor(draw(st.lists(st.booleans(), min_size=slots, max_size=slots)))
    budget = draw(st.integers(max(1, int(protected.sum())), slots + 5))
    return scores, budget, protected


@given(selections())
def test_select(case):
    scores, budget, protected = case
    found = policies.select(scores, budget, protected)
    heads, slots = scores.shape
    assert found.dtype == torch.int64 and found.shape == (heads, min(budget, slots))
    for head in range(heads):
        kept = found[head].tolist()
        order = sorted(range(slots), key=lambda i: (bool(protected[i]), float(scores[head, i]), i), reverse=True)
        assert kept == sorted(order[:budget])


def test_select_of_nothing_protected():
    scores = torch.rand(3, 100)
    expected = scores.topk(17).indices.sort().values
    assert torch.equal(policies.select(scores, 17), expected)
    assert torch.equal(policies.select(scores, 100), torch.arange(100).repeat(3, 1))


@pytest.mark.parametrize(
    ("scores", "budget", "protected", "words"),
    [
        (torch.zeros(5), 1, None, r"\[Hkv, T\]"),
        (torch.zeros(2, 5), 0, None, "budget of 0 slots is below the 1"),
        (torch.zeros(2, 5), 2, torch.tensor([True] * 3 + [False] * 2), "budget of 2 slots is below the 3"),
        (torch.zeros(2, 5), 2, torch.ones(4, dtype=torch.bool), r"must be \[5\] bool"),
        (torch.zeros(2, 5), 2, torch.ones(5), r"must be \[5\] bool"),
        (torch.tensor([[0.0, math.nan], [1.0, 2.0]]), 1, None, "1 heads hold NaN"),
        # Even where all would be kept.
        (torch.tensor([[0.0, math.nan]]), 2, None, "NaN"),
    ],
)
def test_refusals_of_select(scores, budget, protected, words):
    with pytest.raises(ValueError, match=words):
        policies.select(scores, budget, protected)


@given(st.integers(1, 50), st.integers(1, 50), st.integers(0, 50), st.integers(0, 80))
def test_always_kept(slots, budget, leading, recent):
    found = policies.always_kept(slots, budget, leading=leading, recent=recent)
    last = max(0, min(recent, budget - leading))
    assert found.tolist() == [i < leading or i >= slots - last for i in range(slots)]
    if leading <= budget:
        policies.select(torch.zeros(1, slots), budget, found)


_sensitivities = st.lists(st.floats(0, 2), min_size=1, max_size=80)


@given(_sensitivities, st.integers(1, 100_000), st.floats(0, 50), st.floats(0, 1))
def test_layer_budgets(sensitivity, budget, alpha, floor):
    found = policies.layer_budgets(sensitivity, budget, alpha, floor)
    assert len(found) == len(sensitivity) and all(type(value) is int for value in found)
    assert sum(found) == budget * len(sensitivity)
    assert min(found) >= max(1, int(budget * floor))
    # More sensitive layers never get less, but for the token that rounding hands out.
    ordered = [kept for _, kept in sorted(zip(sensitivity, found, strict=True), key=lambda pair: pair[0])]
    assert all(later >= earlier - 1 for earlier, later in itertools.pairwise(ordered))


@given(_sensitivities, st.integers(1, 10_000))
def test_flat_budgets(sensitivity, budget):
    assert policies.layer_budgets(sensitivity, budget, 0) == [budget] * len(sensitivity)
    assert policies.layer_budgets(sensitivity, budget, 1.3, floor=1) == [budget] * len(sensitivity)
    assert policies.layer_budgets([sensitivity[0]] * 7, budget, 1.3) == [budget] * 7


def test_budgets_without_floor_follow_the_paper():
    sensitivity = [random.uniform(0.2, 1) for _ in range(30)] + [0.0, 1.2]
    weights = [(value / 1.2) ** 1.3 for value in sensitivity]
    found = policies.layer_budgets(sensitivity, 4096, 1.3, floor=0)
    for kept, weight in zip(found, weights, strict=True):
        # Layers of weight ~0 still get one token, which the others make room for.
        assert kept == pytest.approx(4096 * 32 * weight / sum(weights), abs=2)


def test_floored_layers_leave_the_rest_in_proportion():
    found = policies.layer_budgets([0.0, 0.01, 0.4, 0.8], 1000, 1.0)
    assert found[:2] == [250, 250]
    assert found[2:] == [pytest.approx(3500 / 3, abs=1), pytest.approx(7000 / 3, abs=1)]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (([], 10, 1.0), "one a layer"),
        (([0.1, math.nan], 10, 1.0), "finite"),
        (([0.1, math.inf], 10, 1.0), "finite"),
        (([0.1, 0.2], 0, 1.0), "budget of 0"),
        (([0.1, 0.2], 10, -1.0), "alpha"),
        (([0.1, 0.2], 10, math.nan), "alpha"),
        (([0.1, 0.2], 10, 1.0, 1.5), "floor"),
        (([0.1, 0.2], 10, 1.0, math.nan), "floor"),
    ],
)
def test_refusals_of_budgets(arguments, words):
    with pytest.raises(ValueError, match=words):
        policies.layer_budgets(*arguments)


@pytest.mark.parametrize("layers", [2, 3, 9, 28, 30])
def test_budget_classes(layers):
    """By brute force: layers in the order of their own budgets, cut in three or else two, the mean of each."""
    sensitivity = [random.uniform(0, 2) for _ in range(layers)]
    found, own = policies.budget_classes(sensitivity, 1.3), policies.layer_budgets(sensitivity, 1 << 20, 1.3)
    size = layers // 3 if layers % 3 == 0 else layers // 2
    order = sorted(range(layers), key=own.__getitem__)
    for rank, layer in enumerate(order):
        members = order[rank // size * size :][:size]
        assert found[layer] == pytest.approx(sum(own[m] for m in members) / size / (1 << 20), rel=1e-12)
    assert sum(found) == pytest.approx(layers)
    assert len(set(found)) <= layers // size


@pytest.mark.parametrize("layers", [1, 5, 25, 61])
def test_layers_that_no_classes_divide(layers):
    with pytest.raises(ValueError, match=f"{layers} layers are no multiple of 3 or 2"):
        policies.budget_classes([random.random() for _ in range(layers)], 1.1)


def test_layer_sensitivity():
    full, masked = torch.randn(2, 50, 64), torch.randn(2, 50, 64)
    a, b = full.double(), masked.double()
    expected = 1 - ((a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))).mean()
    assert policies.layer_sensitivity(full, masked) == pytest.approx(float(expected), abs=1e-6)
    assert policies.layer_sensitivity(full, full * 3) == pytest.approx(0, abs=1e-6)
    assert policies.layer_sensitivity(full, -full) == pytest.approx(2, abs=1e-6)
    with pytest.raises(ValueError, match="not of the same tokens"):
        policies.layer_sensitivity(full, masked[:1])
    masked[0, 3, 5] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        policies.layer_sensitivity(full, masked)
