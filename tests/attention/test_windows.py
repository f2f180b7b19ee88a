# SPDX-License-Identifier: Apache-2.0
"""The companion's block manager against vLLM's real block pool: what it holds, frees, caches and promises."""

import random

import pytest
import torch
from vllm.utils.math_utils import cdiv
from vllm.v1.core.block_pool import BlockPool

from vllm_kvcompress.attention.windows import ROLLBACK_SLACK_TOKENS, WindowManager, WindowSpec

BLOCK = 16


def make(sinks=32, recent=64, batches=1, blocks=500, max_len=8192, in_flight=8192):
    spec = WindowSpec(
        block_size=BLOCK,
        num_kv_heads=1,
        head_size=64,
        dtype=torch.uint8,
        sliding_window=recent + 1,
        sink_tokens=sinks,
        recent_tokens=recent,
        max_concurrent_batches=batches,
    )
    pool = BlockPool(num_gpu_blocks=blocks, enable_caching=True, hash_block_size=BLOCK)
    manager = WindowManager(
        spec,
        block_pool=pool,
        enable_caching=True,
        kv_cache_group_id=1,
        scheduler_block_size=128,
        max_admission_blocks_per_request=spec.max_admission_blocks_per_request(in_flight, max_len),
    )
    return spec, pool, manager


def live(manager, request="r"):
    return [i for i, block in enumerate(manager.req_to_blocks[request]) if not block.is_null]


def advance(manager, computed, new, request="r", processed=None):
    """One step as KVCacheManager.allocate_slots does it; returns how many blocks it took."""
    manager.remove_skipped_blocks(request, computed if processed is None else processed)
    promised = manager.get_num_blocks_to_allocate(request, computed + new, [], computed, computed, computed + new)
    free = manager.block_pool.get_num_free_blocks()
    added = manager.allocate_new_blocks(request, computed + new, computed + new)
    taken = free - manager.block_pool.get_num_free_blocks()
    assert taken == promised, "the promise the scheduler admits by must be what is taken"
    assert len(manager.req_to_blocks[request]) == cdiv(computed + new, BLOCK)
    assert sum(not block.is_null for block in added) == taken
    return taken


@pytest.mark.parametrize("sinks,recent", [(0, 64), (32, 64), (64, 256), (40, 0), (5, 17), (0, 1)])
@pytest.mark.parametrize("chunk", [1, 7, 64, 300, 2048])
def test_every_window_token_is_held_when_it_is_read(sinks, recent, chunk):
    """Before each step, the blocks of the first S and last R computed tokens are all there; and no more for long."""
    spec, pool, manager = make(sinks, recent)
    manager.add_local_computed_blocks("r", [], 0, 0)
    computed = 0
    cap = manager.max_admission_blocks_per_request
    while computed < 3000:
        new = min(chunk, 3000 - computed)
        advance(manager, computed, new)
        held = set(live(manager))
        assert len(held) <= cap
        # What the step reads: windows of the tokens computed before it.
        for t in [*range(min(sinks, computed)), *range(max(0, computed - recent), computed)]:
            assert t // BLOCK in held, f"token {t} of {computed} lost its 16-bit copy"
        computed += new
    limit = spec.sink_blocks + cdiv(recent + ROLLBACK_SLACK_TOKENS, BLOCK) + 1
    manager.remove_skipped_blocks("r", computed)
    assert len(live(manager)) <= limit
    manager.free("r")
    assert pool.get_num_free_blocks() == 499


def test_a_long_chunk_is_trimmed():
    _, _, manager = make(32, 64)
    manager.add_local_computed_blocks("r", [], 0, 0)
    assert advance(manager, 0, 2048) == 2 + (64 + ROLLBACK_SLACK_TOKENS) // BLOCK
    assert live(manager) == [0, 1, *range(123, 128)]


