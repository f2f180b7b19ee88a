# SPDX-License-Identifier: Apache-2.0
"""Compaction in place against the torch oracle: the same slots, their bytes, and nothing else written."""

from types import SimpleNamespace

import pytest
import torch

from vllm_kvcompress.episodic import policies
from vllm_kvcompress.episodic.policies import POLICIES, Layer
from vllm_kvcompress.formats import format_names, get_format
from vllm_kvcompress.formats.base import SUPPORTED_HEAD_DIMS, page_fields, read_pages, sketch_matrix, write_tokens
from vllm_kvcompress.kernels import compaction
from vllm_kvcompress.quantizers import packing
from vllm_kvcompress.triton_kernels import compact as compact_module
from vllm_kvcompress.triton_kernels.compact import compact
from vllm_kvcompress.triton_kernels.score import Slots, score

PAGE = 128


class Memory:
    """A request's pages, of different means, among pages of 0xFF bytes, as is the rest of its last page."""

    def __init__(self, name, count, *, dim=64, heads=2):
        self.count, self.heads, self.dim = count, heads, dim
        self.layout = layout = get_format(name).layout(dim, PAGE)
        needed = -(-count // PAGE)
        pages = torch.full((needed + 4, heads * layout.head_bytes + 32), 0xFF, dtype=torch.uint8)
        self.pages = pages[:, : heads * layout.head_bytes].view(-1, heads, layout.head_bytes)
        order = torch.randperm(needed + 3) + 1
        self.table, self.unused = order[:needed], order[needed:]
        fields = page_fields(self.pages, layout)
        if fields.k_mean is not None:
            fields.k_mean[self.table] = torch.randn(needed, heads, dim).half() * 3
        at = torch.arange(count)
        keys, values = torch.randn(2, count, heads, dim)
        write_tokens(self.pages, layout, self.table[at // PAGE] * PAGE + at % PAGE, keys, values, 0.9, 0.9)
        self.sketch = None if layout.keys.signs is None else sketch_matrix(dim).half().contiguous()

    def score(self, device, policy, queries, offset):
        """[H, T], by the kernels."""
        there = [None if x is None else x.to(device) for x in (self.pages, self.table, queries, offset)]
        workspace = torch.full((2 * PAGE, self.heads, self.dim), torch.nan).half().to(device)
        slots = Slots([there[0]], self.layout, there[1], self.count, workspace, None)
        asked, added = (None if x is None else x.unsqueeze(0) for x in there[2:])
        return score(policy, slots, asked, added, self.dim**-0.5).cpu()[0]

    def compact(self, device, num_sources, targets, scores, protected=0, *, is_first=True):
        """What is kept, and the pages that kernels and oracle leave. protected: of slots, or the first so many."""
        if isinstance(protected, int):
            protected = torch.arange(num_sources * PAGE) < protected
        kept = policies.select(scores[:, : len(protected)], len(targets) * PAGE, protected)
        clip = torch.empty(self.heads).uniform_(0.7, 1.0)
        (pages,) = compact_there(device, [self], targets, [kept], is_first, [clip])
        expected = self.pages.clone()
        compaction.compact(expected, self.layout, self.table, targets, kept, is_first, clip)
        return SimpleNamespace(kept=kept, pages=pages, oracle_pages=expected)


def compact_there(device, layers, targets, kept, is_first, clips):
    """Pages of every layer as the kernels leave them; all layers have the table of the first."""
    there = []
    for layer in layers:
        pages = torch.empty_strided(layer.pages.shape, layer.pages.stride(), dtype=torch.uint8, device=device)
        there.append(pages.copy_(layer.pages))
    first = layers[0]
    sketch = None if first.sketch is None else first.sketch.to(device)
    table, targets, kept, clips = (x.to(device) for x in (first.table, targets, torch.stack(kept), torch.stack(clips)))
    compact(there, first.layout, table, targets, kept, is_first, clips, sketch=sketch)
    return [pages.cpu() for pages in there]


def rows(pages, layout):
    """{"keys", "values"}: [(kind, bits, [H, T, ...])] of all that is stored, by slot."""
    fields, found = page_fields(pages, layout), {}
    for name, field, parts in (
        ("keys", fields.keys, layout.keys.parts), ("values", fields.values, layout.values.parts),
    ):  # fmt: skip
        regions = [("codes", part.bits, x) for part, x in zip(parts, field.codes, strict=True)]
        regions += [("scales", 0, x) for x in field.scales]
        if field.signs is not None:
            regions += [("signs", 1, field.signs), ("sign norms", 0, field.sign_norms)]
        found[name] = [(kind, bits, x.transpose(0, 1).flatten(1, 2)) for kind, bits, x in regions]
    return found


def check(memory, result, targets, num_sources, is_first):
    """Every byte of the pages, given what was kept."""
    layout, kept = memory.layout, result.kept
    before, got = rows(memory.pages[memory.table], layout), rows(result.pages[targets], layout)
    head = torch.arange(memory.heads).unsqueeze(1)
    for (_, _, old), (_, _, new) in zip(before["values"], got["values"], strict=True):
        assert torch.equal(new.view(torch.uint8), old[head, kept].view(torch.uint8))
    moved = torch.ones_like(kept, dtype=torch.bool)
    means = page_fields(memory.pages, layout).k_mean
    if means is not None:
        after = page_fields(result.pages, layout).k_mean[targets]
        reference = page_fields(result.oracle_pages, layout).k_mean[targets]
        if is_first:
            # Means of float32 sums, of keys that differ by rounding and where there are signs by that of S to fp16
            # (test_store.py: `read_back_slack`); one step of fp16 is 2^-10.
            torch.testing.assert_close(after, reference, rtol=2**-9, atol=2e-3)
            moved[:] = False
        else:
            assert torch.equal(after, means[memory.table[0]].expand_as(after))
            moved = kept < PAGE  # of the page whose mean it was: others' differ
        assert torch.equal(after, after[:1].expand_as(after))
    for (_, _, old), (_, _, new) in zip(before["keys"], got["keys"], strict=True):
        assert torch.equal(new[moved].view(torch.uint8), old[head, kept][moved].view(torch.uint8))
    if not moved.all():
        check_requantised(memory, result, targets, ~moved)
    written = torch.zeros(len(memory.pages), dtype=torch.bool)
    written[targets] = True
    assert torch.equal(result.pages[~written], memory.pages[~written])


def check_requantised(memory, result, targets, where):
    """Keys of rows `where` [H, M] as the oracle writes them, and as close to what they were.

    Keys and means are the oracle's but for rounding, so a code may differ where an element lies at the boundary of two,
    which is rare: nine rows of ten must be the same, where one in a hundred is expected to differ at most.
    """
    layout = memory.layout
    mine, oracle = (rows(pages[targets], layout)["keys"] for pages in (result.pages, result.oracle_pages))
    same = torch.ones(int(where.sum()), dtype=torch.bool)
    for (kind, bits, a), (_, _, b) in zip(mine, oracle, strict=True):
        if kind == "codes":
            same &= (packing.unpack_bits(a[where], bits) == packing.unpack_bits(b[where], bits)).all(-1)
    assert same.double().mean() > 0.9
    for (kind, bits, a), (_, _, b) in zip(mine, oracle, strict=True):
        if kind == "signs":  # of the sums of D products of fp16 numbers; few are within 2^-11 of zero
            assert (packing.unpack_bits(a[where], bits) == packing.unpack_bits(b[where], bits)).double().mean() > 0.95
        elif kind != "codes":  # fp16: a step is 2^-10 of the number, of a zero point of the row's scale
            a, b = a[where][same].float(), b[where][same].float()
            torch.testing.assert_close(a, b, rtol=2**-8, atol=2e-3 * float(b.abs().max()))
    # Rows that differ are hardly worse: an element at a boundary is as far from either code. With it moves a norm of
    # few channels, by up to a tenth, and where there are signs their estimate's error, by a third of the residual.
    keys = read_pages(memory.pages[memory.table], layout)[0].transpose(0, 1).flatten(1, 2)
    keys = keys[torch.arange(memory.heads).unsqueeze(1), result.kept][where]
    mean = page_fields(result.pages, layout).k_mean[targets[0]].float()
    lengths = (keys - mean.unsqueeze(1).expand(-1, where.shape[1], -1)[where]).norm(dim=-1)
    errors = []
    for pages in (result.pages, result.oracle_pages):
        read = read_pages(pages[targets], layout)[0].transpose(0, 1).flatten(1, 2)[where]
        errors.append((read - keys).norm(dim=-1))
    assert (errors[0] <= errors[1] + 0.3 * lengths).all()


@pytest.mark.parametrize("is_first", [True, False], ids=["first", "later"])
@pytest.mark.parametrize("name", format_names())
def test_survivors(name, is_first, device):
    """Bytes of what stays as it is, the rest written anew around a common mean; into pages of the table or others."""
    memory = Memory(name, 2 * PAGE + 45, heads=1 if is_first else 2)
    targets = memory.unused[:1] if is_first else memory.table[:1]
    scores = torch.rand(memory.heads, memory.count)
    result = memory.compact(device, 2, targets, scores, 5, is_first=is_first)
    check(memory, result, targets, 2, is_first)


def test_targets_among_the_sources(device):
    """Two of the three pages that survivors come from: the first written holds what the second has yet to give."""
    memory = Memory("int2", 3 * PAGE)
    scores = torch.rand(2, memory.count) + torch.arange(memory.count) // PAGE  # all of the last page
    targets = memory.table[:2]
    check(memory, memory.compact(device, 3, targets, scores), targets, 3, True)


@pytest.mark.parametrize("name,dim", [("oscar-int2", 96), ("turboquant-2.5", 256), ("oscar-int2-qjl", 128)])
def test_requantised_at_other_head_sizes(name, dim, device):
    memory = Memory(name, 2 * PAGE, dim=dim, heads=1)
    result = memory.compact(device, 2, memory.table[:1], torch.rand(1, memory.count))
    check(memory, result, memory.table[:1], 2, True)


@pytest.mark.parametrize("dim", SUPPORTED_HEAD_DIMS)
@pytest.mark.parametrize("name", format_names())
def test_bytes_of_every_layout(name, dim, device):
    """All bytes of rows that go to a page with the mean that theirs had, whatever the bytes are; the mean with them."""
    memory = Memory(name, 2 * PAGE, dim=dim, heads=1)
    memory.pages[memory.table] = torch.randint(0, 256, (2, *memory.pages.shape[1:])).to(torch.uint8)
    means = page_fields(memory.pages, memory.layout).k_mean
    if means is not None:
        means[memory.table] = torch.randn(1, 1, dim).half()  # NaN differs from itself
    kept = torch.randperm(2 * PAGE)[:PAGE].sort().values.unsqueeze(0)
    target = memory.unused[:1]
    (pages,) = compact_there(device, [memory], target, [kept], False, [torch.ones(1)])
    before, after = (rows(x, memory.layout) for x in (memory.pages[memory.table], pages[target]))
    for which in ("values", "keys"):
        for (_, _, old), (_, _, new) in zip(before[which], after[which], strict=True):
            assert torch.equal(new[0].view(torch.uint8), old[0, kept[0]].view(torch.uint8))
    if means is not None:
        assert torch.equal(page_fields(pages, memory.layout).k_mean[target], means[memory.table[:1]])


@pytest.mark.parametrize("together", [3, 2, 1])
@pytest.mark.parametrize("is_first", [True, False], ids=["first", "later"])
def test_several_layers(is_first, together, device, monkeypatch):
    """Layers keep slots of their own, whether their scratch pages fit together or not: as each by itself."""
    layers = [Memory("oscar-int2", 2 * PAGE) for _ in range(3)]
    for layer in layers[1:]:
        layer.table = layers[0].table
    target = layers[0].table[:1]
    kept = [torch.rand(2, 2 * PAGE).argsort(-1)[:, :PAGE].sort(-1).values for _ in layers]
    clips = [torch.empty(2).uniform_(0.7, 1.0) for _ in layers]
    alone = [
        compact_there(device, [layer], target, [slots], is_first, [clip])[0]
        for layer, slots, clip in zip(layers, kept, clips, strict=True)
    ]
    monkeypatch.setattr(compact_module, "_SCRATCH_BYTES", together * 2 * layers[0].layout.head_bytes)
    found = compact_there(device, layers, target, kept, is_first, clips)
    assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True))
    assert not torch.equal(found[0], layers[0].pages)


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_policies_choose_the_best(policy, device):
    """By float64 scores of the keys as the pages have them, up to rounding; a window that begins among the sources."""
    name = "oscar-int2-static" if policy == "keydiff" else "int2"
    memory = Memory(name, 3 * PAGE + 20)
    offset = torch.randn(2, memory.dim) if policy == "keydiff" else None
    queries = torch.randn(64, 6, memory.dim).half()
    sources = 3 * PAGE
    must = policies.protected_slots(POLICIES[policy], memory.count, sources, PAGE, 9, "cpu")
    assert int(must.sum()) == 9 + {"snapkv": 44, "h2o": 44}.get(policy, 0)
    found = memory.score(device, POLICIES[policy], queries, offset)
    result = memory.compact(device, 3, memory.table[:1], found, must)
    check(memory, result, memory.table[:1], 3, True)
    keys = read_pages(memory.pages[memory.table], memory.layout)[0].transpose(1, 2).flatten(0, 1)[: memory.count]
    layer = Layer(keys.double() if offset is None else keys.double() + offset, queries.double(), 0.125)
    scores = POLICIES[policy].score(layer)[:, :sources]
    chosen = torch.zeros(scores.shape, dtype=torch.bool).scatter(1, result.kept, True)
    assert (chosen.sum(1) == PAGE).all() and chosen[:, must].all()
    lowest = scores.masked_fill(~chosen | must, torch.inf).amin(1)
    highest = scores.masked_fill(chosen, -torch.inf).amax(1)
    # Keys are rounded to fp16, 2^-11 of each element: exponents of sums of 64 products of size 1 / 8 are off by 64 / 8
    # * 2^-11 * 3 = 1.2e-2 if all elements are 3 and all agree, and so is a weight by that much of itself; a cosine by
    # 2^-10.
    assert (lowest >= highest - 2.4e-2 * highest.abs() - 2e-3 * (policy == "keydiff")).all()


def test_selection_is_the_oracles(device):
    """Equal scores too: the later slots."""
    for budget in (1, 40, 99, 100):
        scores = torch.randint(-3, 3, (3, 100)).float()
        protected = torch.rand(100) < 0.2 if budget > 90 else torch.arange(100) < 1
        found = policies.select_without_waiting(scores.to(device), budget, protected.to(device)).cpu()
        assert torch.equal(found, policies.select(scores, budget, protected))


def test_selection_of_what_is_not_a_number(device):
    """The lowest score, below -inf; what is protected stays whatever its own, or others', is."""
    scores = torch.tensor([[torch.nan, torch.inf, torch.nan, 1.0, -torch.inf, torch.nan, torch.inf, torch.nan]])
    protected = torch.tensor([True, *[False] * 7])
    for budget, expected in (
        (1, [0]),
        (3, [0, 1, 6]),
        (4, [0, 1, 3, 6]),
        (5, [0, 1, 3, 4, 6]),
        (6, [0, 1, 3, 4, 6, 7]),
    ):
        assert policies.select_without_waiting(scores.to(device), budget, protected.to(device)).tolist() == [expected]


def test_refusals(device):
    memory = Memory("int2", 2 * PAGE)
    memory.sketch = torch.zeros(64, 64).half()
    with pytest.raises(ValueError, match="sketch"):
        memory.compact(device, 2, memory.table[:1], torch.rand(2, memory.count))
