# SPDX-License-Identifier: Apache-2.0
"""Compiles and loads every GPU kernel at start, so that no request waits for a compiler.

vLLM's own dry runs come after its memory profile, or not at all with `--enforce-eager`, and none has a prefill with
history. So made-up steps run here, in the profiling run: decodes, first chunks and continuations of many sizes, for
kernels have variants by size. Their tensors have the strides and alignments of the engine's, which Triton compiles for.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from vllm_kvcompress.attention.gpu import GpuAttention, compact_layers, score_layers
from vllm_kvcompress.attention.gpu_metadata import make_metadata
from vllm_kvcompress.attention.window_layer import WindowMetadata
from vllm_kvcompress.episodic.policies import POLICIES, Policy, protected_slots, select_without_waiting
from vllm_kvcompress.formats.base import PageLayout

logger = logging.getLogger("vllm.kvcompress")

# Tokens of made-up steps: some between any two sizes at which a kernel changes its tiles.
_SIZES = (2, 12, 48, 200, 1000, 4000)
# Queries of made-up evictions.
_QUERIES = 256
# Lengths that decodes are said to have: they decide into how many shares Triton cuts a request.
_LENGTHS = tuple(256 << shift for shift in range(8))

_done: set[tuple[Any, ...]] = set()


@torch.inference_mode()
def warm_up(attention: GpuAttention, layout: PageLayout, window_block: int | None, max_model_len: int) -> None:
    """Run made-up steps through a layer's attention; once a process for all layers of a kind, and only on a GPU.

    Args:
        window_block: tokens of a block of the companion cache; None without windows.
    """
    kind = (
        attention.num_heads, attention.num_kv_heads, attention.decode_kernel, attention.flash, layout,
        attention.dtype, window_block, max_model_len,
    )  # fmt: skip
    if attention.device.type == "cpu" or kind in _done:
        return
    _done.add(kind)
    started = time.perf_counter()
    for new, history, max_seq_len in _steps(attention, layout.page_tokens, max_model_len):
        run_step(attention, layout, window_block, max_model_len, new, history, max_seq_len)
    torch.cuda.synchronize(attention.device)
    logger.info("kernels over pages are compiled and loaded: %.1f s", time.perf_counter() - started)


@torch.inference_mode()
def warm_up_eviction(attention: GpuAttention, layout: PageLayout) -> None:
    """Run made-up evictions through a layer's attention; once a process for all layers of a kind, and only on a GPU."""
    kind = ("eviction", attention.num_heads, attention.num_kv_heads, attention.dtype, layout)
    if attention.device.type == "cpu" or kind in _done:
        return
    _done.add(kind)
    started = time.perf_counter()
    for policy in POLICIES.values():
        run_eviction(attention, layout, policy, True)
    run_eviction(attention, layout, POLICIES["streaming"], False)
    torch.cuda.synchronize(attention.device)
    logger.info("kernels of eviction are compiled and loaded: %.1f s", time.perf_counter() - started)


def run_eviction(attention: GpuAttention, layout: PageLayout, policy: Policy, is_first: bool) -> torch.Tensor:
    """One made-up eviction, all of whose pages are the same empty one. Returns the kept slots [1, H, budget]."""
    device, heads = attention.device, attention.num_kv_heads
    pages = torch.zeros(2, heads, layout.head_bytes, dtype=torch.uint8, device=device)
    table = torch.ones(3, dtype=torch.int64, device=device)
    shape = (_QUERIES, attention.num_heads, attention.head_dim)
    queries = None if policy.queries == "none" else [torch.zeros(shape, dtype=attention.dtype, device=device)]
    count, budget = len(table) * layout.page_tokens - 1, layout.page_tokens
    scores = score_layers([attention], [pages], layout, table, count, policy, queries, None)[..., : 2 * budget]
    protected = protected_slots(policy, count, 2 * budget, budget, 0, device)
    kept = select_without_waiting(scores.flatten(0, 1), budget, protected).unsqueeze(0)
    compact_layers([attention], [pages], layout, table, table[:1], kept, is_first)
    return kept


def _steps(attention: GpuAttention, page_tokens: int, max_model_len: int) -> Iterator[tuple[list[int], list[int], int]]:
    """(new tokens of each request, history tokens of each, length said to be the longest)."""
    limits = attention.limits
    decode = limits.decode_query_len
    # More than one workspace of history, so that tiles are merged, where contexts get as long.
    long = max(0, min(attention.history_tokens + page_tokens, max_model_len - limits.max_tokens))
    for length in _LENGTHS:
        if length <= max_model_len:
            yield [decode], [length - decode], length
    for tokens in sorted({min(size, limits.max_tokens) for size in _SIZES}):
        requests = max(1, min(tokens // decode, limits.max_requests))
        yield [decode] * requests, [1] * requests, max_model_len
        if tokens // 2 > decode:
            yield [tokens // 2, tokens - tokens // 2], [0, long or 1], max_model_len


def run_step(
    attention: GpuAttention,
    layout: PageLayout,
    window_block: int | None,
    max_model_len: int,
    new: Sequence[int],
    history: Sequence[int],
    max_seq_len: int,
) -> torch.Tensor:
    """One made-up step: all read the same empty page and block, nothing is stored. Returns the output [T, Hq, D]."""
    device, dim = attention.device, attention.head_dim
    heads, kv_heads = attention.num_heads, attention.num_kv_heads
    total, count = sum(new), len(new)
    page_bytes = kv_heads * layout.head_bytes
    pages = torch.zeros(2, kv_heads, layout.head_bytes, dtype=torch.uint8, device=device)

    def table(block: int) -> torch.Tensor:
        # The width of vLLM's tables (v1/worker/block_table.py): blocks of the longest request, up to whole 128 tokens.
        multiple = 128 // math.gcd(128, block)
        width = -(-max_model_len // (block * multiple)) * multiple
        return torch.ones(count, width, dtype=torch.int32, device=device)

    windows = window_cache = None
    slots = torch.full((total,), -1, dtype=torch.int64, device=device)
    if window_block is not None:
        row = 4 * dim
        window_cache = pages.flatten().as_strided(
            (2, kv_heads, window_block, row), (page_bytes, window_block * row, row, 1)
        )
        windows = WindowMetadata(table(window_block), slots, window_block)
    starts = torch.tensor([0, *new], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    lengths = torch.tensor([n + past for n, past in zip(new, history, strict=True)], dtype=torch.int32)
    common: Any = SimpleNamespace(
        query_start_loc=starts.to(device),
        query_start_loc_cpu=starts,
        seq_lens=lengths.to(device),
        seq_lens_cpu_upper_bound=lengths,
        num_reqs=count,
        num_actual_tokens=total,
        max_query_len=max(new),
        max_seq_len=max_seq_len,
        block_table_tensor=table(layout.page_tokens),
        slot_mapping=slots,
    )
    metadata = make_metadata(common, attention.limits.decode_query_len, layout.page_tokens)
    # One tensor, as a fused projection leaves it.
    qkv = torch.zeros(total, heads + 2 * kv_heads, dim, dtype=attention.dtype, device=device)
    query, key, value = qkv.split([heads, kv_heads, kv_heads], dim=1)
    out = torch.empty(total, heads, dim, dtype=attention.dtype, device=device)
    attention.forward(query, key, value, pages, layout, window_cache, metadata, windows, out)
    return out
