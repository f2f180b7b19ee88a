# SPDX-License-Identifier: Apache-2.0
"""What is counted beside the scheduler, with vLLM's own block pool and random requests, against counting by hand."""

import random
import secrets
from types import SimpleNamespace

import pytest
import torch
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import SlidingWindowSpec

from vllm_kvcompress.attention.pages import PageManager, PageSpec
from vllm_kvcompress.attention.windows import WindowManager, WindowSpec
from vllm_kvcompress.operations import observer as observer_module
from vllm_kvcompress.operations.observer import Observer

PAGE, BLOCK, SINKS, RECENT = 64, 16, 24, 40
SHAPE = {"num_kv_heads": 1, "head_size": 64, "dtype": torch.uint8}


class Engine:
    """Block managers of pages, of their windows and of vLLM's sliding windows, over one pool."""

    def __init__(self):
        self.pool = BlockPool(num_gpu_blocks=600, enable_caching=True, hash_block_size=BLOCK)
        pages = PageSpec(block_size=PAGE, **SHAPE)
        windows = {"sliding_window": RECENT + 1, "sink_tokens": SINKS, "recent_tokens": RECENT, "rollback_tokens": 0}
        specs = [pages, WindowSpec(block_size=BLOCK, **SHAPE, **windows)]
        specs.append(SlidingWindowSpec(block_size=BLOCK, **SHAPE, sliding_window=32))
        self.managers = [
            kind(
                spec,
                block_pool=self.pool,
                enable_caching=True,
                kv_cache_group_id=group,
                scheduler_block_size=PAGE,
                **({"max_admission_blocks_per_request": 100} if group else {}),
            )
            for group, (kind, spec) in enumerate(
                zip((PageManager, WindowManager, SlidingWindowManager), specs, strict=True)
            )
        ]
        self.block_bytes = 3 * pages.page_size_bytes
        groups = [SimpleNamespace(kv_cache_spec=spec, layer_names=["x"] * 3) for spec in specs]
        self.resting = True
        self.observer = Observer(
            SimpleNamespace(
                kv_cache_manager=SimpleNamespace(
                    block_pool=self.pool, coordinator=SimpleNamespace(single_type_managers=self.managers)
                ),
                kv_cache_config=SimpleNamespace(kv_cache_groups=groups),
                connector=None,
                has_unfinished_requests=lambda: not self.resting,
            )
        )

    def step(self, request, computed, new):
        for manager in self.managers:
            manager.remove_skipped_blocks(request, computed, computed + new)
            manager.allocate_new_blocks(request, computed + new, computed + new)

    def ids(self, group):
        tables = self.managers[group].req_to_blocks.values()
        return {block.block_id for table in tables for block in table if not block.is_null}


@pytest.fixture
def rng():
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    return random.Random(seed)


def test_levels(rng):
    engine, computed = Engine(), {}
    assert engine.observer() == {"compressed_bytes": 0, "window_pages": 0, "kept_episodes": 0}
    for step in range(60):
        if computed and rng.random() < 0.3:
            request = rng.choice([*computed])
            del computed[request]
            for manager in engine.managers:
                manager.free(request)
        else:
            request = rng.choice([*computed, f"new {step}"]) if len(computed) < 6 else rng.choice([*computed])
            new = rng.choice([1, 7, 50, 150])
            if request not in computed:
                sharing = rng.choice([*computed]) if computed else None
                for manager in engine.managers:
                    # The first page's tokens as a prefix hit gives them, where another request has them.
                    table = manager.req_to_blocks[sharing][: PAGE // manager.block_size] if sharing else []
                    whole = len(table) * manager.block_size == PAGE and computed.get(sharing, 0) >= PAGE
                    manager.add_local_computed_blocks(request, table if whole else [], PAGE if whole else 0, 0)
                    computed[request] = PAGE if whole else 0
            engine.step(request, computed[request], new)
            computed[request] += new
        levels = engine.observer()
        assert levels["window_pages"] == len(engine.ids(1))
        assert levels["compressed_bytes"] == len(engine.ids(0)) * engine.block_bytes


def test_between_looks_only_what_has_grown_is_sent(monkeypatch):
    engine, now = Engine(), [100.0]
    monkeypatch.setattr(observer_module.time, "monotonic", lambda: now[0])
    engine.resting = False
    windows = engine.managers[1]
    assert "window_pages" in engine.observer()
    assert engine.observer() == {}
    null = engine.pool.null_block
    windows.add_local_computed_blocks("hit", [null] * 8, 8 * BLOCK, 0)
    assert engine.observer() == {"window_fallback_tokens": SINKS + RECENT}
    assert engine.observer() == {}, "sent once"
    now[0] += 2 * observer_module._SECONDS
    assert "window_pages" in engine.observer()
    assert engine.observer() == {}
    engine.resting = True
    assert "window_pages" in engine.observer(), "a server at rest has said how it rests"


@pytest.mark.parametrize("external", [False, True], ids=["prefix hit", "episode"])
def test_fallbacks_are_the_tokens_of_the_windows_whose_blocks_are_missing(rng, external):
    engine, expected = Engine(), 0
    windows = engine.managers[1]
    for request in map(str, range(30)):
        table = [rng.choice([engine.pool.null_block, engine.pool.blocks[5]]) for _ in range(rng.randrange(12))]
        tokens = len(table) * BLOCK
        for token in {*range(min(SINKS, tokens)), *range(max(0, tokens - RECENT), tokens)}:
            expected += table[token // BLOCK].is_null
        if external:
            windows.offer(request, table)
            windows.allocate_external_computed_blocks(request, 0, tokens)
        else:
            windows.add_local_computed_blocks(request, table, tokens, 0)
        assert windows.fallback_tokens == expected
