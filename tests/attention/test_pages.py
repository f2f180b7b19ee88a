# SPDX-License-Identifier: Apache-2.0
"""The manager of pages with vLLM's own block pool, without an engine: random steps of requests that evict, or do not.

What is in a page is modelled too: who wrote it. A compaction that reads a page which others have written since, or a
step that reads one it does not own, is found here, whatever numbers an engine would make of it.
"""

import random
import secrets
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch
from vllm.v1.core.block_pool import BlockPool

from vllm_kvcompress.attention.pages import PageManager, PageSpec
from vllm_kvcompress.episodic.request import Eviction

PAGE = 16
NULL = 0


@dataclass
class Sequence:
    """A request: its prompt, what it has generated, and how much of both is in the cache."""

    name: str
    prompt: int
    length: int
    most: int
    eviction: Eviction | None
    computed: int = 0
    processed: int = 0
    """What the scheduler knows to be computed: a step behind where steps are scheduled ahead"""
    filled: dict[int, int] = field(default_factory=dict)
    """place in the table -> tokens in that page"""
    nulls: tuple[int, int] = (0, 0)

    @property
    def private(self) -> SimpleNamespace:
        extra = None if self.eviction is None else {"kvcompress_budget": 1}
        return SimpleNamespace(request_id=self.name, sampling_params=SimpleNamespace(extra_args=extra))


