# SPDX-License-Identifier: Apache-2.0
"""The oracle: attention over pages and windows, request by request in float64, written for reading, not for speed."""

from __future__ import annotations

import torch

from vllm_kvcompress.formats.base import PageLayout, read_pages


def attend_reference(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    pages: torch.Tensor,
    layout: PageLayout,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    window_cache: torch.Tensor | None = None,
    window_table: torch.Tensor | None = None,
    sink_tokens: int = 0,
    recent_tokens: int = 0,
    window_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """Causal attention of every request's new tokens.

    A history token at position t of a request with c history tokens is read in 16 bits when (t < sink_tokens or
    t >= c - recent_tokens) and its companion block is not null; else from its 2-bit page. New tokens are exact.

    Args:
        queries: [T, Hq, D]; keys, values: [T, H, D], all in cache space. Query head i reads KV head i // (Hq / H).
        pages: [num_pages, H, head_bytes] uint8.
        block_table: [R, max_pages]; seq_lens [R] = history plus new tokens; query_start_loc [R + 1].
        window_cache: [num_blocks, H, block, 4 * D] uint8; window_table [R, max_blocks], 0 = null.

    Returns:
        [T, Hq, D] float64.
    """
    heads = keys.shape[1]
    group = queries.shape[1] // heads
    out = torch.full(queries.shape, torch.nan, dtype=torch.float64)
    for request in range(len(seq_lens)):
        begin, end = int(query_start_loc[request]), int(query_start_loc[request + 1])
        new = end - begin
        past = int(seq_lens[request]) - new
        k_past, v_past = _history(pages, layout, block_table[request], past)
        if window_cache is not None and window_table is not None:
            block_size = window_cache.shape[2]
            for t in range(past):
                block = int(window_table[request, t // block_size])
                if block and (t < sink_tokens or t >= past - recent_tokens):
                    exact = window_cache[block, :, t % block_size].view(window_dtype).double()
                    k_past[:, t], v_past[:, t] = exact.chunk(2, dim=-1)
        k = torch.cat((k_past, keys[begin:end].double().transpose(0, 1)), dim=1)
        v = torch.cat((v_past, values[begin:end].double().transpose(0, 1)), dim=1)
        for head in range(queries.shape[1]):
            scores = queries[begin:end, head].double() @ k[head // group].T * scale
            future = torch.arange(past + new) > past + torch.arange(new).unsqueeze(1)
            weights = scores.masked_fill(future, -torch.inf).softmax(dim=-1)
            out[begin:end, head] = weights @ v[head // group]
    return out


def _history(
    pages: torch.Tensor, layout: PageLayout, table: torch.Tensor, past: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A request's history from its pages: keys, values [H, past, D] float64."""
    count = -(-past // layout.page_tokens)
    keys, values = read_pages(pages[table[:count].long()], layout)
    return tuple(x.double().transpose(0, 1).flatten(1, 2)[:, :past].clone() for x in (keys, values))  # type: ignore
