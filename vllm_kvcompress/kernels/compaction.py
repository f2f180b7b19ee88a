# SPDX-License-Identifier: Apache-2.0
"""Eviction in place, in torch: score a request's slots in one layer; gather the survivors, write them anew.

Survivors' bytes are moved as they are, so that a token does not lose a little at every compaction. Only keys of formats
that centre pages cannot be: a row says how its key differs from its page's mean, and survivors of pages with different
means come to share one. The first compaction gives the kept pages one mean per head, which they keep for good: a key is
quantised a second time when it first gets there, clipped as it was the first time, and never again. (Not clipped, the
KL of attention over keys of Qwen2.5-Coder-1.5B kept from 2-bit pages is 1.2 to 2 times as large: means differ by more
than a step, which spreads the levels.) Quantised anew around new means every time, keys of 2-bit pages lose all they
say in ten compactions.
"""

from __future__ import annotations

import torch

from vllm_kvcompress.episodic.policies import Layer, Policy
from vllm_kvcompress.formats.base import PageLayout, RowFields, page_fields, read_pages, write_tokens


def score(
    pages: torch.Tensor,
    layout: PageLayout,
    table: torch.Tensor,
    num_slots: int,
    policy: Policy,
    queries: torch.Tensor | None,
    key_offset: torch.Tensor | None,
    scale: float,
    previous: torch.Tensor | None = None,
) -> torch.Tensor:
    """`policy.score` of a request's slots in one layer.

    Args:
        pages: [num_pages, H, head_bytes] uint8.
        table: [n] int64, the request's pages that are not null, in order.
        num_slots: tokens in them that are scored: all before the last of these pages are full.
        queries: [Q, Hq, D] float in cache space, what the policy scores with; None if it needs none.
        key_offset: [H, D] float, what static centring took from the keys, in cache space; None: nothing.
        scale: softmax scale.
        previous: [H, T'] float32, scores so far of the first T' slots, where the policy adds them up.

    Returns:
        [H, num_slots] float32.

    Raises:
        ValueError: missing queries, or shapes that do not fit.
    """
    pages = pages[table[: -(-num_slots // layout.page_tokens)]]
    keys = read_pages(pages, layout)[0].permute(0, 2, 1, 3).flatten(0, 1)[:num_slots]
    return policy.score(Layer(keys if key_offset is None else keys + key_offset, queries, scale, previous))


def compact(
    pages: torch.Tensor,
    layout: PageLayout,
    table: torch.Tensor,
    targets: torch.Tensor,
    kept: torch.Tensor,
    is_first: bool,
    clip_k: torch.Tensor | float,
) -> None:
    """Write the slots that are kept (`policies.select`) to pages `targets`, in their order.

    Args:
        pages: [num_pages, H, head_bytes] uint8, written in place.
        table: [n] int64, the request's pages that are not null, in order.
        targets: [n'] int64, the budget's pages; the first of `table`, or others where those are shared.
        kept: [H, n' * page_tokens] int64, slots in `table`, ascending.
        is_first: the request's first compaction.
        clip_k: share of the range (quantizers/affine.py), float or [H], of keys that are quantised again.
    """
    copied = pages[table]  # for sources and targets overlap
    before, after = page_fields(copied, layout), page_fields(pages, layout)
    unchanged = torch.ones_like(kept, dtype=torch.bool)
    if before.k_mean is not None and after.k_mean is not None:
        keys, values = (x.permute(0, 2, 1, 3).flatten(0, 1) for x in read_pages(copied, layout))
        index = kept.T.unsqueeze(-1).expand(-1, -1, layout.head_dim)
        keys, values = keys.gather(0, index), values.gather(0, index)
        limit = torch.finfo(torch.float16).max
        after.k_mean[targets] = keys.mean(0).clamp(-limit, limit).half() if is_first else before.k_mean[0]
        same = (before.k_mean == after.k_mean[targets[0]]).all(-1)  # [n, H]
        unchanged = same.T.gather(1, kept // layout.page_tokens)
        offsets = torch.arange(layout.page_tokens, device=table.device)
        slots = (targets.unsqueeze(1) * layout.page_tokens + offsets).flatten()
        write_tokens(pages, layout, slots, keys, values, clip_k, 1.0)  # values are moved below
    everywhere = torch.ones_like(unchanged)
    for source, destination, where in (
        (before.keys, after.keys, unchanged), (before.values, after.values, everywhere),
    ):  # fmt: skip
        for old, new in zip(_regions(source), _regions(destination), strict=True):
            _move(old, new, targets, kept, where)


def _regions(rows: RowFields) -> list[torch.Tensor]:
    """All that is stored of the keys or of the values: [P, H, page_tokens, ...]."""
    signs = [region for region in (rows.signs, rows.sign_norms) if region is not None]
    return [*rows.codes, *rows.scales, *signs]


def _move(
    source: torch.Tensor, destination: torch.Tensor, target: torch.Tensor, kept: torch.Tensor, where: torch.Tensor
) -> None:
    """Move bytes of survivors to pages `target`, in the order of `kept` [H, M], where `where` [H, M] bool."""
    rows = source.transpose(0, 1).flatten(1, 2)  # by slot: [H, n * page_tokens, ...]
    picked = rows[torch.arange(len(kept), device=kept.device).unsqueeze(1), kept]
    present = destination[target].transpose(0, 1).flatten(1, 2)
    chosen = torch.where(where.view(*where.shape, *[1] * (picked.ndim - 2)), picked, present)
    destination[target] = chosen.unflatten(1, (len(target), -1)).transpose(0, 1)