class Engine:
    """Schedules random steps and carries them out on pages that know their writer."""

    def __init__(self, rng: random.Random, blocks: int, step_tokens: int, lags: bool, share: float = 1.0) -> None:
        spec = PageSpec(block_size=PAGE, num_kv_heads=1, head_size=64, dtype=torch.uint8, budget_share=share)
        self.rng, self.step_tokens, self.lags = rng, step_tokens, lags
        self.pool = BlockPool(blocks, enable_caching=True, hash_block_size=PAGE)
        self.manager = PageManager(
            spec, block_pool=self.pool, enable_caching=True, kv_cache_group_id=0, scheduler_block_size=PAGE
        )
        self.free = self.pool.get_num_free_blocks()
        self.writer: dict[int, str] = {}
        self.running: list[Sequence] = []
        self.waiting: list[Sequence] = []
        self.preemptions = self.compactions = self.peak = 0

    def table(self, sequence: Sequence) -> list[int]:
        return [block.block_id for block in self.manager.req_to_blocks.get(sequence.name, ())]

    def add(self, sequence: Sequence) -> None:
        if sequence.eviction is not None:
            self.manager.begin_eviction(sequence.name, sequence.eviction, lambda: sequence.computed)
            sequence.eviction = sequence.eviction.share(self.manager.kv_cache_spec.budget_share, PAGE)
        self.waiting.append(sequence)

    def end(self, sequence: Sequence) -> None:
        """Finished or aborted, as vLLM's scheduler goes about it."""
        self.manager.remove_skipped_blocks(sequence.name, sequence.processed, sequence.prompt)
        if sequence.eviction is not None:
            self.manager.end_eviction(sequence.name)
        self.manager.free(sequence.name)

    def preempt(self, sequence: Sequence) -> None:
        self.manager.free(sequence.name)
        sequence.computed, sequence.processed, sequence.filled, sequence.nulls = 0, 0, {}, (0, 0)
        self.running.remove(sequence)
        self.waiting.insert(0, sequence)
        self.preemptions += 1

    def step(self) -> None:
        """Schedule, compact, write, generate."""
        scheduled: dict[str, tuple[Sequence, int]] = {}
        # A request may be asked for what it skips again, when others have been preempted for it.
        self.before = {sequence.name: self.table(sequence) for sequence in self.running}
        for sequence in list(self.running):
            if sequence not in self.running:
                continue  # preempted for another
            while not self.schedule(sequence, scheduled):
                victim = self.running[-1]
                self.preempt(victim)
                scheduled.pop(victim.name, None)
                if victim is sequence:
                    break
        while self.waiting and self.rng.random() < 0.7 and len(self.running) < 6:
            sequence = self.waiting[0]
            wanted = self.manager.get_num_blocks_to_allocate(
                sequence.name, sequence.length, (), 0, 0, sequence.length, apply_admission_cap=True
            )
            if sequence.eviction is not None:
                assert wanted <= sequence.eviction.peak_pages(PAGE)
            if wanted > self.pool.get_num_free_blocks() or not self.schedule(sequence, scheduled):
                break
            self.waiting.pop(0)
            self.running.append(sequence)
        self.execute(scheduled)

    def schedule(self, sequence: Sequence, scheduled: dict) -> bool:
        left = sequence.length - sequence.computed
        new = left if left == 1 else self.rng.choice([min(left, self.step_tokens), self.rng.randint(1, left)])
        new = min(new, self.step_tokens)
        total = sequence.computed + new
        self.manager.remove_skipped_blocks(sequence.name, sequence.processed, sequence.prompt)
        wanted = self.manager.get_num_blocks_to_allocate(
            sequence.name, total, (), sequence.computed, sequence.computed, total
        )
        if wanted > self.pool.get_num_free_blocks():
            return False
        fresh = self.manager.allocate_new_blocks(sequence.name, total, total)
        assert len(fresh) == wanted
        if sequence.eviction is not None:
            self.manager.cache_blocks(sequence.private, total, replay_boundaries=())
        scheduled[sequence.name] = (sequence, new)
        return True

    def execute(self, scheduled: dict) -> None:
        due = self.manager.take_compactions()
        assert len({compaction.request_id for compaction in due}) == len(due)
        for compaction in due:
            sequence, _ = scheduled[compaction.request_id]  # never of a request that is not in the step
            self.compact(sequence, compaction, self.before[sequence.name])
        for sequence, new in scheduled.values():
            table = self.table(sequence)
            for position in range(sequence.computed, sequence.computed + new):
                place = position // PAGE
                assert table[place] != NULL, "what is written is lost"
                self.writer[table[place]] = sequence.name
                sequence.filled[place] = position % PAGE + 1
            sequence.processed = sequence.computed if self.lags else sequence.computed + new
            sequence.computed += new
            if sequence.computed == sequence.length:
                sequence.length += 1
        self.check()
        for sequence in list(self.running):
            if sequence.length > sequence.most or self.rng.random() < 0.002:
                self.running.remove(sequence)
                self.end(sequence)

    def compact(self, sequence: Sequence, compaction, before: list[int]) -> None:
        eviction, begin, end = sequence.eviction, compaction.begin, compaction.end
        assert eviction is not None and compaction.eviction == eviction
        budget = eviction.budget_pages
        assert begin == max(budget, sequence.nulls[1]) and end > begin
        assert list(compaction.freed) == before[begin:end]
        for place in [*range(budget), *range(begin, end)]:
            assert sequence.filled[place] == PAGE, "a source that is not full"
            assert before[place] != NULL and self.writer[before[place]] == sequence.name, "a source that others wrote"
        # What is read at its position stays: the recent window, counted from what was computed before this step.
        assert end * PAGE <= sequence.computed - eviction.recent_tokens
        # The next page begun may ask the last one that was for its mean.
        assert end < -(-sequence.computed // PAGE)
        for place in range(begin, end):
            del sequence.filled[place]
        sequence.nulls = (budget, end)
        self.compactions += 1

    def check(self) -> None:
        owners: dict[int, str] = {}
        for sequence in self.running:
            table = self.table(sequence)
            live = [page for page in table if page != NULL]
            for page in live:
                assert owners.setdefault(page, sequence.name) == sequence.name
                assert self.writer[page] == sequence.name, "it would read what others wrote"
            assert len(set(live)) == len(live)
            assert [place for place, page in enumerate(table) if page == NULL] == [*range(*sequence.nulls)]
            if sequence.eviction is not None:
                assert self.manager.evicted(sequence.name) == sequence.nulls
                blocks = self.manager.req_to_blocks[sequence.name]
                assert all(block.block_hash is None and block.ref_cnt == 1 for block in blocks if not block.is_null)
                peak = sequence.eviction.peak_pages(PAGE)
                assert len(live) <= peak, f"{len(live)} pages, {peak} at most: {sequence}"
                self.peak = max(self.peak, len(live))
            else:
                assert len(live) == len(table)
        assert self.pool.get_num_free_blocks() == self.free - len(owners)


def random_sequence(rng: random.Random, number: int, step_tokens: int, room: int, share: float) -> Sequence:
    prompt, output = rng.randint(1, 600), rng.choice([1, 5, 100, 400])
    eviction = None
    if rng.random() < 0.8:
        eviction = Eviction(rng.randint(1, 6), "streaming", (), 0, rng.choice([0, 1, 15, 16, 17, 40]), step_tokens)
        if eviction.share(share, PAGE).peak_pages(PAGE) > room:
            eviction = None
    if eviction is None:  # must fit the pool whole
        prompt, output = min(prompt, PAGE * room // 2), min(output, PAGE * room // 2 - 1)
    return Sequence(f"r{number}", prompt, prompt, prompt + output, eviction)


@pytest.mark.parametrize("lags", [False, True], ids=["in step", "a step ahead"])
@pytest.mark.parametrize("blocks", [30, 60, 400])
def test_random_steps(blocks, lags):
    """Prefill chunks, decodes, preemptions, aborts: pages bounded, owned once, read by their writer, all back."""
    seed = secrets.randbits(32)
    print(f"seed {seed}")  # shown by pytest when the test fails
    rng = random.Random(seed)
    preemptions = compactions = 0
    for _ in range(6):
        step_tokens = rng.choice([8, 16, 40, 64, 100])
        share = rng.choice([1.0, 0.25, 0.7, 1.9])
        engine = Engine(rng, blocks, step_tokens, lags, share)
        for number in range(rng.randint(4, 12)):
            engine.add(random_sequence(rng, number, step_tokens, blocks - 1, share))
        for _ in range(20_000):
            if not engine.running and not engine.waiting:
                break
            engine.step()
        assert not engine.running and not engine.waiting, "they never finish"
        assert engine.pool.get_num_free_blocks() == engine.free
        assert not engine.manager.req_to_blocks and not engine.manager.take_compactions()
        preemptions += engine.preemptions
        compactions += engine.compactions
    assert compactions > 0
    # Of six engines with up to twelve requests, whose prompts alone have 20 pages on average, before eviction.
    assert preemptions > 0 or blocks > 30, "a small pool must have been too small once"


def test_the_bound_is_reached():
    """A prompt in whole blocks holds all that `peak_pages` counts but one: then the bound is no idle one."""
    engine = Engine(random.Random(0), 200, 64, lags=False)
    eviction = Eviction(4, "streaming", (), 0, 16, 64)
    engine.add(Sequence("r", 1600, 1600, 1700, eviction))
    engine.rng.random = lambda: 0.5  # type: ignore[method-assign]
    engine.rng.choice = lambda options: options[0]  # type: ignore[method-assign, assignment]
    while engine.running or engine.waiting:
        engine.step()
    assert eviction.peak_pages(PAGE) - 1 <= engine.peak <= eviction.peak_pages(PAGE)


@pytest.mark.parametrize(
    ("share", "protected", "kept"), [(1.0, 0, 8), (0.25, 0, 2), (1.7, 0, 14), (0.25, 2 * PAGE, 3), (0.1, 1, 2)]
)
def test_a_group_keeps_its_share_of_the_budget(share, protected, kept):
    """Rounded to pages, but at least one beside those of what is protected."""
    engine = Engine(random.Random(0), 200, 64, lags=False, share=share)
    engine.add(Sequence("r", 1600, 1600, 1610, Eviction(8, "streaming", (), protected, 16, 64)))
    engine.rng.random = lambda: 0.5  # type: ignore[method-assign]
    engine.rng.choice = lambda options: options[0]  # type: ignore[method-assign, assignment]
    for _ in range(30):
        engine.step()
    assert engine.compactions and engine.manager.evicted("r")[0] == kept


def test_layers_of_different_shares_are_groups_apart():
    """vLLM merges specs that differ in nothing it knows: pages of one share are never taken for another's."""
    specs = [PageSpec(block_size=PAGE, num_kv_heads=1, head_size=64, dtype=torch.uint8, budget_share=s) for s in (1, 2)]
    assert PageSpec.merge([specs[1]] * 3) == specs[1]
    with pytest.raises(AssertionError, match="different budgets"):
        PageSpec.merge(specs)
    assert specs[0].is_uniform_with_collection({"a": specs[0], "b": specs[0]})
    assert not specs[0].is_uniform_with_collection({"a": specs[0], "b": specs[1]})


def test_what_is_due_when_a_request_ends_is_not_done():
    """vLLM asks a finished request for what it skips once more, after which nobody could carry it out."""
    engine = Engine(random.Random(0), 100, 64, lags=False)
    sequence = Sequence("r", 320, 320, 330, Eviction(2, "streaming", (), 0, 16, 64))
    engine.add(sequence)
    engine.rng.random = lambda: 0.5  # type: ignore[method-assign]
    engine.rng.choice = lambda options: options[0]  # type: ignore[method-assign, assignment]
    for _ in range(3):
        engine.step()
    engine.manager.remove_skipped_blocks("r", sequence.processed, sequence.prompt)
    assert engine.manager._due
    engine.end(sequence)
    assert engine.manager.take_compactions() == []
    assert engine.pool.get_num_free_blocks() == engine.free


@pytest.mark.parametrize("lags", [False, True], ids=["in step", "a step ahead"])
@pytest.mark.parametrize("recent", [0, 16])
def test_nothing_is_due_when_a_request_ends_right_after_its_prompt(lags, recent):
    """A prompt of whole pages is compacted with the first token after it, and its second is no reason to do it again.

    Or a history that was read for its pages could not keep them: what is due at the end is carried out by nobody.
    """
    engine = Engine(random.Random(0), 100, 64, lags)
    sequence = Sequence("r", 320, 320, 322, Eviction(2, "streaming", (), 0, recent, 64))
    engine.add(sequence)
    engine.rng.random = lambda: 0.5  # type: ignore[method-assign]
    engine.rng.choice = lambda options: options[0]  # type: ignore[method-assign, assignment]
    while sequence.computed < 321:
        engine.step()
    assert engine.manager.evicted("r") == (2, 18)
    engine.manager.remove_skipped_blocks("r", sequence.processed, sequence.prompt)
    assert not engine.manager.is_due("r")


def test_a_budget_that_is_not_exceeded_changes_nothing():
    engine = Engine(random.Random(0), 100, 64, lags=False)
    sequence = Sequence("r", 320, 320, 420, Eviction(30, "streaming", (), 0, 16, 64))
    engine.add(sequence)
    while engine.running or engine.waiting:
        engine.step()
    assert engine.compactions == 0


@pytest.mark.parametrize("lags", [False, True], ids=["in step", "a step ahead"])
def test_what_was_generated_is_read_again_within_the_bound(lags):
    """A preempted request reads its own long answer again in blocks, as it does a prompt."""
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    for _ in range(20):
        step_tokens = rng.choice([16, 40, 64, 100])
        engine = Engine(rng, 200, step_tokens, lags)
        eviction = Eviction(rng.randint(1, 6), "streaming", (), 0, rng.choice([0, 1, 16, 17, 40]), step_tokens)
        sequence = Sequence("r", 50, 50, 1200, eviction)
        engine.add(sequence)
        at = rng.randint(500, 1000)
        while engine.running or engine.waiting:
            engine.step()  # which checks the bound
            if sequence.length == at and sequence in engine.running:
                engine.preempt(sequence)
                at = 0
