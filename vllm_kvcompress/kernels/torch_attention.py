# SPDX-License-Identifier: Apache-2.0
"""Store and attention in torch: the CPU's path, and a correct (not fast) one for any other device.

Vectorised over requests, heads and pages. Arithmetic is float32; keys and values live in cache space, which for the
queries means rotated by the keys' rotation.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vllm_kvcompress.attention.plan import PageStarts, ReadGroup, StepPlan
from vllm_kvcompress.formats.base import PageLayout, page_fields, read_pages, write_tokens
from vllm_kvcompress.kernels.workspace import Workspace
from vllm_kvcompress.quantizers import packing

# Bound on elements of dequantised history (per tensor) and of the attention mask held at once.
_MAX_ELEMENTS = 1 << 24

_WORKSPACE = Workspace()


def store(
    pages: torch.Tensor,
    layout: PageLayout,
    plan: StepPlan,
    keys: torch.Tensor,
    values: torch.Tensor,
    clip_k: torch.Tensor | float,
    clip_v: torch.Tensor | float,
    window_cache: torch.Tensor | None,
    window_dtype: torch.dtype,
) -> None:
    """Write a step's tokens to the 2-bit pages and, where they have a slot there, to the 16-bit companion.

    Args:
        pages: [num_pages, H, head_bytes] uint8.
        keys, values: [T, H, D] float32 in cache space.
        window_cache: [num_blocks, H, block_size, 4 * D] uint8, or None without windows.
    """
    if len(plan.slots):
        # Rows are in order in the common case of no padding: no copy then.
        whole = len(plan.stored_tokens) == keys.shape[0]
        k = keys if whole else keys[plan.stored_tokens]
        v = values if whole else values[plan.stored_tokens]
        starts = plan.page_starts
        if starts is not None and len(starts.own_runs):
            _set_means(pages, layout, starts.own_pages, _run_means(starts, k))
        if starts is None or not len(starts.late):
            write_tokens(pages, layout, plan.slots, k, v, clip_k, clip_v)
        else:
            for part in (starts.early, starts.late):
                if part is starts.late:
                    previous_keys, _ = read_pages(pages[starts.previous_pages], layout)
                    _set_means(pages, layout, starts.borrowing_pages, previous_keys.mean(dim=2))
                write_tokens(pages, layout, plan.slots[part], k[part], v[part], clip_k, clip_v)
    if window_cache is not None and len(plan.window_slots):
        block_size = window_cache.shape[2]
        both = torch.cat((keys, values), dim=-1)[plan.windowed_tokens].to(window_dtype)
        block, offset = plan.window_slots // block_size, plan.window_slots % block_size
        window_cache.view(window_dtype)[block, :, offset] = both


def _run_means(starts: PageStarts, keys: torch.Tensor) -> torch.Tensor:
    """[N, H, D]: mean of the step's own tokens, for each page begun with enough of them."""
    counts = torch.bincount(starts.run_of_token, minlength=starts.num_runs)
    sums = keys.new_zeros(starts.num_runs, *keys.shape[1:]).index_add_(0, starts.run_of_token, keys)
    return (sums / counts[:, None, None])[starts.own_runs]


def _set_means(pages: torch.Tensor, layout: PageLayout, index: torch.Tensor, means: torch.Tensor) -> None:
    limit = torch.finfo(torch.float16).max
    field = page_fields(pages, layout).k_mean
    assert field is not None
    field[index] = means.clamp(-limit, limit).half()


