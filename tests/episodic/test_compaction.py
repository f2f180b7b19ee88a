# SPDX-License-Identifier: Apache-2.0
"""Compaction in place against brute force: which tokens stay, where, and how little is lost, in every page format."""

import random
import secrets

import pytest
import torch

from vllm_kvcompress.episodic.policies import POLICIES, Layer, Policy, protected_slots, select
from vllm_kvcompress.formats import format_names, get_format
from vllm_kvcompress.formats.base import page_fields, read_pages, write_tokens
from vllm_kvcompress.kernels import compaction
from vllm_kvcompress.quantizers import lloyd_max

HEADS, GROUP, DIM, PAGE = 2, 2, 64, 32
SCALE = DIM**-0.5


@pytest.fixture(autouse=True)
def rng():
    seed = secrets.randbits(32)
    print(f"seed {seed}")  # shown by pytest when the test fails
    torch.manual_seed(seed)
    return random.Random(seed)


class Given(Policy):
    """Scores that a test has made up."""

    queries = "none"

    def __init__(self, scores: torch.Tensor) -> None:
        self.scores = scores

    def score(self, layer: Layer) -> torch.Tensor:
        assert layer.keys.shape[0] == self.scores.shape[1]
        return self.scores


class Memory:
    """Pages of one request, written as the engine writes them, in places of no order among pages of others."""

    def __init__(self, name: str, num_pages: int = 64) -> None:
        self.format = get_format(name)
        self.layout = self.format.layout(DIM, PAGE)
        self.pages = torch.randint(0, 256, (num_pages, HEADS, self.layout.head_bytes), dtype=torch.uint8)
        self.unused = (torch.randperm(num_pages - 1) + 1).tolist()
        self.table: list[int] = []
        self.num_slots = 0

    def append(self, count: int) -> None:
        """Whole pages but for the last; keys that drift along the text around a mean far from zero."""
        assert self.num_slots % PAGE == 0
        new = [self.unused.pop() for _ in range(-(-count // PAGE))]
        self.table += new
        time = torch.arange(self.num_slots, self.num_slots + count).view(-1, 1, 1) / 500
        keys = torch.randn(count, HEADS, DIM) + 3 * (time + torch.arange(DIM)).cos()
        values = torch.randn(count, HEADS, DIM)
        mean = page_fields(self.pages, self.layout).k_mean
        for page, part in zip(new, keys.split(PAGE), strict=True):
            if mean is not None:
                mean[page] = part.mean(0).half()
        slots = torch.tensor([new[i // PAGE] * PAGE + i % PAGE for i in range(count)])
        write_tokens(self.pages, self.layout, slots, keys, values, self.format.clip_k, self.format.clip_v)
        self.num_slots += count

    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        """[H, T, D]"""
        return tuple(  # type: ignore[return-value]
            x.transpose(0, 1).flatten(1, 2)[:, : self.num_slots]
            for x in read_pages(self.pages[self.table], self.layout)
        )

    def compact(
        self,
        policy: Policy,
        num_sources: int,
        budget: int,
        *,
        protected: int = 0,
        queries: torch.Tensor | None = None,
        key_offset: torch.Tensor | None = None,
        is_first: bool = True,
    ) -> torch.Tensor:
        """Also takes the freed pages out of the table."""
        pages, table = (self.pages, self.layout), torch.tensor(self.table)
        scores = compaction.score(*pages, table, self.num_slots, policy, queries, key_offset, SCALE)
        sources = num_sources * PAGE
        must = protected_slots(policy, self.num_slots, sources, budget * PAGE, protected, table.device)
        kept = select(scores[:, :sources], budget * PAGE, must)
        compaction.compact(*pages, table, table[:budget], kept, is_first, 1.0)
        self.unused += self.table[budget:num_sources]
        del self.table[budget:num_sources]
        self.num_slots -= (num_sources - budget) * PAGE
        return kept


def regions(memory: Memory, pages: torch.Tensor) -> dict[str, list[torch.Tensor]]:
    """Rows of keys and of values by slot: [H, T, ...] each."""
    fields = page_fields(pages, memory.layout)
    return {
        name: [x.transpose(0, 1).flatten(1, 2) for x in (*rows.codes, *rows.scales, rows.signs, rows.sign_norms)
               if x is not None]
        for name, rows in (("keys", fields.keys), ("values", fields.values))
    }  # fmt: skip


@pytest.mark.parametrize("name", format_names())
@pytest.mark.parametrize("tail", [0, 7])
def test_survivors_are_gathered_by_head(name, tail):
    """Token by token: bytes where nothing forces a second quantisation, else what a store into an empty page gives."""
    memory = Memory(name)
    memory.append(7 * PAGE + tail)
    table, untouched = list(memory.table), memory.pages.clone()
    keys, values = memory.read()
    scores = torch.rand(HEADS, memory.num_slots)
    kept = memory.compact(Given(scores), num_sources=6, budget=2, protected=5)
    assert kept.shape == (HEADS, 2 * PAGE)
    for head in range(HEADS):
        ranked = sorted(range(6 * PAGE), key=lambda slot: (slot < 5, float(scores[head, slot])), reverse=True)
        assert kept[head].tolist() == sorted(ranked[: 2 * PAGE])
        assert kept[head, :5].tolist() == [0, 1, 2, 3, 4]
    before, after = regions(memory, untouched[table]), regions(memory, memory.pages[table[:2]])
    rows = kept.clone()
    for old, new in zip(before["values"], after["values"], strict=True):
        for head in range(HEADS):
            assert torch.equal(new[head], old[head, rows[head]])
    mean = page_fields(memory.pages, memory.layout).k_mean
    if mean is None:
        for old, new in zip(before["keys"], after["keys"], strict=True):
            for head in range(HEADS):
                assert torch.equal(new[head], old[head, rows[head]])
    else:
        survivors = torch.stack([keys[head, kept[head]] for head in range(HEADS)])
        expected = survivors.double().mean(1)
        # float32 sums of 64 numbers, then fp16: 2^-11 of itself and a little.
        assert ((mean[table[0]].double() - expected).abs() <= 2**-10 * expected.abs() + 1e-4).all()
        assert torch.equal(mean[table[0]], mean[table[1]])
        fresh = torch.zeros_like(memory.pages[:2])
        page_fields(fresh, memory.layout).k_mean[:] = mean[table[0]]  # type: ignore[index]
        for slot in range(2 * PAGE):
            write_tokens(fresh, memory.layout, torch.tensor([slot]), survivors[:, slot : slot + 1].transpose(0, 1),
                         torch.zeros(1, HEADS, DIM), 1.0, 1.0)  # fmt: skip
        for old, new in zip(regions(memory, fresh)["keys"], after["keys"], strict=True):
            assert torch.equal(new, old)
    # Nothing but the kept pages was written.
    rest = [page for page in range(len(untouched)) if page not in table[:2]]
    assert torch.equal(memory.pages[rest], untouched[rest])
    later_keys, later_values = memory.read()
    assert torch.equal(later_keys[:, 2 * PAGE :], keys[:, 6 * PAGE :])
    assert torch.equal(later_values[:, 2 * PAGE :], values[:, 6 * PAGE :])


def double_scores(name: str, keys: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    """[H, T] float64 of keys [H, T, D] and queries [Q, H * GROUP, D], one head and query at a time."""
    keys, queries = keys.double(), queries.double()
    slots = keys.shape[1]
    if name == "epicache-keydiff":
        parts = torch.stack([double_scores(part, keys, queries) for part in ("epicache", "keydiff")])
        return (parts.unsqueeze(-1) > parts.unsqueeze(-2)).sum(-1).amax(0).double()
    found = torch.zeros(HEADS, slots, dtype=torch.float64)
    for head in range(HEADS):
        if name == "streaming":
            found[head] = torch.arange(slots)
        elif name == "keydiff":
            unit = keys[head] / keys[head].norm(dim=-1, keepdim=True)
            anchor = unit.mean(0)
            found[head] = -(unit @ anchor) / anchor.norm()
        else:
            weights = []
            for number, query in enumerate(queries):
                scores = keys[head] @ query[head * GROUP : (head + 1) * GROUP].T * SCALE
                if name in ("snapkv", "h2o"):
                    scores[slots - len(queries) + number + 1 :] = -torch.inf
                weights.append(scores.softmax(0))
            stacked = torch.stack(weights)
            if name == "epicache":
                found[head] = stacked.amax((0, 2))
            elif name == "h2o":
                found[head] = stacked.sum((0, 2))
            else:
                mean = stacked.mean((0, 2))
                cut = slots - len(queries)
                found[head] = mean
                for slot in range(cut):
                    found[head, slot] = mean[max(0, slot - 3) : min(cut, slot + 4)].max()
    return found


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("name", ["oscar-int2-static", "oscar-int2", "turboquant-4", "int2"])
def test_policies_choose_by_what_reads_back(name, policy, rng):
    """Highest scores of the keys as attention reads them, the statically taken mean added; computed in float64."""
    memory = Memory(name)
    sources, budget, protected = 8, rng.choice([3, 4]), rng.randint(0, 40)
    memory.append(9 * PAGE + rng.randint(1, PAGE))
    # As wide as the drift, or nothing would depend on it.
    offset = torch.randn(HEADS, DIM) * 3 if name == "oscar-int2-static" else None
    queries = torch.randn(64 if policy == "snapkv" else 20, HEADS * GROUP, DIM) * 2
    keys, _ = memory.read()
    scores = double_scores(policy, keys if offset is None else keys + offset.unsqueeze(1), queries)[:, : sources * PAGE]
    slots = memory.num_slots
    kept = memory.compact(POLICIES[policy], sources, budget, protected=protected, queries=queries, key_offset=offset)
    must = set(range(protected))
    recent = {"snapkv": 64, "h2o": budget * PAGE // 2}.get(policy, 0)
    # These are in the pages that are not chosen from, but for what does not fit in there.
    must |= set(range(min(sources * PAGE, slots - recent), sources * PAGE))
    for head in range(HEADS):
        chosen = kept[head].tolist()
        assert len(set(chosen)) == budget * PAGE and chosen == sorted(chosen) and must <= set(chosen)
        free = [slot for slot in chosen if slot not in must]
        left = [slot for slot in range(sources * PAGE) if slot not in set(chosen)]
        lowest, highest = float(scores[head, free].min()), float(scores[head, left].max())
        # float32: scores of size ~100 are off by 1e-4, a weight by so much of itself, a rank by the slots in between.
        allowed = 2 if policy == "epicache-keydiff" else 1e-3 * abs(highest) + 1e-7
        assert lowest >= highest - allowed
    if offset is not None and policy == "keydiff":  # to a softmax over the slots it is the same number for all
        without = double_scores(policy, keys, queries)[:, : sources * PAGE]
        assert not torch.allclose(without, scores, rtol=0.1), "the offset must matter"


@pytest.mark.parametrize("name", format_names())
def test_ten_compactions_lose_no_more_than_one(name, rng):
    """What a survivor reads back as after its first compaction it reads back as for good, bit for bit.

    And its first costs one quantisation at most, of the key around the common mean. Affine: no channel moves by more
    than the step of its row, and fp16 rounds the zero by 2^-11 of itself. Lloyd-Max: the mean squared error is the
    quantiser's distortion of the row's energy; rows that were on levels already are not the random rows of that figure,
    so up to twice. Signs are an unbiased estimate and no small one: for them the first claim stands alone.
    """
    memory = Memory(name, num_pages=128)
    budget, new = 4, 4
    memory.append(budget * PAGE)
    ids = torch.arange(budget * PAGE).repeat(HEADS, 1)
    # A token's chance to survive is its own: some stay for all ten rounds.
    worth = torch.rand(HEADS, 10_000)
    settled: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
    longest: dict[tuple[int, int], int] = {}
    first_keys: dict[tuple[int, int], torch.Tensor] = {}
    seen, squared, energy = budget * PAGE, 0.0, 0.0
    layout = memory.layout
    for number in range(10):
        memory.append(new * PAGE)
        ids = torch.cat([ids, torch.arange(seen, seen + new * PAGE).repeat(HEADS, 1)], dim=1)
        seen += new * PAGE
        keys, _ = memory.read()
        for head in range(HEADS):
            for slot, token in enumerate(ids[head].tolist()):
                first_keys.setdefault((head, token), keys[head, slot])
        scores = torch.stack([worth[head, ids[head]] for head in range(HEADS)])
        kept = memory.compact(Given(scores), budget + new, budget, protected=16, is_first=number == 0)
        ids = ids.gather(1, kept)
        assert ids[:, :16].tolist() == [list(range(16))] * HEADS, "what is protected stays in its own slots"
        keys, values = memory.read()
        fields = page_fields(memory.pages[memory.table], layout)
        for head in range(HEADS):
            for slot, token in enumerate(ids[head].tolist()):
                who = (head, token)
                longest[who] = longest.get(who, 0) + 1
                if who in settled:
                    assert torch.equal(settled[who][0], keys[head, slot])
                    assert torch.equal(settled[who][1], values[head, slot])
                    continue
                settled[who] = keys[head, slot], values[head, slot]
                error = (keys[head, slot] - first_keys[who]).double()
                squared += float(error.square().sum())
                if fields.k_mean is None:
                    assert not error.any()
                    continue
                page, offset = slot // PAGE, slot % PAGE
                mean = fields.k_mean[page, head].double()
                energy += float((first_keys[who].double() - mean).square().sum())
                if layout.keys.quantizer == "affine" and layout.keys.signs is None:
                    scale, zero = fields.k_scales[page, head, offset].double()
                    assert error.abs().max() <= scale + 2**-10 * zero.abs() + 1e-5
    assert max(longest.values()) == 10 and min(longest.values()) == 1
    print(f"{name}: squared error of the second quantisation {squared / max(energy, 1e-9):.4f} of the centred energy")
    if energy and layout.keys.quantizer == "lloyd-max" and layout.keys.signs is None:
        parts = layout.keys.parts
        most = max(lloyd_max.distortion(lloyd_max.levels(p.channels, p.bits), p.channels) for p in parts)
        assert 0 < squared <= 2 * most * energy


def test_scores_that_are_not_finite_are_refused_and_nothing_is_written():
    memory = Memory("oscar-int2")
    memory.append(6 * PAGE)
    pages = memory.pages.clone()
    scores = torch.rand(HEADS, memory.num_slots)
    scores[1, 40] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        memory.compact(Given(scores), 6, 2)
    with pytest.raises(ValueError, match="budget of 32 of 192 slots does not hold the 33"):
        memory.compact(Given(scores.nan_to_num()), 6, 1, protected=33)
    assert torch.equal(pages, memory.pages)
