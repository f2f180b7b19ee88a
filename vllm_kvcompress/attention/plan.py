# SPDX-License-Identifier: Apache-2.0
"""Index tensors of one step, made once and shared by every layer: what is read, from where, and what is stored.

Each history token of a request has one representation in a step: 16 bits if it is among the first `sink_tokens` or
the last `recent_tokens` before the request's first new token *and* its companion block exists, else 2 bits. The
step's own tokens are exact. Requests with equally many new tokens form one rectangular batch.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from vllm_kvcompress.attention.backend import KVCompressMetadata
    from vllm_kvcompress.attention.window_layer import WindowMetadata

# Fewer tokens than this at hand when a page is begun: their mean says too little, the previous page's is taken.
MIN_TOKENS_FOR_OWN_MEAN = 32


@dataclass(frozen=True)
class ReadGroup:
    """B requests with n new tokens each."""

    tokens: torch.Tensor
    """[B, n] int64 rows of the step's flat tokens"""
    pages: torch.Tensor
    """[B, P] int64 pages that hold at least one token read in 2 bits; padded with the null page 0"""
    page_mask: torch.Tensor
    """[B, P * page_tokens] bool: tokens read in 2 bits"""
    window_blocks: torch.Tensor
    """[B, W] int64 companion block of each token read in 16 bits; 0 where there is none"""
    window_offsets: torch.Tensor
    """[B, W] int64 its offset in the block"""
    window_mask: torch.Tensor
    """[B, W] bool"""
    windows_complete: bool
    """Every entry of `window_mask` is true: nothing to blank (the common case of long contexts)"""

    @property
    def has_history(self) -> bool:
        return self.pages.shape[1] > 0 or self.window_blocks.shape[1] > 0

    def rows(self, rows: slice) -> ReadGroup:
        """The group of a part of its requests."""
        tensors = {f.name: getattr(self, f.name)[rows] for f in fields(self) if f.name != "windows_complete"}
        return replace(self, **tensors)


@dataclass(frozen=True)
class PageStarts:
    """Pages begun in this step, whose mean key must be set before any token is quantised (page centring).

    Enough tokens at hand: their mean. Else the mean over the previous page, of which this step's tokens count exactly
    and older ones as they read back.
    """

    run_of_token: torch.Tensor
    """[M] int64: which run of tokens of one page each stored token belongs to"""
    num_runs: int
    own_runs: torch.Tensor
    """[N] int64: runs that begin a page with enough tokens to centre it on their mean"""
    own_pages: torch.Tensor
    """[N] int64"""
    borrowing_pages: torch.Tensor
    """[N'] int64: pages begun with too few tokens"""
    previous_pages: torch.Tensor
    """[N'] int64: the page before"""
    previous_old_tokens: torch.Tensor
    """[N'] int64: how many of its tokens, the first ones, were stored before this step"""
    previous_runs: torch.Tensor
    """[N'] int64: the run of this step's tokens in it, -1 where it was complete before"""


@dataclass(frozen=True)
class StepPlan:
    groups: list[ReadGroup]
    stored_tokens: torch.Tensor
    """[M] int64 rows of the flat tokens that have a real slot"""
    slots: torch.Tensor
    """[M] int64"""
    page_starts: PageStarts | None
    windowed_tokens: torch.Tensor
    """[M'] int64 rows that also get a 16-bit copy"""
    window_slots: torch.Tensor
    """[M'] int64"""


def make_plan(metadata: KVCompressMetadata, windows: WindowMetadata | None) -> StepPlan:
    """Plan a step. Host work is O(requests x pages), never O(tokens) in Python."""
    device = metadata.block_table.device
    starts = metadata.query_start_loc.long()
    query_lens = starts.diff()
    history = metadata.seq_lens.long() - query_lens
    groups = []
    for query_len in query_lens.unique().tolist():
        if query_len == 0:
            continue
        for has_history in (False, True):
            requests = ((query_lens == query_len) & ((history > 0) == has_history)).nonzero().squeeze(1)
            if len(requests):
                groups.append(_read_group(metadata, windows, requests, starts, history, query_len, device))
    total = int(starts[-1])
    slots = metadata.slot_mapping[:total]
    stored = (slots >= metadata.page_tokens).nonzero().squeeze(1)  # page 0 is vLLM's null page
    slots = slots[stored].long()
    page_starts = None
    if metadata.centres_pages:
        page_starts = _page_starts(metadata, starts, query_lens, stored, slots)
    if windows is None:
        windowed = window_slots = stored.new_empty(0)
    else:
        mapping = windows.slot_mapping[:total]
        windowed = (mapping >= windows.block_size).nonzero().squeeze(1)
        window_slots = mapping[windowed].long()
    return StepPlan(groups, stored, slots, page_starts, windowed, window_slots)


