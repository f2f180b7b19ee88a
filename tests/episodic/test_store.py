# SPDX-License-Identifier: Apache-2.0
"""Kept episodes: what is found and what is not, who owns and writes their blocks, and what host memory has of them."""

import random
import secrets
from dataclasses import replace

import pytest
import torch
from vllm.v1.core.block_pool import BlockPool

from vllm_kvcompress.attention.pages import PageManager, PageSpec
from vllm_kvcompress.episodic.host import Copy
from vllm_kvcompress.episodic.request import Eviction
from vllm_kvcompress.episodic.store import EpisodeStore, Kept, digest

PAGE = 16
EVICTION = Eviction(
    budget_pages=3, policy="keydiff", guide=(), protected_tokens=4, recent_tokens=20, block_tokens=4 * PAGE
)


@pytest.fixture
def pool():
    return BlockPool(40, enable_caching=True, hash_block_size=PAGE)


def entry(pool, tokens, salt=None, eviction=EVICTION):
    """Kept of a request that has finished since."""
    blocks = pool.get_new_blocks(len(tokens) // PAGE)
    table = [blocks[0], pool.null_block, *blocks[1:]]
    return Kept(digest(tokens, salt), len(tokens), eviction, {0: table}), blocks


def test_found_for_the_same_beginning_only(pool):
    store, tokens = EpisodeStore(pool), [secrets.randbelow(1 << 17) for _ in range(3 * PAGE)]
    kept, _ = entry(pool, tokens, "tenant")
    store.keep("a", kept)
    longer = [*tokens, 7]
    assert store.find("a", longer, "tenant", EVICTION) is kept
    changed = list(longer)
    changed[secrets.randbelow(len(tokens))] ^= 1
    for name, history, salt, eviction in (
        ("b", longer, "tenant", EVICTION),
        ("a", changed, "tenant", EVICTION),
        ("a", tokens, "tenant", EVICTION),  # nothing is left to compute
        ("a", longer, "another", EVICTION),
        ("a", longer, None, EVICTION),
        ("a", longer, "tenant", replace(EVICTION, budget_pages=4)),
        ("a", longer, "tenant", replace(EVICTION, policy="snapkv")),
        ("a", longer, "tenant", replace(EVICTION, guide=(1,))),
    ):
        assert store.find(name, history, salt, eviction) is None
    # Whoever keeps and whoever asks differ in nothing that decides what is kept.
    assert store.find("a", longer, "tenant", replace(EVICTION, keeps=True)) is kept


def test_no_salt_is_not_the_salt_of_that_name():
    assert len({digest([1], salt) for salt in (None, "None", "", "1")}) == 4


def test_blocks_live_as_long_as_the_entry_or_a_request(pool):
    store, free = EpisodeStore(pool), pool.get_num_free_blocks()
    kept, blocks = entry(pool, list(range(3 * PAGE)))
    store.keep("a", kept)
    pool.free_blocks(blocks)  # the request that made them
    assert pool.get_num_free_blocks() == free - 3
    store.keep("a", kept)  # made anew out of the same blocks
    assert [block.ref_cnt for block in blocks] == [1, 1, 1] and len(store) == 1
    pool.touch(blocks)  # a question
    store.clear()
    assert pool.get_num_free_blocks() == free - 3 and len(store) == 0
    pool.free_blocks(blocks)
    assert pool.get_num_free_blocks() == free


def test_the_least_recently_used_gives_way_but_not_what_is_on_offer(pool):
    store, free = EpisodeStore(pool), pool.get_num_free_blocks()
    histories = {name: [ord(name)] * (3 * PAGE) for name in "abc"}
    for name, tokens in histories.items():
        kept, blocks = entry(pool, tokens)
        store.keep(name, kept)
        pool.free_blocks(blocks)
    assert store.find("a", [*histories["a"], 0], None, EVICTION)  # the latest now, and on offer
    store.make_room(free - 9)
    assert len(store) == 3, "there was room already"
    store.make_room(free - 8)
    assert len(store) == 2 and store.find("b", [*histories["b"], 0], None, EVICTION) is None
    assert (store.num_spilled, store.num_lost) == (0, 1), "there is no host memory"
    store.make_room(free)
    assert len(store) == 1, "what is on offer stays though room is short"
    store.settle()
    store.make_room(free)
    assert len(store) == 0 and pool.get_num_free_blocks() == free


def manager_of(pool):
    spec = PageSpec(block_size=PAGE, num_kv_heads=1, head_size=64, dtype=torch.uint8)
    return PageManager(spec, block_pool=pool, enable_caching=True, kv_cache_group_id=0, scheduler_block_size=PAGE)


def advance(manager, name, computed, new, prompt):
    """One step of a request, as vLLM's manager goes about it; the compaction it made due, if any."""
    manager.remove_skipped_blocks(name, computed, prompt)
    wanted = manager.get_num_blocks_to_allocate(name, computed + new, (), computed, computed, computed + new)
    assert wanted <= manager.block_pool.get_num_free_blocks()
    manager.allocate_new_blocks(name, computed + new, computed + new)
    due = manager.take_compactions()
    assert len(due) <= 1
    return due[0] if due else None


def ids(blocks):
    return [block.block_id for block in blocks]


def test_a_question_takes_over_the_pages_and_replaces_them_before_they_would_be_written(pool):
    rng = random.Random(seed := secrets.randbits(32))
    print("seed", seed)
    manager, free = manager_of(pool), pool.get_num_free_blocks()
    store = EpisodeStore(pool)
    manager.begin_eviction("build", replace(EVICTION, keeps=True), lambda: 0)
    manager.add_local_computed_blocks("build", (), 0, 0)
    prompt = 10 * PAGE
    for computed in range(0, prompt, 2 * PAGE):
        advance(manager, "build", computed, 2 * PAGE, prompt)
    assert advance(manager, "build", prompt, 1, prompt) is not None, "the last block of the prompt is compacted, too"
    begin, _ = manager.evicted("build")
    table = manager.req_to_blocks["build"][: prompt // PAGE]
    tokens = [rng.randrange(1000) for _ in range(prompt)]
    kept = Kept(digest(tokens, None), prompt, EVICTION, {0: table})
    store.keep("a", kept)
    manager.end_eviction("build")
    manager.free("build")
    shared = {block.block_id for block in kept.blocks}
    assert begin == 3 and pool.get_num_free_blocks() == free - len(shared)

    for name in ("not admitted", "question"):
        manager.begin_eviction(name, EVICTION, lambda: 0)
        assert store.find("a", [*tokens, 1], None, EVICTION) is kept
        manager.adopt(name, table)
        wanted = manager.get_num_blocks_to_allocate(name, prompt + 5, (), prompt, 0, prompt + 5)
        assert wanted == 1, "only what is new needs a page"
        if name == "question":
            manager.add_local_computed_blocks(name, (), 0, prompt)
            manager.allocate_external_computed_blocks(name, 0, prompt)
            manager.allocate_new_blocks(name, prompt + 5, prompt + 5)
        manager.withdraw_offers()
        store.settle()
    assert manager.evicted("not admitted") == (0, 0) and manager.offered("not admitted") == 0
    manager.end_eviction("not admitted")
    assert ids(manager.req_to_blocks["question"])[: len(table)] == ids(table)

    total = prompt + 5
    compactions = []
    for computed in range(total, total + 8 * PAGE):  # an answer, token by token
        due = advance(manager, "question", computed, 1, total)
        own = [block for block in manager.req_to_blocks["question"] if not block.is_null]
        if due is not None:
            compactions.append(due)
            targets = ids(own[:3])
            assert not shared & set(targets), "survivors are written to pages of the request's own"
            assert len(compactions) > 1 or set(due.kept) <= shared, "and read from the shared ones, the first time"
        # The copy comes on top of a block, once.
        assert len(own) <= EVICTION.peak_pages(PAGE)
    assert compactions and manager.replaced("question") == (table[0].block_id, tuple(ids(own[:3])))
    assert all(block.ref_cnt == 1 for block in kept.blocks), "only the entry owns them now"
    manager.end_eviction("question")
    manager.free("question")
    store.clear()
    assert pool.get_num_free_blocks() == free


def test_without_room_for_the_copy_the_compaction_waits(pool):
    manager, tokens = manager_of(pool), list(range(6 * PAGE))
    _, blocks = entry(pool, tokens)
    manager.begin_eviction("q", EVICTION, lambda: 0)
    manager.adopt("q", blocks)
    manager.add_local_computed_blocks("q", (), 0, len(tokens))
    manager.allocate_external_computed_blocks("q", 0, len(tokens))
    manager.withdraw_offers()
    # Four pages more and the budget and a block are exceeded; two are left then, and the copy takes three.
    hoard = pool.get_new_blocks(pool.get_num_free_blocks() - 6)
    for computed in range(len(tokens), len(tokens) + 5 * PAGE):
        assert advance(manager, "q", computed, 1, len(tokens)) is None
    pool.free_blocks(hoard)
    due = advance(manager, "q", len(tokens) + 5 * PAGE, 1, len(tokens))
    assert due is not None and list(due.kept) == ids(blocks[:3])


def test_an_episode_that_gives_way_to_its_only_question_is_not_copied(pool):
    """Or a question for which there is no room beside its episode would begin anew for ever."""
    manager, tokens, store = manager_of(pool), list(range(6 * PAGE)), EpisodeStore(pool, host_slots=6)
    manager.make_room = store.make_room
    blocks = pool.get_new_blocks(6)
    store.keep("a", Kept(digest(tokens, None), len(tokens), EVICTION, {0: blocks}))
    pool.free_blocks(blocks)
    manager.begin_eviction("q", EVICTION, lambda: 0)
    assert store.find("a", [*tokens, 1], None, EVICTION)
    manager.adopt("q", blocks)
    manager.add_local_computed_blocks("q", (), 0, len(tokens))
    manager.allocate_external_computed_blocks("q", 0, len(tokens))
    manager.withdraw_offers()
    assert store.settle() == ([], [])
    # All is taken but for what the answer needs until its compaction is due: too little to copy three pages.
    pool.get_new_blocks(pool.get_num_free_blocks() - 5)
    due, computed = None, len(tokens)
    while due is None:
        due = advance(manager, "q", computed, 1, len(tokens))
        computed += 1
    assert list(due.kept) == ids(blocks[:3]) == ids(manager.req_to_blocks["q"][:3])
    assert manager.replaced("q")[1] == ()
    assert store.settle()[0] == [Copy(ids(blocks), list(range(6)))], "as it was before the compaction"


def test_whose_scores_entries_begin_with(pool):
    """While they are there or in host memory; not of those that were replaced or have given way."""
    store, kept = EpisodeStore(pool, host_slots=4), {}
    for name, scorer in (("a", "one"), ("a", "two"), ("b", "two"), ("c", "three")):
        found, blocks = entry(pool, list(range(4 * PAGE)))
        store.keep(name, replace(found, summed=(scorer, PAGE)))
        pool.free_blocks(blocks)
        kept[name] = scorer
    assert store.scorers() == {"two", "three"} == set(kept.values())
    store.make_room(pool.get_num_free_blocks() + 1)  # "a" is spilled
    assert store.scorers() == {"two", "three"}
    store.make_room(pool.get_num_free_blocks() + 8)  # the others, and there is room for one
    assert store.scorers() == {"three"} and len(store) == 1
    store.clear()
    assert store.scorers() == set()


# --- host memory ------------------------------------------------------------------------------------------------------


def keep(store, pool, name, pages=3):
    """An entry that no request has; its tokens."""
    tokens = [ord(name)] * (pages * PAGE)
    kept, blocks = entry(pool, tokens)
    store.keep(name, kept)
    pool.free_blocks(blocks)
    return tokens


def ask(store, name, tokens):
    return store.find(name, [*tokens, 0], None, EVICTION)


def spill_all(store, pool):
    store.make_room(pool.num_gpu_blocks)
    return store.settle()


def test_what_gives_way_is_stored_and_what_is_asked_for_comes_back(pool):
    store, free = EpisodeStore(pool, host_slots=8), pool.get_num_free_blocks()
    tokens = keep(store, pool, "a")
    before = ids(ask(store, "a", tokens).blocks)
    assert not store.is_arriving("a") and store.settle() == ([], [])
    assert store.block_ids(0) == set(before)
    (stored,), loads = spill_all(store, pool)
    assert stored.blocks == before and len(set(stored.slots)) == 3 and not loads
    assert len(store) == 1 and pool.get_num_free_blocks() == free and store.block_ids(0) == set()
    # The same checks as of one that is in the pool.
    changed = list(tokens)
    changed[secrets.randbelow(len(tokens))] ^= 1
    for history, salt, eviction in (
        ([*changed, 0], None, EVICTION),
        (tokens, None, EVICTION),
        ([*tokens, 0], "another", EVICTION),
        ([*tokens, 0], None, replace(EVICTION, budget_pages=4)),
    ):
        assert store.find("a", history, salt, eviction) is None
    found = ask(store, "a", tokens)
    assert [block.is_null for block in found.tables[0]] == [False, True, False, False]
    assert ask(store, "a", tokens) is found and store.is_arriving("a"), "two questions in a step share the pages"
    for _ in range(2):
        pool.touch(found.blocks)
    stores, (loaded,) = store.settle()
    assert not stores and loaded.blocks == ids(found.blocks) and loaded.slots == stored.slots
    assert ask(store, "a", tokens) is found and not store.is_arriving("a"), "it is kept as it was before"
    assert pool.get_num_free_blocks() == free - 3


def test_a_question_that_is_not_admitted_has_nothing_loaded(pool):
    store, free = EpisodeStore(pool, host_slots=3), pool.get_num_free_blocks()
    tokens = keep(store, pool, "a")
    (stored,), _ = spill_all(store, pool)
    for _ in range(3):
        assert ask(store, "a", tokens) and pool.get_num_free_blocks() == free - 3
        assert store.settle() == ([], []) and pool.get_num_free_blocks() == free
    # Nor is it found while there is no room for it.
    hoard = pool.get_new_blocks(free - 2)
    assert ask(store, "a", tokens) is None and store.settle() == ([], [])
    pool.free_blocks(hoard[:1])
    pool.touch(ask(store, "a", tokens).blocks)
    assert store.settle()[1][0].slots == stored.slots


def test_spilled_and_asked_for_in_one_step(pool):
    store = EpisodeStore(pool, host_slots=3)
    tokens = keep(store, pool, "a")
    store.make_room(pool.num_gpu_blocks)
    found = ask(store, "a", tokens)
    pool.touch(found.blocks)
    (stored,), (loaded,) = store.settle()
    assert stored.slots == loaded.slots and loaded.blocks == ids(found.blocks)


def test_the_least_recently_used_gives_way_in_host_memory_too(pool):
    store, free = EpisodeStore(pool, host_slots=7), pool.get_num_free_blocks()
    tokens = {name: keep(store, pool, name) for name in "abc"}
    ask(store, "a", tokens["a"])
    store.settle()  # the order is b, c, a
    stores, _ = spill_all(store, pool)
    assert len(store) == 2 and pool.get_num_free_blocks() == free
    assert (store.num_spilled, store.num_lost) == (3, 1)
    assert set(stores[2].slots) & set(stores[0].slots) and not set(stores[2].slots) & set(stores[1].slots)
    assert ask(store, "b", tokens["b"]) is None
    # Who asks for the least recently used makes room by others, and not by the one asked for.
    pool.get_new_blocks(free - 3)
    tokens["d"] = keep(store, pool, "d")
    found = ask(store, "c", tokens["c"])
    pool.touch(found.blocks)
    (stored,), (loaded,) = store.settle()
    assert set(loaded.slots) == set(stores[1].slots) and not set(stored.slots) & set(loaded.slots)
    assert {name for name in "abcd" if ask(store, name, tokens[name])} == {"c"}, "no room for d; a was dropped for it"
    assert (store.num_spilled, store.num_lost) == (4, 2)
    store.settle()
    store.clear()
    pool.free_blocks(found.blocks)
    assert ask(store, "d", tokens["d"]) is None and len(store) == 0


def test_an_entry_larger_than_host_memory_is_dropped_and_no_other_for_it(pool):
    store = EpisodeStore(pool, host_slots=4)
    tokens = {name: keep(store, pool, name, pages) for name, pages in (("a", 3), ("b", 5))}
    stores, _ = spill_all(store, pool)
    assert len(stores) == len(store) == 1 and ask(store, "b", tokens["b"]) is None and ask(store, "a", tokens["a"])
    assert (store.num_spilled, store.num_lost) == (1, 1)


def test_one_made_anew_or_cleared_leaves_nothing_in_host_memory(pool):
    store, free = EpisodeStore(pool, host_slots=3), pool.get_num_free_blocks()
    for _ in range(3):
        tokens = keep(store, pool, "a")
        assert len(spill_all(store, pool)[0]) == 1
    store.clear()
    assert len(store) == 0 and ask(store, "a", tokens) is None
    keep(store, pool, "b")
    assert len(spill_all(store, pool)[0]) == 1, "the slots are free again"
    assert pool.get_num_free_blocks() == free


class Contents:
    """Steps of requests on a pool whose blocks, and slots of host memory, know what was written to them."""

    def __init__(self, rng, blocks, slots):
        self.rng, self.slots = rng, slots
        self.pool = BlockPool(blocks, enable_caching=True, hash_block_size=PAGE)
        self.store, self.free = EpisodeStore(self.pool, slots), self.pool.get_num_free_blocks()
        self.written, self.host, self.count = {}, {}, 0
        self.requests, self.questions, self.episodes = [], [], {}
        self.loads = self.stores = self.lost = 0

    def take(self, number):
        """Blocks for a request, if there is room."""
        self.store.make_room(number)
        return self.pool.get_new_blocks(number) if self.pool.get_num_free_blocks() >= number else []

    def fill(self, blocks):
        for block in blocks:
            self.count += 1
            self.written[block.block_id] = self.count

    def compact(self, blocks):
        """Half of a request's blocks go, as their survivors do to the others: what is read, and what gets it."""
        read = {block.block_id: self.written[block.block_id] for block in blocks}
        freed = blocks[len(blocks) // 2 :]
        del blocks[len(blocks) // 2 :]
        self.pool.free_blocks(freed)
        return read, list(blocks)

    def step(self):
        rng, fresh, compactions = self.rng, [], []
        large = [blocks for blocks in self.requests if len(blocks) > 1]
        rng.shuffle(large)
        for action in rng.choices(["request", "compact", "question"], weights=[4, 2, 6], k=rng.randint(0, 4)):
            if action == "request":
                blocks = self.take(rng.randint(2, 9))
                fresh += [blocks] if blocks else []
            elif action == "compact" and large:
                compactions.append(self.compact(large.pop()))
            elif action == "question" and self.episodes:
                name = rng.choice(list(self.episodes))
                tokens, expected = self.episodes[name]
                found = ask(self.store, name, tokens)
                self.lost += found is None
                if found is not None and rng.random() < 0.7:
                    self.pool.touch(found.blocks)
                    self.questions.append((found.blocks, expected))
        stores, loads = self.store.settle()
        self.stores, self.loads = self.stores + len(stores), self.loads + len(loads)
        for copy in stores:
            self.host |= {slot: self.written[block] for block, slot in zip(copy.blocks, copy.slots, strict=True)}
        for read, targets in compactions:
            assert all(self.written[block] == content for block, content in read.items()), "a source was overwritten"
            self.fill(targets)
        for copy in loads:
            self.written |= {block: self.host[slot] for block, slot in zip(copy.blocks, copy.slots, strict=True)}
        for blocks in fresh:
            self.fill(blocks)
        self.requests += fresh
        self.check()
        self.finish()

    def finish(self):
        rng = self.rng
        for blocks in [blocks for blocks in self.requests if rng.random() < 0.5]:
            self.requests = [other for other in self.requests if other is not blocks]
            if rng.random() < 0.7:
                name, tokens = rng.choice("abcdef"), [rng.randrange(1000) for _ in range(PAGE)]
                tables = {0: blocks[:1], 1: [self.pool.null_block, *blocks[1:]]}
                kept = Kept(digest(tokens, None), PAGE, EVICTION, tables)
                self.store.keep(name, kept)
                self.episodes[name] = tokens, [self.written[block.block_id] for block in blocks]
            self.pool.free_blocks(blocks)
        for blocks, _ in [question for question in self.questions if rng.random() < 0.3]:
            self.questions = [question for question in self.questions if question[0] is not blocks]
            self.pool.free_blocks(blocks)
        if rng.random() < 0.01:
            self.store.clear()

    def check(self):
        for blocks, expected in self.questions:
            assert [self.written[block.block_id] for block in blocks] == expected
        for name, kept in self.store._entries.items():
            assert [self.written[block.block_id] for block in kept.blocks] == self.episodes[name][1]
        spilled = [slot for found in self.store._spilled.values() for slot in found.slots]
        assert sorted([*spilled, *self.store._free_slots]) == list(range(self.slots))
        owners = [*self.requests, *(blocks for blocks, _ in self.questions)]
        owners += [kept.blocks for kept in self.store._entries.values()]
        owned = {block.block_id for blocks in owners for block in blocks}
        assert self.pool.get_num_free_blocks() == self.free - len(owned)


@pytest.mark.parametrize("slots", [0, 10, 30, 200])
def test_random_steps(slots):
    """Requests that need room, questions that are admitted or not, compactions, episodes made anew: every page holds
    what was written to it, for whoever has it, and none is lost."""
    rng = random.Random(seed := secrets.randbits(32))
    print("seed", seed)
    contents = Contents(rng, 40, slots)
    for _ in range(3000):
        contents.step()
    # In 3000 steps of two actions each, on a pool that a few requests fill.
    assert (contents.stores > 0 and contents.loads > 0) == (slots > 0) and contents.lost > 0
    for blocks in [*contents.requests, *(blocks for blocks, _ in contents.questions)]:
        contents.pool.free_blocks(blocks)
    contents.store.clear()
    assert contents.pool.get_num_free_blocks() == contents.free
