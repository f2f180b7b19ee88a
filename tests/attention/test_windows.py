# SPDX-License-Identifier: Apache-2.0
"""The companion's block manager against vLLM's real block pool: what it holds, frees, caches and promises."""

import random
from collections import deque

import pytest
import torch
from vllm.utils.math_utils import cdiv
from vllm.v1.core.block_pool import BlockPool

from vllm_kvcompress.attention.windows import WindowManager, WindowSpec

BLOCK = 16


def make(sinks=32, recent=64, rollback=0, blocks=500, max_len=8192, in_flight=8192):
    spec = WindowSpec(
        block_size=BLOCK,
        num_kv_heads=1,
        head_size=64,
        dtype=torch.uint8,
        sliding_window=recent + 1,
        sink_tokens=sinks,
        recent_tokens=recent,
        rollback_tokens=rollback,
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
    """One step as KVCacheManager.allocate_slots does it; returns the blocks added to the table."""
    manager.remove_skipped_blocks(request, computed if processed is None else processed)
    held = len(manager.req_to_blocks[request])
    promised = manager.get_num_blocks_to_allocate(request, computed + new, [], computed, computed, computed + new)
    free = manager.block_pool.get_num_free_blocks()
    added = manager.allocate_new_blocks(request, computed + new, computed + new)
    taken = free - manager.block_pool.get_num_free_blocks()
    assert taken == promised, "the promise the scheduler admits by must be what is taken"
    assert len(manager.req_to_blocks[request]) == max(held, cdiv(computed + new, BLOCK))
    assert sum(not block.is_null for block in added) == taken
    return added


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
    limit = spec.sink_blocks + cdiv(recent, BLOCK) + 1
    manager.remove_skipped_blocks("r", computed)
    assert len(live(manager)) <= limit
    manager.free("r")
    assert pool.get_num_free_blocks() == 499


def test_a_long_chunk_is_trimmed():
    _, _, manager = make(32, 64)
    manager.add_local_computed_blocks("r", [], 0, 0)
    advance(manager, 0, 2048)
    assert live(manager) == [0, 1, *range(124, 128)]


class Engine:
    """A scheduler that is `batches` - 1 steps ahead of its worker, and a worker that checks whose tokens it reads.

    As vLLM's do: the worker's table of a request is appended to and never learns what was freed; the scheduler counts
    drafts as computed until their step is processed; a request that finishes is freed with steps of it in flight.
    """

    def __init__(self, manager, batches):
        self.manager, self.batches = manager, batches
        self.spec = manager.kv_cache_spec
        self.in_flight = deque()
        self.written = {}  # {(block id, offset): (request, token)}
        self.tables = {}
        self.scheduled = {}  # tokens computed, as the scheduler sees them
        self.computed = {}  # and in truth
        self.pending = {}  # tokens of the steps in flight
        self.peak = 0

    def add(self, request):
        self.manager.add_local_computed_blocks(request, [], 0, 0)
        self.tables[request], self.scheduled[request], self.computed[request], self.pending[request] = [], 0, 0, 0

    def finish(self, request):
        self.manager.free(request)
        del self.scheduled[request]

    def step(self, work):
        """Schedule {request: (new tokens, drafts among them)}; run and process the oldest step if enough are ahead."""
        tables = {}
        for request, (new, _) in work.items():
            before = self.scheduled[request]
            added = advance(self.manager, before, new, request, max(0, before - self.pending[request]))
            # As a copy: the step reads the table as it was when it was scheduled.
            tables[request] = self.tables[request] = self.tables[request] + [block.block_id for block in added]
            self.scheduled[request] += new
            self.pending[request] += new
            self.peak = max(self.peak, len(live(self.manager, request)))
        self.in_flight.append((work, tables))
        if len(self.in_flight) == self.batches:
            self.run_oldest()

    def run_oldest(self):
        work, tables = self.in_flight.popleft()
        writes = {}
        for request, (new, _) in work.items():
            start = self.computed[request]
            for token in range(start, start + new):
                block = tables[request][token // BLOCK]
                if block:
                    assert writes.setdefault(block, request) == request, "two requests write to one block"
                    self.written[block, token % BLOCK] = (request, token)
        # Checked after all writes: layers, heads and requests of a step run in any order.
        for request, (new, drafts) in work.items():
            start = self.computed[request]
            recent = range(max(0, start - self.spec.recent_tokens), start)
            for token in [*range(min(self.spec.sink_tokens, start)), *recent]:
                block = tables[request][token // BLOCK]
                assert block, f"token {token} of {start} lost its 16-bit copy"
                assert self.written[block, token % BLOCK] == (request, token), "somebody else's token is read"
            rejected = random.choice((random.randint(0, drafts), drafts))
            self.computed[request] += new - rejected
            self.pending[request] -= new
            if request in self.scheduled:
                self.scheduled[request] -= rejected


@pytest.mark.parametrize("drafts", [0, 7])
@pytest.mark.parametrize("batches", [1, 2, 3])
@pytest.mark.parametrize("sinks,recent", [(0, 64), (64, 256), (40, 0), (5, 17), (16, 1), (16, None)])
def test_steps_in_flight_read_what_they_wrote(sinks, recent, batches, drafts):
    """Blocks are freed with steps in flight that read them; whoever gets them writes later.

    The pool is as small as admission allows, so that they are taken at once.
    """
    if recent is None:  # none to spare: the window begins in the last token of a block if all drafts are taken back
        recent = 34 - drafts * batches % BLOCK
    longest, count = 1500, 3
    chunk = random.choice([20, 150, 700])
    kwargs = {"max_len": longest, "in_flight": batches * chunk, "rollback": drafts * batches}
    reserved = make(sinks, recent, **kwargs)[2].max_admission_blocks_per_request
    _, pool, manager = make(sinks, recent, blocks=count * reserved + 1, **kwargs)
    engine = Engine(manager, batches)
    lengths = {}
    for number in range(400):
        while len(lengths) < count:
            request = f"r{number}-{len(lengths)}"
            # (prompt, all): the last one ends up as long as the model allows.
            prompt = random.randint(1, longest - 100)
            lengths[request] = (prompt, prompt + random.randint(1, 100))
            engine.add(request)
        work = {}
        for request, (prompt, _) in lengths.items():
            left = prompt - engine.scheduled[request]
            if left > 0:
                work[request] = (min(left, random.randint(1, chunk)), 0)
            elif random.random() < 0.9:  # else it waits
                work[request] = (1 + drafts, drafts)
        engine.step(work)
        for request, (_, total) in list(lengths.items()):
            if engine.scheduled[request] + 1 + drafts > total or random.random() < 0.002:
                engine.finish(request)
                del lengths[request]
    assert engine.peak <= reserved
    while engine.in_flight:
        engine.run_oldest()
    for request in lengths:
        engine.finish(request)
    assert pool.get_num_free_blocks() == count * reserved


@pytest.mark.parametrize("batches", [1, 2, 3])
@pytest.mark.parametrize(
    "sinks,recent,drafts", [(64, 256, 0), (64, 256, 7), (32, 64, 0), (0, 17, 0), (5, 1, 3), (40, 0, 0)]
)
def test_the_reservation_is_the_peak(sinks, recent, drafts, batches):
    """Not more than that, however many steps are in flight: it is what vLLM's capacity is counted by."""
    _, _, manager = make(sinks, recent, drafts * batches)
    engine = Engine(manager, batches)
    engine.add("r")
    # Chunks that end one token into a block: their windows lie in the most blocks.
    for chunk in [401] + [400] * 15:
        engine.step({"r": (chunk, 0)})
    assert engine.peak == manager.max_admission_blocks_per_request


def test_the_default_reservation():
    """The number in docs/formats.md."""
    assert make(64, 256)[2].max_admission_blocks_per_request == 4 + 2 * 17


def test_short_chunks_reserve_less():
    """They add their own blocks to the window, not another window."""
    _, _, manager = make(64, 256, in_flight=64)
    engine = Engine(manager, 1)
    engine.add("r")
    for _ in range(20):
        engine.step({"r": (64, 0)})
    assert engine.peak == manager.max_admission_blocks_per_request == 4 + 17 + 4


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
        self.sampling_params = None


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
    assert length == 1024 and found == [0, 1, 60, 61, 62, 63]
    # A shorter hit of the same prompt: its window was never kept, its sinks were.
    (shorter,), length = hit(manager, 512)
    assert length == 512 and [i for i, block in enumerate(shorter) if not block.is_null] == [0, 1]
    needed = manager.get_num_blocks_to_allocate("new", 1100, blocks, 1024, 1024, 1100)
    assert needed == 6 + cdiv(1100, BLOCK) - 64, "cached blocks leave the free list when touched"
    manager.add_local_computed_blocks("new", blocks, 1024, 0)
    assert pool.get_num_free_blocks() == free - 6
    assert all(blocks[i].ref_cnt == 1 for i in found)
    manager.free("new")
    assert pool.get_num_free_blocks() == free