def _read_group(
    metadata: KVCompressMetadata,
    windows: WindowMetadata | None,
    requests: torch.Tensor,
    starts: torch.Tensor,
    history: torch.Tensor,
    query_len: int,
    device: torch.device,
) -> ReadGroup:
    tokens = (starts[requests].unsqueeze(1) + torch.arange(query_len)).to(device)
    lengths = history[requests].to(device)
    requests = requests.to(device)
    page_tokens = metadata.page_tokens
    longest = int(history[requests.cpu()].max())
    num_pages = -(-longest // page_tokens)
    positions = torch.arange(num_pages * page_tokens, device=device)
    table = metadata.block_table[requests][:, :num_pages].long()
    in_pages = positions < lengths.unsqueeze(1)

    if windows is None:
        window_blocks = window_offsets = tokens.new_empty(len(requests), 0)
        window_mask = window_blocks.bool()
    else:
        window_positions, window_mask = _window_positions(metadata, lengths, longest)
        block_index = window_positions // windows.block_size
        window_blocks = windows.block_table[requests].long().gather(1, block_index) * window_mask
        window_mask = window_blocks > 0
        window_offsets = window_positions % windows.block_size
        rows = torch.arange(len(requests), device=device).unsqueeze(1).expand_as(window_mask)
        in_pages[rows[window_mask], window_positions[window_mask]] = False

    needed = in_pages.view(len(requests), num_pages, page_tokens).any(-1)
    # Pages read only in 16 bits are skipped; the rest move to the front so that the batch stays rectangular.
    kept = int(needed.sum(1).max()) if num_pages else 0
    order = needed.logical_not().to(torch.uint8).argsort(dim=1, stable=True)[:, :kept]
    pages = table.gather(1, order) * needed.gather(1, order)
    page_mask = in_pages.view(len(requests), num_pages, page_tokens)
    page_mask = page_mask.gather(1, order.unsqueeze(-1).expand(-1, -1, page_tokens)).flatten(1)
    complete = bool(window_mask.all())
    return ReadGroup(tokens, pages, page_mask, window_blocks, window_offsets, window_mask, complete)


def _window_positions(
    metadata: KVCompressMetadata, lengths: torch.Tensor, longest: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, W] positions (0 where invalid) and [B, W] bool: sinks, then the recent window without the sinks."""
    device = lengths.device
    sinks = torch.arange(min(metadata.sink_tokens, longest), device=device).expand(len(lengths), -1)
    back = torch.arange(min(metadata.recent_tokens, longest), 0, -1, device=device)
    recent = lengths.unsqueeze(1) - back
    positions = torch.cat((sinks, recent), dim=1)
    valid = torch.cat((sinks < lengths.unsqueeze(1), recent >= min(metadata.sink_tokens, longest)), dim=1)
    return positions.clamp(min=0) * valid, valid


def _page_starts(
    metadata: KVCompressMetadata,
    starts: torch.Tensor,
    query_lens: torch.Tensor,
    stored: torch.Tensor,
    slots: torch.Tensor,
) -> PageStarts:
    device, page_tokens = slots.device, metadata.page_tokens
    pages, run_of_token, run_lengths = torch.unique_consecutive(
        slots // page_tokens, return_inverse=True, return_counts=True
    )
    first_token = run_lengths.cumsum(0) - run_lengths
    runs = (slots[first_token] % page_tokens == 0).nonzero().squeeze(1)
    first = stored[first_token[runs]]
    request_of_token = torch.repeat_interleave(torch.arange(len(query_lens)), query_lens).to(device)
    requests = request_of_token[first]
    history = (metadata.seq_lens.long() - query_lens).to(device)[requests]
    page_index = (history + first - starts.to(device)[requests]) // page_tokens
    previous = metadata.block_table[requests, (page_index - 1).clamp(min=0)].long() * (page_index > 0)
    old_tokens = (history - (page_index - 1) * page_tokens).clamp(0, page_tokens)
    # The tokens of this step that completed the previous page, if any, are the run right before.
    before = (runs - 1).clamp(min=0)
    previous_runs = torch.where((runs > 0) & (pages[before] == previous), before, -1)
    borrows = (run_lengths[runs] < min(MIN_TOKENS_FOR_OWN_MEAN, page_tokens)) & (previous > 0)
    return PageStarts(
        run_of_token=run_of_token,
        num_runs=len(pages),
        own_runs=runs[~borrows],
        own_pages=pages[runs[~borrows]],
        borrowing_pages=pages[runs[borrows]],
        previous_pages=previous[borrows],
        previous_old_tokens=old_tokens[borrows],
        previous_runs=previous_runs[borrows],
    )
