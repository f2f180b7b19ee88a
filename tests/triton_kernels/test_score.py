# SPDX-License-Identifier: Apache-2.0
"""Scores of slots against the torch policies, of the very keys that the kernels multiply."""

import pytest
import torch

from vllm_kvcompress.episodic.policies import (
    POLICIES,
    EpiCache,
    EpiCacheKeyDiff,
    KeyDiff,
    Layer,
    SnapKV,
    highest_rank,
)
from vllm_kvcompress.formats import get_format
from vllm_kvcompress.formats.base import page_fields, read_pages, sketch_matrix, write_tokens
from vllm_kvcompress.triton_kernels import score as score_module
from vllm_kvcompress.triton_kernels.score import SCORERS, Slots, dequantise_keys, score

PAGE = 128


class Case:
    """A request of `count` slots among pages that are NaN, as the rest of its last page is; and random queries."""

    def __init__(self, device, count, name="oscar-int2", *, dim=64, heads=2, group=3, queries=70, held=None):
        self.count, self.dim, self.heads, self.device = count, dim, heads, device
        page_format = get_format(name)
        self.layout = layout = page_format.layout(dim, PAGE)
        needed = -(-count // PAGE)
        pages = torch.full((needed + 4, heads * layout.head_bytes + 32), 0xFF, dtype=torch.uint8)
        self.pages = pages[:, : heads * layout.head_bytes].view(-1, heads, layout.head_bytes)
        self.table = torch.randperm(needed + 3)[:needed] + 1
        fields = page_fields(self.pages, layout)
        if fields.k_mean is not None:
            fields.k_mean[self.table] = torch.randn(needed, heads, dim).half()
        at = torch.arange(count)
        self.slots = self.table[at // PAGE] * PAGE + at % PAGE
        self.keys, values = torch.randn(2, count, heads, dim)
        write_tokens(self.pages, layout, self.slots, self.keys, values, 1.0, 1.0)
        self.queries = torch.randn(queries, heads * group, dim).half()
        self.offset = torch.randn(heads, dim) if page_format.centring == "static" else None
        self.sketch = None if layout.keys.signs is None else sketch_matrix(dim).half().contiguous()
        self.held = held or needed * PAGE
        self.scale = dim**-0.5

    def there(self, x):
        return None if x is None else x.to(self.device)

    def dense(self):
        """Keys [T, H, D] float16 as the kernels see them; close to what the pages say."""
        count = len(self.table) * PAGE
        keys = torch.full((count, self.heads, self.dim), torch.nan).half().to(self.device)
        dequantise_keys(
            self.there(self.pages), self.layout, self.there(self.table), self.count, 0, keys, self.there(self.sketch)
        )
        keys = keys.cpu()
        assert keys[self.count :].isnan().all(), "written beyond the last slot"
        keys = keys[: self.count]
        exact = read_pages(self.pages[self.table], self.layout)[0].transpose(1, 2).flatten(0, 1)[: self.count]
        torch.testing.assert_close(keys.float(), exact, rtol=2**-11 + 2**-20, atol=4e-3)  # as in test_gather.py
        return keys

    def score(self, policy, previous=None):
        there = self.there
        slots = Slots(
            there(self.pages),
            self.layout,
            there(self.table),
            self.count,
            torch.full((self.held, self.heads, self.dim), torch.nan).half().to(self.device),
            there(self.sketch),
        )
        return score(policy, slots, there(self.queries), there(self.offset), self.scale, there(previous)).cpu()

    def check(self, policy, previous=None):
        keys = self.dense().double()
        found = self.score(policy, previous)
        if self.offset is not None:
            keys = keys + self.offset
        expected = policy.score(Layer(keys, self.queries.double(), self.scale, previous))
        assert found.shape == (self.heads, self.count) and found.dtype == torch.float32
        if isinstance(policy, EpiCacheKeyDiff):
            # Ranks of the kernels' own scores, each compared with the oracle's elsewhere: near ones change places.
            assert torch.equal(found, highest_rank(self.score(EpiCache()), self.score(KeyDiff())))
            return
        if isinstance(policy, KeyDiff):
            # float32 sums of D squares and products, and a mean of T unit vectors.
            torch.testing.assert_close(found, expected, rtol=0, atol=(self.dim + self.count) * 2.0**-23)
            return
        # An exponent is off by D roundings (a tensor core truncates, to 2^-23) of |q| |k|, in the oracle too; the
        # log-sum-exp by as much, and both are rounded themselves. Static centring adds a large number to all alike.
        lengths = keys.norm(dim=-1).amax() * self.queries.double().norm(dim=-1).amax() * self.scale
        relative = 4 * float(lengths) * (self.dim + 8) * 2.0**-23
        assert relative < 1e-2, "a check of nothing"
        torch.testing.assert_close(found, expected, rtol=relative, atol=1e-9)


@pytest.mark.parametrize("policy", ["epicache", "snapkv", "h2o"])
@pytest.mark.parametrize("group,queries", [(1, 200), (3, 70), (6, 1), (7, 40), (16, 9)])
def test_groups(device, policy, group, queries, monkeypatch):
    """Rows that do not fill their tiles, shares of the slots, and a workspace that holds them in three parts."""
    monkeypatch.setattr(score_module, "_MIN_SHARE", 64)
    Case(device, 2 * PAGE + 83, heads=2, group=group, queries=queries, held=PAGE).check(POLICIES[policy])


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("name", ["oscar-int2-static", "turboquant-2.5-qjl"])
def test_formats(device, policy, name):
    """Static centring, which a softmax does not see; codes of every kind."""
    Case(device, PAGE + 31, name, heads=1).check(POLICIES[policy])


@pytest.mark.parametrize("policy", ["epicache", "keydiff", "h2o"])
@pytest.mark.parametrize("dim", [96, 128, 256])
def test_head_sizes(device, policy, dim):
    Case(device, PAGE + 9, "int2", dim=dim, group=2, queries=50, held=PAGE + 5).check(POLICIES[policy])


@pytest.mark.parametrize("count", [1, 60, 128, 129])
def test_few_slots(device, count):
    """Fewer than a tile; a window that is all there is."""
    Case(device, count, "int2", heads=1, queries=min(count, 64)).check(POLICIES["snapkv"])
    Case(device, count, "int2", heads=1).check(POLICIES["epicache"])
    Case(device, count, "int2", heads=1, queries=count).check(POLICIES["h2o"])


@pytest.mark.parametrize("queries", [1, 83, 2 * PAGE + 83])
def test_scores_add_up(device, queries):
    """To those of a block before, for the slots that it left; all of a first block sees itself alone."""
    case = Case(device, 2 * PAGE + 83, queries=queries, held=PAGE)
    case.check(POLICIES["h2o"], torch.rand(2, case.count - queries) * 5)


def test_every_policy_has_a_kernel():
    assert {type(policy) for policy in POLICIES.values()} == set(SCORERS)


@pytest.mark.parametrize("policy", ["epicache", "epicache-keydiff", "snapkv", "keydiff", "h2o"])
def test_broken_keys_are_not_hidden(device, policy):
    """A key that is not finite makes NaN of its head's scores, where a softmax or mean sees it, and of no other's."""
    case = Case(device, PAGE + 40, "int2", queries=64)
    page_fields(case.pages, case.layout).k_scales[case.table[0], 1, 5] = torch.nan
    found = case.score(POLICIES[policy])
    assert found[1].isnan().all() and found[0].isfinite().all()


def test_broken_queries_are_not_hidden(device):
    case = Case(device, PAGE, "int2")
    case.queries[3, 0, 0] = torch.nan
    found = case.score(POLICIES["epicache"])
    assert found[0].isnan().all() and found[1].isfinite().all()


def test_refusals(device):
    case = Case(device, PAGE, "int2")

    class Unknown(EpiCache):
        pass

    with pytest.raises(ValueError, match="no GPU kernel scores by Unknown"):
        case.score(Unknown())
    for policy in (SnapKV(window=80), POLICIES["h2o"]):
        with pytest.raises(ValueError, match="70 queries of 60 slots"):
            Case(device, 60, "int2").score(policy)
    for shape in ((2, PAGE + 1), (1, 5)):
        with pytest.raises(ValueError, match="previous scores"):
            case.score(POLICIES["h2o"], torch.zeros(shape))
    case.held = PAGE - 1
    with pytest.raises(ValueError, match="does not hold a page"):
        case.score(EpiCache())
    case.queries = case.queries.float()
    with pytest.raises(ValueError, match="must be float16"):
        case.score(EpiCache())
    case.queries = None
    with pytest.raises(ValueError, match="needs the queries of a guide prompt"):
        case.score(EpiCache())