def test_in_flight_steps_keep_their_windows():
    """With two batches in flight, blocks are freed on what is processed, not on what is scheduled."""
    _, _, manager = make(0, 64, batches=2)
    manager.add_local_computed_blocks("r", [], 0, 0)
    processed = computed = 0
    for _ in range(40):
        advance(manager, computed, 100, processed=processed)
        held = set(live(manager))
        for t in range(max(0, computed - 64), computed):
            assert t // BLOCK in held
        assert len(held) <= manager.max_admission_blocks_per_request
        processed, computed = computed, computed + 100


def test_rollback_finds_its_window():
    """Tokens taken back (a rejected draft): the window of the shorter prefix is still there."""
    _, _, manager = make(0, 64)
    manager.add_local_computed_blocks("r", [], 0, 0)
    advance(manager, 0, 1000)
    manager.remove_skipped_blocks("r", 1000)
    for back in range(1, ROLLBACK_SLACK_TOKENS + 1):
        for t in range(1000 - back - 64, 1000 - back):
            assert t // BLOCK in set(live(manager))


def test_admission_cap_covers_any_schedule():
    """Random chunk sizes: never more blocks than the cap that admission reserves."""
    for _ in range(30):
        batches = random.choice([1, 2, 3])
        recent = random.choice([0, 16, 100, 256])
        in_flight = random.choice([64, 512, 8192])
        _, _, manager = make(random.choice([0, 64]), recent, batches, 800, 8192, in_flight * batches)
        manager.add_local_computed_blocks("r", [], 0, 0)
        steps, computed = [0], 0
        while computed < 4000:
            new = random.randint(1, in_flight)
            processed = steps[max(0, len(steps) - batches)]
            advance(manager, computed, new, processed=processed)
            assert len(live(manager)) <= manager.max_admission_blocks_per_request
            computed += new
            steps.append(computed)


def test_admission_asks_for_the_peak():
    _, _, manager = make(32, 64, max_len=4096)
    cap = manager.max_admission_blocks_per_request
    asked = manager.get_num_blocks_to_allocate("new", 4000, [], 0, 0, 4000, apply_admission_cap=True)
    assert asked == cap < 4000 // BLOCK
    short = manager.get_num_blocks_to_allocate("new", 40, [], 0, 0, 40, apply_admission_cap=True)
    assert short == 3


class FakeRequest:
    def __init__(self, hashes):
        self.request_id, self.block_hashes, self.shared_prefix_boundary = "r", hashes, None


def hashes(count):
    return [bytes([i % 256, i // 256]) * 16 for i in range(count)]


def hit(manager, length):
    return WindowManager.find_longest_cache_hit(
        hashes(length // BLOCK), length, [1], manager.block_pool, manager.kv_cache_spec, False, 128
    )


def test_prefix_hits_are_never_limited():
    """Nothing of ours is cached: the hit keeps its length, every block null."""
    _, _, manager = make()
    (blocks,), length = hit(manager, 1024)
    assert length == 1024 and len(blocks) == 64 and all(block.is_null for block in blocks)


def test_prefix_hit_takes_what_is_cached():
    _, pool, manager = make(32, 64)
    manager.add_local_computed_blocks("r", [], 0, 0)
    advance(manager, 0, 1024)
    manager.cache_blocks(FakeRequest(hashes(64)), 1024, replay_boundaries=(1023,))
    manager.free("r")
    free = pool.get_num_free_blocks()
    (blocks,), length = hit(manager, 1024)
    found = [i for i, block in enumerate(blocks) if not block.is_null]
    assert length == 1024 and found == [0, 1, 59, 60, 61, 62, 63]
    # A shorter hit of the same prompt: its window was never kept, its sinks were.
    (shorter,), length = hit(manager, 512)
    assert length == 512 and [i for i, block in enumerate(shorter) if not block.is_null] == [0, 1]
    needed = manager.get_num_blocks_to_allocate("new", 1100, blocks, 1024, 1024, 1100)
    assert needed == 7 + cdiv(1100, BLOCK) - 64, "cached blocks leave the free list when touched"
    manager.add_local_computed_blocks("new", blocks, 1024, 0)
    assert pool.get_num_free_blocks() == free - 7
    assert all(blocks[i].ref_cnt == 1 for i in found)
    manager.free("new")
    assert pool.get_num_free_blocks() == free
