# SPDX-License-Identifier: Apache-2.0
"""Kept episodes: what is found and what is not, who owns their blocks, and that shared ones are never written."""

import random
import secrets
from dataclasses import replace

import pytest
import torch
from vllm.v1.core.block_pool import BlockPool

from vllm_kvcompress.attention.pages import PageManager, PageSpec
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
    return Kept(digest(tokens, salt), len(tokens), eviction, {0: table}, end=2), blocks


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
    manager.begin_eviction("build", replace(EVICTION, keeps=True))
    manager.add_local_computed_blocks("build", (), 0, 0)
    prompt = 10 * PAGE
    for computed in range(0, prompt, 2 * PAGE):
        advance(manager, "build", computed, 2 * PAGE, prompt)
    assert advance(manager, "build", prompt, 1, prompt) is not None, "the last block of the prompt is compacted, too"
    begin, end = manager.evicted("build")
    table = manager.req_to_blocks["build"][: prompt // PAGE]
    tokens = [rng.randrange(1000) for _ in range(prompt)]
    kept = Kept(digest(tokens, None), prompt, EVICTION, {0: table}, end)
    store.keep("a", kept)
    manager.end_eviction("build")
    manager.free("build")
    shared = {block.block_id for block in kept.blocks}
    assert begin == 3 and pool.get_num_free_blocks() == free - len(shared)

    for name in ("not admitted", "question"):
        manager.begin_eviction(name, EVICTION)
        assert store.find("a", [*tokens, 1], None, EVICTION) is kept
        manager.adopt(name, table, end)
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
    manager.begin_eviction("q", EVICTION)
    manager.adopt("q", blocks, 0)
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
