# SPDX-License-Identifier: Apache-2.0
"""Store and attention in torch: the CPU's path, and a correct (not fast) one for any other device.

Vectorised over requests, heads and pages. Arithmetic is float32; keys and values live in cache space, which for the
queries means rotated by the keys' rotation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from vllm_kvcompress.attention.plan import PageStarts, ReadGroup, StepPlan
from vllm_kvcompress.formats.base import PageLayout, page_fields, read_pages, write_tokens
from vllm_kvcompress.kernels.workspace import Workspace
from vllm_kvcompress.quantizers import packing

# Bound on elements of dequantised history (per tensor) and of the attention mask held at once.
_MAX_ELEMENTS = 1 << 24

# Up to so many query rows a KV head, scores are fewer than the elements of a key (head sizes start at 64).
_FEW_ROWS = 32

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
        if plan.page_starts is not None:
            _set_means(pages, layout, plan.page_starts, k)
        write_tokens(pages, layout, plan.slots, k, v, clip_k, clip_v)
    if window_cache is not None and len(plan.window_slots):
        block_size = window_cache.shape[2]
        both = torch.cat((keys, values), dim=-1)[plan.windowed_tokens].to(window_dtype)
        block, offset = plan.window_slots // block_size, plan.window_slots % block_size
        window_cache.view(window_dtype)[block, :, offset] = both


def _set_means(pages: torch.Tensor, layout: PageLayout, starts: PageStarts, keys: torch.Tensor) -> None:
    """Write the mean key of every page begun; keys [M, H, D] float32 of the stored tokens."""
    if not len(starts.own_pages) and not len(starts.borrowing_pages):
        return
    counts = torch.bincount(starts.run_of_token, minlength=starts.num_runs)
    sums = keys.new_zeros(starts.num_runs, *keys.shape[1:]).index_add_(0, starts.run_of_token, keys)
    field = page_fields(pages, layout).k_mean
    assert field is not None

    def write(index: torch.Tensor, sums: torch.Tensor, counts: torch.Tensor) -> None:
        limit = torch.finfo(torch.float16).max
        field[index] = (sums / counts.clamp(min=1)[:, None, None]).clamp(-limit, limit).half()

    if len(starts.borrowing_pages):
        old = torch.arange(layout.page_tokens, device=keys.device) < starts.previous_old_tokens.unsqueeze(1)
        previous_keys, _ = read_pages(pages[starts.previous_pages], layout)
        none_new = starts.previous_runs < 0
        # Masked, not multiplied by zero: unwritten bytes read as anything, NaN included.
        old_sums = previous_keys.masked_fill(~old[:, None, :, None], 0).sum(dim=2)
        new_sums = sums[starts.previous_runs].masked_fill(none_new[:, None, None], 0)
        new_counts = counts[starts.previous_runs].masked_fill(none_new, 0)
        write(starts.borrowing_pages, old_sums + new_sums, starts.previous_old_tokens + new_counts)
    write(starts.own_pages, sums[starts.own_runs], counts[starts.own_runs])


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
    batch, heads, query_heads, new, head_dim = queries.shape
    paged, windowed = group.page_mask.shape[1], group.window_mask.shape[1]
    length = paged + windowed + new
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
    history = torch.cat((group.page_mask, group.window_mask), dim=1)
    codes = _read_codes(pages, layout, group) if paged and layout.is_two_bit else None
    windows = _read_windows(window_cache, group, window_dtype) if windowed else None
    sources = []
    if paged and codes is None:
        sources.append(_read_dequantised(pages, layout, group))
    elif query_heads * new <= _FEW_ROWS:
        return _attend_codes(queries, keys, values, codes, windows, history, scale)
    elif codes is not None:
        sources.append(codes.dequantise_())
    if windows is not None:
        sources.append(windows)
    sources.append((keys, values))
    shape = (batch, heads, length, head_dim)
    all_keys = torch.cat([k for k, _ in sources], dim=2, out=_WORKSPACE.get("keys", shape, torch.float32, keys.device))
    all_values = torch.cat(
        [v for _, v in sources], dim=2, out=_WORKSPACE.get("values", shape, torch.float32, keys.device)
    )
    return _masked_attention(queries, all_keys, all_values, history, scale)


def _attend_codes(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    codes: _Codes | None,
    windows: tuple[torch.Tensor, torch.Tensor] | None,
    history: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Few rows (decoding): products are taken with the codes and scaled afterwards, for there are fewer scores than
    elements, and a dequantised copy would have to be written and read once more. Shapes as in `attend`."""
    batch, heads, query_heads, new, head_dim = queries.shape
    paged, past = 0 if codes is None else codes.keys.shape[2], history.shape[1]
    # The query heads of a KV head are rows of one product, so nothing is repeated for them.
    q = queries.reshape(batch, heads, query_heads * new, head_dim) * scale
    causal = torch.ones(new, new, dtype=torch.bool, device=q.device).tril()
    mask = torch.cat((history[:, None, :].expand(-1, new, -1), causal.expand(batch, -1, -1)), dim=-1)
    scores = [] if codes is None else [codes.scores(q)]
    if windows is not None:
        scores.append(q @ windows[0].mT)
    scores.append(q @ keys.mT)
    rows = torch.cat(scores, dim=-1).unflatten(2, (query_heads, new))
    weights = rows.masked_fill_(~mask[:, None, None], -torch.inf).softmax(dim=-1).flatten(2, 3)
    out = weights[..., past:] @ values
    if windows is not None:
        out += weights[..., paged:past] @ windows[1]
    if codes is not None:
        out += codes.weighted_values(weights[..., :paged])
    return out.unflatten(2, (query_heads, new))


