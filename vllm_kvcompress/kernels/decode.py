# SPDX-License-Identifier: Apache-2.0
"""Decode attention over pages and windows: one CUDA op, or Triton's `attend` and an un-rotation.

Both take queries in cache space and leave the output un-rotated. Their reference is `kernels.reference`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import torch

from vllm_kvcompress.formats.base import PageLayout
from vllm_kvcompress.kernels import cuda_ops
from vllm_kvcompress.triton_kernels.attend import attend, workspace_elements
from vllm_kvcompress.triton_kernels.rotate import rotate

_PROGRAMS_PER_PROCESSOR = 4
_MAX_SPLITS = 64
_MIN_SPLIT_TOKENS = 256
_MAX_TILE_ROWS = 64


@dataclass(frozen=True)
class Cache:
    """What a layer reads and writes, and how."""

    pages: torch.Tensor
    """[num_pages, H, head_bytes] uint8"""
    layout: PageLayout
    window_cache: torch.Tensor | None
    """[num_blocks, H, block, 4 * D] uint8"""
    window_dtype: torch.dtype
    sink_tokens: int
    recent_tokens: int


@dataclass(frozen=True)
class Rows:
    """R requests and their T new tokens."""

    query_start_loc: torch.Tensor
    """[R + 1] int32"""
    seq_lens: torch.Tensor
    """[R] int32"""
    block_table: torch.Tensor
    """[R, max_pages] int32"""
    window_table: torch.Tensor | None
    """[R, max_blocks] int32"""
    max_query_len: int
    max_seq_len: int


def decode(
    kernel: Literal["cuda", "triton"],
    q: torch.Tensor,
    new_kv: torch.Tensor,
    cache: Cache,
    rows: Rows,
    v_unrotation: torch.Tensor | None,
    scale: float,
    out: torch.Tensor,
    *,
    sketch: torch.Tensor | None = None,
    q_signs: torch.Tensor | None = None,
    cache_out: torch.Tensor | None,
    workspace: torch.Tensor,
) -> None:
    """Causal attention of the new tokens over their history and themselves; never waits for the device.

    Args:
        kernel: "triton" takes any number of new tokens, "cuda" up to MAX_DECODE_QUERY_LEN a request.
        q: [T, Hq, D] float16 in cache space.
        new_kv: [>= T, H, 2 * D] window_dtype: the tokens' own K | V in cache space.
        v_unrotation: [H, D, D] float16, R_v^T; None: identity.
        out: [T, Hq, D] in the model's dtype, written, un-rotated.
        sketch: S [D, D] float16, of formats with residual signs; Triton's.
        q_signs: S q, as q, of formats with residual signs; CUDA's.
        cache_out: [T, Hq, D] float16 scratch; Triton's, and only with an un-rotation.
        workspace: 1-D float32 of `decode_workspace_elements`.
    """
    if kernel == "cuda":
        code = cuda_ops.code_arguments(cache.layout)
        assert code is not None  # or Triton would have been chosen
        torch.ops.vllm_kvcompress.decode(
            q,
            new_kv,
            cache.pages,
            cache.window_cache,
            rows.block_table,
            rows.window_table,
            rows.query_start_loc,
            rows.seq_lens,
            v_unrotation,
            out,
            workspace,
            q_signs,
            rows.max_query_len,
            cache.layout.head_dim,
            *code,
            cache.layout.k_mean is not None,
            cache.window_dtype == torch.bfloat16,
            cache.sink_tokens,
            cache.recent_tokens,
            scale,
        )
        return
    heads = cache.pages.shape[1]
    target = out
    if v_unrotation is not None:
        assert cache_out is not None
        target = cache_out
    attend(
        q,
        new_kv,
        cache.pages,
        cache.layout,
        rows.block_table,
        rows.query_start_loc,
        rows.seq_lens,
        target,
        scale=scale,
        window_cache=cache.window_cache,
        window_table=rows.window_table,
        window_dtype=cache.window_dtype,
        sink_tokens=cache.sink_tokens,
        recent_tokens=cache.recent_tokens,
        max_query_len=rows.max_query_len,
        sketch=sketch,
        num_splits=_num_splits(q, heads, rows, workspace),
        workspace=workspace,
    )
    if v_unrotation is not None:
        rotate(target, v_unrotation, out)


def decode_workspace_elements(
    kernel: Literal["cuda", "triton"],
    device: torch.device,
    num_kv_heads: int,
    group: int,
    head_dim: int,
    max_num_reqs: int,
    max_query_len: int,
) -> int:
    """float32 elements of the workspace that serves every step of at most these sizes."""
    if kernel == "cuda":
        return torch.ops.vllm_kvcompress.decode_workspace_elements(
            num_kv_heads, group, head_dim, max_num_reqs, max_query_len
        )
    # Where there are splits at all, there are no more of them than programs, each a tile of rows.
    return _programs(device) * _MAX_TILE_ROWS * (head_dim + 2)


def _num_splits(q: torch.Tensor, heads: int, rows: Rows, workspace: torch.Tensor) -> int:
    """A power of two, from host numbers alone: enough programs to fill the device, shares worth a program's start."""
    tokens, query_heads, head_dim = q.shape
    tiles = -(-rows.max_query_len * (query_heads // heads) // _MAX_TILE_ROWS) * heads * len(rows.seq_lens)
    wanted = min(_programs(q.device) // tiles, rows.max_seq_len // _MIN_SPLIT_TOKENS, _MAX_SPLITS)
    splits = 1 << max(wanted, 1).bit_length() - 1
    while workspace_elements(tokens, query_heads, head_dim, splits) > workspace.numel():
        splits //= 2
    return splits


@functools.cache
def _programs(device: torch.device) -> int:
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    return _PROGRAMS_PER_PROCESSOR * processors