def attend(
    group: ReadGroup,
    pages: torch.Tensor,
    layout: PageLayout,
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    window_cache: torch.Tensor | None,
    window_dtype: torch.dtype,
    scale: float,
) -> torch.Tensor:
    """Attention of B requests' n new tokens over their history in pages and windows and over themselves, causal.

    Args:
        pages: [num_pages, H, head_bytes] uint8.
        queries: [B, H, G, n, D] float32 in cache space; keys, values: [B, H, n, D] float32 in cache space.
        scale: softmax scale.

    Returns:
        [B, H, G, n, D] float32, in cache space of the values.
    """
    batch, heads, _, new, head_dim = queries.shape
    length = group.page_mask.shape[1] + group.window_mask.shape[1] + new
    step = max(1, _MAX_ELEMENTS // (length * heads * head_dim))
    if step < batch:
        parts = []
        for begin in range(0, batch, step):
            rows = slice(begin, begin + step)
            part = group.rows(rows)
            parts.append(
                attend(part, pages, layout, queries[rows], keys[rows], values[rows], window_cache, window_dtype, scale)
            )
        return torch.cat(parts)
    # [B, H, T, D] with T = tokens of the pages, of the windows, and the new ones.
    shape = (batch, heads, length, head_dim)
    all_keys = _WORKSPACE.get("keys", shape, torch.float32, keys.device)
    all_values = _WORKSPACE.get("values", shape, torch.float32, keys.device)
    paged = group.page_mask.shape[1]
    if paged:
        _read_pages_into(all_keys[:, :, :paged], all_values[:, :, :paged], pages, layout, group)
    if group.window_blocks.shape[1]:
        assert window_cache is not None
        # [B, W, H, 2D] in one gather of 16-byte words, heads moved forward as a view.
        words = window_cache.view(torch.complex128)
        gathered = _WORKSPACE.get(
            "windows", (*group.window_blocks.shape, heads, words.shape[-1]), words.dtype, words.device
        )
        torch.ops.aten.index.Tensor_out(words, [group.window_blocks, None, group.window_offsets], out=gathered)
        both = gathered.view(window_dtype)
        if not group.windows_complete:
            both = both.masked_fill(~group.window_mask[:, :, None, None], 0)
        k, v = both.transpose(1, 2).chunk(2, dim=-1)
        all_keys[:, :, paged : length - new] = k
        all_values[:, :, paged : length - new] = v
    all_keys[:, :, length - new :] = keys
    all_values[:, :, length - new :] = values
    history = torch.cat((group.page_mask, group.window_mask), dim=1)
    return _masked_attention(queries, all_keys, all_values, history, scale)


def _read_pages_into(
    keys: torch.Tensor, values: torch.Tensor, pages: torch.Tensor, layout: PageLayout, group: ReadGroup
) -> None:
    """Dequantise a group's pages into keys, values [B, H, P * page_tokens, D] float32; masked tokens read as zero.

    Masked tokens must not only be masked: their bytes are whatever the page held before, NaN included, and
    NaN times a weight of zero is NaN.
    """
    batch, count = group.pages.shape
    heads = pages.shape[1]
    # Words of 16 bytes: an indexed copy costs per element, and head_bytes is a multiple of 16.
    words = pages.view(torch.complex128)
    head_index = torch.arange(heads, device=pages.device)[None, :, None]
    gathered = _WORKSPACE.get("pages", (batch, heads, count, words.shape[-1]), words.dtype, words.device)
    torch.ops.aten.index.Tensor_out(words, [group.pages[:, None, :], head_index], out=gathered)
    fields = page_fields(gathered.view(torch.uint8), layout)  # [B, H, P, ...]
    unread = ~group.page_mask.view(batch, 1, count, layout.page_tokens, 1)
    by_page = (batch, heads, count, layout.page_tokens, layout.head_dim)
    floats = _WORKSPACE.get("codes", by_page, torch.float32, pages.device)
    index = _WORKSPACE.get("index", (*by_page[:-1], layout.code_bytes), torch.int64, pages.device)
    for out, codes, scales in (
        (keys, fields.k_codes, fields.k_scales),
        (values, fields.v_codes, fields.v_scales),
    ):
        scale, zero = scales.masked_fill(unread, 0).float().split(1, dim=-1)
        by_pages = out.unflatten(2, (count, layout.page_tokens))
        # Not addcmul: broadcast over the last dimension it is three times slower than the two steps.
        torch.mul(packing.unpack_float(codes, floats, index), scale, out=by_pages)
        by_pages.add_(zero)
    if fields.k_mean is not None:
        null = (group.pages == 0)[:, None, :, None]
        keys.unflatten(2, (count, layout.page_tokens)).add_(fields.k_mean.masked_fill(null, 0).float().unsqueeze(-2))


def _masked_attention(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, history: torch.Tensor, scale: float
) -> torch.Tensor:
    """Queries [B, H, G, n, D] over keys [B, H, T + n, D]: causal over the last n, masked by `history` [B, T] before."""
    batch, heads, group, new, head_dim = queries.shape
    past = history.shape[1]
    outputs = []
    tile = max(1, _MAX_ELEMENTS // (batch * group * (past + new)))
    for begin in range(0, new, tile):
        rows = torch.arange(begin, min(begin + tile, new), device=queries.device)
        seen = int(rows[-1]) + 1
        causal = torch.arange(seen, device=queries.device) <= rows.unsqueeze(1)
        mask = torch.cat((history[:, None, :].expand(-1, len(rows), -1), causal.expand(batch, -1, -1)), dim=-1)
        # The query heads of a KV head are rows of one attention, so keys and values are never repeated.
        mask = mask[:, None, None].expand(-1, 1, group, -1, -1).reshape(batch, 1, group * len(rows), past + seen)
        q = queries[:, :, :, begin : begin + len(rows)].reshape(batch, heads, group * len(rows), head_dim)
        out = F.scaled_dot_product_attention(
            q, keys[:, :, : past + seen], values[:, :, : past + seen], attn_mask=mask, scale=scale
        )
        outputs.append(out.view(batch, heads, group, len(rows), head_dim))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=3)


def attend_first_chunk(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal attention of requests without history on the exact tensors, in the model's dtype and basis.

    Args:
        queries: [B, H, G, n, D]; keys, values: [B, H, n, D].

    Returns:
        [B, H, G, n, D].
    """
    batch, heads, group, new, head_dim = queries.shape
    # Expanded, not copied: head h * G + g reads KV head h.
    k = keys.unsqueeze(2).expand(-1, -1, group, -1, -1).reshape(batch, heads * group, new, head_dim)
    v = values.unsqueeze(2).expand(-1, -1, group, -1, -1).reshape(batch, heads * group, new, head_dim)
    q = queries.reshape(batch, heads * group, new, head_dim)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    return out.view(batch, heads, group, new, head_dim)