@dataclass(frozen=True)
class _Codes:
    """The pages of a group as codes and scales.

    Scales and means of masked tokens are zero. It is not enough to mask their scores: their bytes are whatever the
    page held before, NaN included, and NaN times a weight of zero is NaN.
    """

    keys: torch.Tensor
    """[B, H, T, D] float32 codes; T = P * page_tokens"""
    values: torch.Tensor
    key_scale: torch.Tensor
    """[B, H, 1, T] float32, like the other three"""
    key_zero: torch.Tensor
    value_scale: torch.Tensor
    value_zero: torch.Tensor
    key_mean: torch.Tensor | None
    """[B, H, P, D] float32"""

    def scores(self, queries: torch.Tensor) -> torch.Tensor:
        """[B, H, M, D] -> [B, H, M, T]"""
        found = queries @ self.keys.mT
        found *= self.key_scale
        found.addcmul_(queries.sum(-1, keepdim=True), self.key_zero)
        if self.key_mean is not None:
            pages = self.key_mean.shape[2]
            found.unflatten(-1, (pages, -1)).add_((queries @ self.key_mean.mT).unsqueeze(-1))
        return found

    def weighted_values(self, weights: torch.Tensor) -> torch.Tensor:
        """[B, H, M, T] -> [B, H, M, D]"""
        found = (weights * self.value_scale) @ self.values
        return found.add_(weights @ self.value_zero.mT)

    def dequantise_(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [B, H, T, D] float32, in the place of their codes: the codes are gone."""
        # Not addcmul: broadcast over the last dimension it is three times slower than the two steps.
        keys = self.keys.mul_(self.key_scale.mT).add_(self.key_zero.mT)
        if self.key_mean is not None:
            keys.unflatten(2, (self.key_mean.shape[2], -1)).add_(self.key_mean.unsqueeze(-2))
        return keys, self.values.mul_(self.value_scale.mT).add_(self.value_zero.mT)


def _gather_pages(pages: torch.Tensor, group: ReadGroup) -> torch.Tensor:
    """[B, H, P, head_bytes] uint8: a copy of the group's pages, in the workspace."""
    batch, count = group.pages.shape
    heads = pages.shape[1]
    # Words of 16 bytes: an indexed copy costs per element, and head_bytes is a multiple of 16.
    words = pages.view(torch.complex128)
    head_index = torch.arange(heads, device=pages.device)[None, :, None]
    gathered = _WORKSPACE.get("pages", (batch, heads, count, words.shape[-1]), words.dtype, words.device)
    torch.ops.aten.index.Tensor_out(words, [group.pages[:, None, :], head_index], out=gathered)
    return gathered.view(torch.uint8)


def _read_dequantised(pages: torch.Tensor, layout: PageLayout, group: ReadGroup) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [B, H, T, D] float32 of a group's pages, T = P * page_tokens; zero where no token is read."""
    keys, values = read_pages(_gather_pages(pages, group), layout)
    unread = ~group.page_mask.view(len(group.pages), 1, -1, 1)
    # Not multiplied by zero: unwritten bytes read as anything, NaN included.
    return keys.flatten(2, 3).masked_fill_(unread, 0), values.flatten(2, 3).masked_fill_(unread, 0)


def _read_codes(pages: torch.Tensor, layout: PageLayout, group: ReadGroup) -> _Codes:
    batch, count = group.pages.shape
    heads = pages.shape[1]
    fields = page_fields(_gather_pages(pages, group), layout)  # [B, H, P, ...]
    by_page = (batch, heads, count, layout.page_tokens)
    index = _WORKSPACE.get("index", (*by_page, layout.code_bytes), torch.int64, pages.device)
    unread = ~group.page_mask.view(batch, 1, count, layout.page_tokens)

    def codes(name: str, packed: torch.Tensor) -> torch.Tensor:
        out = _WORKSPACE.get(name, (*by_page, layout.head_dim), torch.float32, pages.device)
        return packing.unpack_float(packed, out, index).flatten(2, 3)

    def scales(field: torch.Tensor) -> torch.Tensor:
        return field.masked_fill(unread, 0).float().flatten(2).unsqueeze(2)

    mean = fields.k_mean
    return _Codes(
        keys=codes("key codes", fields.k_codes),
        values=codes("value codes", fields.v_codes),
        key_scale=scales(fields.k_scales[..., 0]),
        key_zero=scales(fields.k_scales[..., 1]),
        value_scale=scales(fields.v_scales[..., 0]),
        value_zero=scales(fields.v_scales[..., 1]),
        key_mean=None if mean is None else mean.masked_fill((group.pages == 0)[:, None, :, None], 0).float(),
    )


def _read_windows(
    window_cache: torch.Tensor | None, group: ReadGroup, window_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [B, H, W, D] float32 of a group's 16-bit tokens; zero where there is none."""
    assert window_cache is not None
    batch, count = group.window_mask.shape
    words = window_cache.view(torch.complex128)
    shape = (batch, count, window_cache.shape[1], words.shape[-1])
    gathered = _WORKSPACE.get("windows", shape, words.dtype, words.device)
    torch.ops.aten.index.Tensor_out(words, [group.window_blocks, None, group.window_offsets], out=gathered)
    both = gathered.view(window_dtype)  # [B, W, H, 2D]
    if not group.windows_complete:
        both = both.masked_fill(~group.window_mask[:, :, None, None], 0)
    floats = _WORKSPACE.get("window floats", (batch, both.shape[2], count, both.shape[3]), torch.float32, both.device)
    keys, values = floats.copy_(both.transpose(1, 2)).chunk(2, dim=-1)
    return keys, values


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
