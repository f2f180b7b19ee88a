# SPDX-License-Identifier: Apache-2.0
"""Eviction in place, in torch: score a request's slots in one layer, gather the survivors, write them anew.

Survivors are quantised again. Their values lie on the levels of their old rows, so with the whole range kept (clip 1)
affine codes come out the same wherever a survivor's new page mean is close to its old one.
"""

from __future__ import annotations

import torch

from vllm_kvcompress.episodic.policies import Layer, Policy, always_kept, select
from vllm_kvcompress.formats.base import PageLayout, page_fields, read_pages, write_tokens

_WHOLE_RANGE = 1.0


def compact(
    pages: torch.Tensor,
    layout: PageLayout,
    table: torch.Tensor,
    num_slots: int,
    num_sources: int,
    targets: torch.Tensor,
    policy: Policy,
    protected_tokens: int,
    queries: torch.Tensor | None,
    key_offset: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """Write the best slots of a request's first `num_sources` pages to `targets`.

    Args:
        pages: [num_pages, H, head_bytes] uint8, written in place.
        table: [n] int64, the request's pages that are not null, in order.
        num_slots: tokens in them; all but those of the last page are full.
        num_sources: pages to choose from, all full; the rest is scored (softmax sees it) and stays.
        targets: [n'] int64, the budget's pages; may be the first of `table`.
        protected_tokens: first slots that are kept whatever their score.
        queries: [Q, Hq, D] float in cache space, what the policy scores with; None if it needs none.
        key_offset: [H, D] float, what static centring took from the keys, in cache space; None: nothing.
        scale: softmax scale.

    Returns:
        [H, n' * page_tokens] int64: the slots that were kept, ascending.

    Raises:
        ValueError: scores that are not finite, a budget that does not hold what is protected.
    """
    keys, values = (x.permute(0, 2, 1, 3).flatten(0, 1)[:num_slots] for x in read_pages(pages[table], layout))
    scored = keys if key_offset is None else keys + key_offset
    sources, budget = num_sources * layout.page_tokens, len(targets) * layout.page_tokens
    scores = policy.score(Layer(scored, queries, scale))[:, :sources]
    recent = max(0, policy.recent(budget) - (num_slots - sources))
    kept = select(scores, budget, always_kept(sources, budget, leading=protected_tokens, recent=recent))
    index = kept.T.unsqueeze(-1).expand(-1, -1, layout.head_dim)
    keys, values = keys.gather(0, index), values.gather(0, index)
    mean = page_fields(pages, layout).k_mean
    if mean is not None:
        limit = torch.finfo(torch.float16).max
        mean[targets] = keys.unflatten(0, (len(targets), -1)).mean(1).clamp(-limit, limit).half()
    slots = (
        targets.unsqueeze(1) * layout.page_tokens + torch.arange(layout.page_tokens, device=table.device)
    ).flatten()
    write_tokens(pages, layout, slots, keys, values, _WHOLE_RANGE, _WHOLE_RANGE)
    return kept
