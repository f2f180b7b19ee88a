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
from vllm_kvcompress.triton_kernels.score import SCORERS, Slots, score

PAGE = 128


class Case:
    """A request of `count` slots among pages that are NaN, as the rest of its last page is; and random queries.

    Layers are other pages, keys, queries and offsets; the table is the same. They lie one after the other in a buffer,
    at distances that are multiples of 4 bytes and no more, unless there is one alone.
    """

    def __init__(self, device, count, name="oscar-int2", *, dim=64, heads=2, group=3, queries=70, layers=1, held=None):
        self.count, self.dim, self.heads, self.layers, self.device = count, dim, heads, layers, device
        page_format = get_format(name)
        self.layout = layout = page_format.layout(dim, PAGE)
        needed = -(-count // PAGE)
        page_bytes = heads * layout.head_bytes
        layer_bytes = (needed + 4) * (page_bytes + 32)
        # Between a layer's pages and the next: 4 bytes, then 8, and so on.
        self.begins = [number * layer_bytes + 2 * number * (number + 1) for number in range(layers)]
        self.buffer = torch.full((self.begins[-1] + layer_bytes,), 0xFF, dtype=torch.uint8)
        self.pages = self.layer_pages(self.buffer)
        self.table = torch.randperm(needed + 3)[:needed] + 1
        at = torch.arange(count)
        self.slots = self.table[at // PAGE] * PAGE + at % PAGE
        for pages in self.pages:
            fields = page_fields(pages, layout)
            if fields.k_mean is not None:
                fields.k_mean[self.table] = torch.randn(needed, heads, dim).half()
            keys, values = torch.randn(2, count, heads, dim)
            write_tokens(pages, layout, self.slots, keys, values, 1.0, 1.0)
        self.queries = torch.randn(layers, queries, heads * group, dim).half()
        self.offset = torch.randn(layers, heads, dim) if page_format.centring == "static" else None
        self.sketch = None if layout.keys.signs is None else sketch_matrix(dim).half().contiguous()
        self.held = held or layers * needed * PAGE
        self.scale = dim**-0.5

    def layer_pages(self, buffer):
        """Of every layer [num_pages, H, head_bytes], with a gap behind each page."""
        page_bytes = self.heads * self.layout.head_bytes
        shape = (-(-self.count // PAGE) + 4, self.heads, self.layout.head_bytes)
        strides = (page_bytes + 32, self.layout.head_bytes, 1)
        return [buffer.as_strided(shape, strides, begin) for begin in self.begins]

    def there(self, x):
        return None if x is None else x.to(self.device)

    def slots_there(self, held):
        workspace = torch.full((held, self.heads, self.dim), torch.nan).half().to(self.device)
        pages = self.layer_pages(self.there(self.buffer))
        return Slots(pages, self.layout, self.there(self.table), self.count, workspace, self.there(self.sketch))

    def dense(self):
        """Keys [L, T, H, D] float16 as the kernels see them; close to what the pages say."""
        slots = self.slots_there(self.layers * self.count + PAGE)
        (turn,) = slots.turns()
        ((first, keys),) = turn.tiles()
        assert first == 0 and keys.shape == (self.layers, self.count, self.heads, self.dim)
        assert slots.workspace[self.layers * self.count :].isnan().all(), "written beyond the last slot"
        keys = keys.cpu()
        for own, pages in zip(keys, self.pages, strict=True):
            exact = read_pages(pages[self.table], self.layout)[0].transpose(1, 2).flatten(0, 1)[: self.count]
            torch.testing.assert_close(own.float(), exact, rtol=2**-11 + 2**-20, atol=4e-3)  # as in test_gather.py
        return keys

    def score(self, policy, previous=None):
        there, slots = self.there, self.slots_there(self.held)
        return score(policy, slots, there(self.queries), there(self.offset), self.scale, there(previous)).cpu()

    def check(self, policy, previous=None):
        keys = self.dense().double()
        found = self.score(policy, previous)
        assert found.shape == (self.layers, self.heads, self.count) and found.dtype == torch.float32
        if self.offset is not None:
            keys = keys + self.offset.unsqueeze(1)
        expected = torch.stack([
            policy.score(Layer(*own, self.scale, None if previous is None else previous[number]))
            for number, own in enumerate(zip(keys, self.queries.double(), strict=True))
        ])  # fmt: skip
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


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("held", [2 * (PAGE + 31) + 5, PAGE + 5], ids=["two-of-three", "less-than-one"])
def test_layers_take_turns(device, policy, held):
    """In the same launches, as many as the workspace holds, or each in tiles."""
    case = Case(device, PAGE + 31, "oscar-int2", layers=3, queries=40, held=held)
    case.check(POLICIES[policy], torch.rand(3, 2, PAGE) if policy == "h2o" else None)


@pytest.mark.parametrize("name", ["oscar-int2-static", "turboquant-2.5-qjl"])
def test_layers_of_other_formats(device, name):
    """What static centring took is each layer's own; codes of every kind from pages that are not aligned."""
    for policy in ("epicache-keydiff", "keydiff"):
        Case(device, PAGE + 31, name, heads=1, layers=3, queries=20).check(POLICIES[policy])


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
    case.check(POLICIES["h2o"], torch.rand(1, 2, case.count - queries) * 5)


def test_every_policy_has_a_kernel():
    assert {type(policy) for policy in POLICIES.values()} == set(SCORERS)


@pytest.mark.parametrize("policy", ["epicache", "epicache-keydiff", "snapkv", "keydiff", "h2o"])
def test_broken_keys_are_not_hidden(device, policy):
    """A key that is not finite makes NaN of its head's scores, where a softmax or mean sees it, and of no other's."""
    case = Case(device, PAGE + 40, "int2", queries=64)
    page_fields(case.pages[0], case.layout).k_scales[case.table[0], 1, 5] = torch.nan
    found = case.score(POLICIES[policy])
    assert found[0, 1].isnan().all() and found[0, 0].isfinite().all()


def test_broken_queries_are_not_hidden(device):
    case = Case(device, PAGE, "int2")
    case.queries[0, 3, 0, 0] = torch.nan
    found = case.score(POLICIES["epicache"])
    assert found[0, 0].isnan().all() and found[0, 1].isfinite().all()


def test_refusals(device):
    case = Case(device, PAGE, "int2")

    class Unknown(EpiCache):
        pass

    with pytest.raises(ValueError, match="no GPU kernel scores by Unknown"):
        case.score(Unknown())
    for policy in (SnapKV(window=80), POLICIES["h2o"]):
        with pytest.raises(ValueError, match="70 queries of 60 slots"):
            Case(device, 60, "int2").score(policy)
    for shape in ((1, 2, PAGE + 1), (1, 1, 5), (2, 2, 5)):
        with pytest.raises(ValueError, match="previous scores"):
            case.score(POLICIES["h2o"], torch.zeros(shape))
    case.held = PAGE - 1
    with pytest.raises(ValueError, match="does not hold a page"):
        case.score(EpiCache())
    case.queries = case.queries.expand(2, -1, -1, -1)
    with pytest.raises(ValueError, match="of 2 layers, pages of 1"):
        case.score(EpiCache())
    case.queries = case.queries[:1].float()
    with pytest.raises(ValueError, match="must be float16"):
        case.score(EpiCache())
    case.queries = None
    with pytest.raises(ValueError, match="needs the queries of a guide prompt"):
        case.score(EpiCache())
