# SPDX-License-Identifier: Apache-2.0
"""The oracle: attention over pages and windows, request by request, written for reading, not for speed."""

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
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """Causal attention of every request's new tokens.

    A history token at position t of a request with c history tokens is read in 16 bits when (t < sink_tokens or
    t >= c - recent_tokens) and its companion block is not null; else from its 2-bit page, if that is not null. New
    tokens are exact.

    Args:
        queries: [T, Hq, D]; keys, values: [T, H, D], all in cache space. Query head i reads KV head i // (Hq / H).
        pages: [num_pages, H, head_bytes] uint8.
        block_table: [R, max_pages]; seq_lens [R] = history plus new tokens; query_start_loc [R + 1].
        window_cache: [num_blocks, H, block, 4 * D] uint8; window_table [R, max_blocks], 0 = null.
        dtype: of the arithmetic and the result.

    Returns:
        [T, Hq, D] `dtype`; NaN in rows that belong to no request.
    """
    heads = keys.shape[1]
    out = torch.full(queries.shape, torch.nan, dtype=dtype, device=queries.device)
    starts, lens = query_start_loc.tolist(), seq_lens.tolist()
    for request, length in enumerate(lens):
        begin, end = starts[request], starts[request + 1]
        new = end - begin
        if new == 0:
            continue
        past = length - new
        k_past, v_past, known = _history(pages, layout, block_table[request], past, dtype)
        if window_cache is not None and window_table is not None and past:
            block_size = window_cache.shape[2]
            t = torch.arange(past, device=pages.device)
            block = window_table[request, t // block_size].long()
            t = t[((t < sink_tokens) | (t >= past - recent_tokens)) & (block != 0)]
            exact = window_cache[block[t], :, t % block_size].view(window_dtype).to(dtype).transpose(0, 1)
            k_past[:, t], v_past[:, t] = exact.chunk(2, dim=-1)
            known[t] = True
        k = torch.cat((k_past, keys[begin:end].to(dtype).transpose(0, 1)), dim=1)
        v = torch.cat((v_past, values[begin:end].to(dtype).transpose(0, 1)), dim=1)
        q = queries[begin:end].to(dtype).unflatten(1, (heads, -1)).permute(1, 2, 0, 3)  # [H, G, n, D]
        visible = torch.ones(new, new, dtype=torch.bool, device=pages.device).tril()
        visible = torch.cat((known.expand(new, -1), visible), dim=1)
        weights = (q @ k.unsqueeze(1).mT * scale).masked_fill(~visible, -torch.inf).softmax(dim=-1)
        out[begin:end] = (weights @ v.unsqueeze(1)).permute(2, 0, 1, 3).flatten(1, 2)
    return out


def _history(
    pages: torch.Tensor, layout: PageLayout, table: torch.Tensor, past: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A request's history from its pages: keys, values [H, past, D] `dtype`; [past] bool, false in null pages."""
    ids = table[: -(-past // layout.page_tokens)].long()
    known = (ids != 0).repeat_interleave(layout.page_tokens)[:past]
    keys, values = (x.to(dtype).transpose(0, 1).flatten(1, 2)[:, :past] for x in read_pages(pages[ids], layout))
    # What a null page holds is nobody's, NaN perhaps, and a weight of zero would not silence it.
    unknown = ~known.view(1, -1, 1)
    return keys.masked_fill(unknown, 0), values.masked_fill(unknown, 0), known
