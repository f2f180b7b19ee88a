# SPDX-License-Identifier: Apache-2.0
"""Pages in host memory: every byte comes back, and how many of them a size holds."""

import secrets
from types import SimpleNamespace

import pytest
import torch
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec

from vllm_kvcompress.attention.pages import PageSpec
from vllm_kvcompress.attention.windows import make_window_spec
from vllm_kvcompress.episodic.host import Copy, HostPages, count_slots
from vllm_kvcompress.errors import KVCompressError

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LAYERS, BLOCKS, SLOTS, HEADS, TOKENS, ROW = 3, 40, 25, 2, 128, 37
PAGE_BYTES = HEADS * TOKENS * ROW


def test_every_byte_comes_back_and_no_other_is_touched():
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    generator = torch.Generator().manual_seed(seed)

    def some(most, count):
        return torch.randperm(most, generator=generator)[:count].tolist()

    before = torch.randint(256, (LAYERS, BLOCKS, HEADS, TOKENS, ROW), generator=generator, dtype=torch.uint8)
    caches = [layer.clone().to(DEVICE) for layer in before]
    host, expected = HostPages(caches, SLOTS), before.clone()
    spilled, slots = some(BLOCKS, 21), some(SLOTS, 21)
    parts = (slice(0, 12), slice(12, 21))  # two episodes
    for part in parts:
        host.store(Copy(spilled[part], slots[part]))
    assert torch.equal(torch.stack(caches).cpu(), before)
    for part in parts:
        loaded = some(BLOCKS, len(spilled[part]))  # among them such as they came from, or the first came back to
        host.load(Copy(loaded, slots[part]))
        expected[:, loaded] = before[:, spilled[part]]
    assert torch.equal(torch.stack(caches).cpu(), expected)


def configs(host_memory, ranks=1, budget=512):
    pages = PageSpec(block_size=TOKENS, num_kv_heads=HEADS, head_size=64, dtype=torch.uint8, state_content_bytes=ROW)
    settings = {"episodic": {"budget": budget, "host_memory": host_memory}}
    vllm_config = SimpleNamespace(
        additional_config={"kvcompress": settings},
        parallel_config=SimpleNamespace(tensor_parallel_size=ranks),
        num_speculative_tokens=0,
        max_concurrent_batches=1,
    )
    windows = make_window_spec(pages, vllm_config, 64, 256)
    names = [f"layer{index}" for index in range(LAYERS)]
    groups = [KVCacheGroupSpec(names, pages), KVCacheGroupSpec([f"{name}.window" for name in names], windows)]
    return vllm_config, KVCacheConfig(num_blocks=BLOCKS, kv_cache_tensors=[], kv_cache_groups=groups)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_slot_is_a_page_of_every_layer_and_rank(ranks):
    page = ranks * LAYERS * PAGE_BYTES
    for size, slots in ((0, 0), (7 * page, 7), (8 * page - 1, 7), ("3MiB", 3 * 2**20 // page)):
        assert count_slots(*configs(size, ranks)) == slots


def test_memory_for_no_episode_is_refused():
    least = 4 * LAYERS * PAGE_BYTES
    assert count_slots(*configs(least)) == 4
    with pytest.raises(
        KVCompressError, match=rf"host_memory={least - 1} holds 3 pages.*budget=512 has 4.*at least {least}"
    ):
        count_slots(*configs(least - 1))


def test_vllm_zeroes_no_block_of_ours():
    """It would do so before the worker has copied what was in it."""
    assert not configs(0)[1].needs_kv_cache_zeroing
