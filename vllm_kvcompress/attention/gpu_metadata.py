# SPDX-License-Identifier: Apache-2.0
"""Metadata of one step for the GPU kernels: views of vLLM's tensors, and host numbers; nothing waits for the device.

A step has two parts, vLLM's batch order: decodes (at most `threshold` new tokens each), then prefills. Each part is
served by kernels of its own, so its tensors start at its first request and count tokens from its first token.

What a prefill computed in earlier steps is read tile by tile from the pages. The tiles are planned on the host from
upper bounds of the lengths; how many rows of a tile are real is computed on the device, from the true lengths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    CommonAttentionMetadata,
    max_decode_query_len,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills

from vllm_kvcompress.attention.gaps import Origin
from vllm_kvcompress.checks import kernel_path
from vllm_kvcompress.kernels.selection import MAX_DECODE_QUERY_LEN


def cudagraph_support(vllm_config: VllmConfig) -> AttentionCGSupport:
    """GPU kernels: graphs of decodes with equally many tokens each. The torch path waits for the device: none."""
    on_gpu = kernel_path(vllm_config)[0] == "gpu"
    return AttentionCGSupport.UNIFORM_BATCH if on_gpu else AttentionCGSupport.NEVER


def max_varlen_query_len(vllm_config: VllmConfig) -> int | None:
    """Graphs also replay decodes of different lengths up to this: the kernels read the lengths on the device."""
    if cudagraph_support(vllm_config) == AttentionCGSupport.NEVER:
        return None
    return min(max_decode_query_len(vllm_config), MAX_DECODE_QUERY_LEN)


@dataclass(frozen=True, eq=False)
class StepPart:
    """R consecutive requests of a step and their T flat tokens."""

    requests: slice
    """their rows in the step's tensors"""
    tokens: slice
    """their rows of the step's flat tokens"""
    query_start_loc: torch.Tensor
    """[R + 1] int32, counted from the part's first token"""
    seq_lens: torch.Tensor
    """[R] int32: history plus new tokens"""
    block_table: torch.Tensor
    """[R, max_pages] int32; 0 = null page"""
    slot_mapping: torch.Tensor
    """[T] int64; negative or in page 0: not stored"""
    max_query_len: int
    max_seq_len: int
    """upper bound"""
    is_decode: bool

    @property
    def num_tokens(self) -> int:
        return self.tokens.stop - self.tokens.start

    def rows_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The part's requests in a tensor of the step [num_reqs, ...]."""
        return _slice(tensor, self.requests, self.is_decode)

    def tokens_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The part's tokens in a tensor of the step [num_tokens, ...]."""
        return _slice(tensor, self.tokens, self.is_decode)


@dataclass(frozen=True)
class HistoryTile:
    """History tokens `first_token` <= t < `first_token + tile_tokens` of every request of a group."""

    first_token: int
    tile_tokens: int
    """a multiple of the page"""
    max_tokens: int
    """most tokens of one request in the tile"""
    rows: int
    """upper bound of the tokens of all"""
    cu_history: torch.Tensor
    """[R + 1] int32: where each request's rows start in the tile's workspace"""


@dataclass(frozen=True, eq=False)
class HistoryGroup:
    """R consecutive prefills of which the first and the last have history, small enough to share one workspace."""

    requests: slice
    """their rows in the step's tensors"""
    tokens: slice
    """their rows of the part's flat tokens"""
    query_start_loc: torch.Tensor
    """[R + 1] int32, counted from the group's first token"""
    seq_lens: torch.Tensor
    """[R] int32"""
    block_table: torch.Tensor
    """[R, max_pages] int32"""
    max_query_len: int
    tiles: tuple[HistoryTile, ...]

    def rows_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The group's requests in a tensor of the step [num_reqs, ...]."""
        return _slice(tensor, self.requests, False)


@dataclass
class GpuMetadata(AttentionMetadata):
    """One step of one KV cache group, made once for all its layers."""

    num_actual_tokens: int
    decodes: StepPart | None
    prefills: StepPart | None
    prefill_starts: list[int] = field(default_factory=list)
    """host copy of the prefills' query_start_loc"""
    prefill_history: list[int] = field(default_factory=list)
    """upper bounds of the prefills' history, in tokens; vLLM's are exact for prefills"""
    page_tokens: int = 128
    origin: Origin | None = None
    _history: dict[int, tuple[HistoryGroup, ...]] = field(default_factory=dict)

    def history(self, workspace_tokens: int) -> tuple[HistoryGroup, ...]:
        """How the prefills' history is read through a workspace of so many tokens; made at the first layer."""
        if workspace_tokens not in self._history:
            self._history[workspace_tokens] = self._make_history(workspace_tokens)
        return self._history[workspace_tokens]

    def _make_history(self, workspace_tokens: int) -> tuple[HistoryGroup, ...]:
        part = self.prefills
        if part is None or not any(self.prefill_history):
            return ()
        lengths = part.seq_lens - part.query_start_loc.diff()
        groups = []
        for begin, end in group_requests(self.prefill_history, self.page_tokens, workspace_tokens):
            bounds = self.prefill_history[begin:end]
            own = lengths[begin:end]
            tiles = []
            for first, size in plan_tiles(bounds, self.page_tokens, workspace_tokens):
                cu_history = torch.zeros(end - begin + 1, dtype=torch.int32, device=own.device)
                torch.cumsum((own - first).clamp_(0, size), dim=0, dtype=torch.int32, out=cu_history[1:])
                counts = [min(max(bound - first, 0), size) for bound in bounds]
                tiles.append(HistoryTile(first, size, max(counts), sum(counts), cu_history))
            starts = self.prefill_starts[begin : end + 1]
            groups.append(
                HistoryGroup(
                    requests=slice(part.requests.start + begin, part.requests.start + end),
                    tokens=slice(starts[0], starts[-1]),
                    query_start_loc=_rebased(part.query_start_loc[begin : end + 1], starts[0]),
                    seq_lens=_slice(part.seq_lens, slice(begin, end), False),
                    block_table=_slice(part.block_table, slice(begin, end), False),
                    max_query_len=max(b - a for a, b in pairwise(starts)),
                    tiles=tuple(tiles),
                )
            )
        return tuple(groups)


def make_metadata(common: CommonAttentionMetadata, threshold: int, page_tokens: int) -> GpuMetadata:
    """Metadata of a step whose requests with at most `threshold` new tokens come first.

    In a captured CUDA graph the tensors of the decodes are read again in later steps: they are views of the runner's
    persistent ones, and the numbers that reach their kernels are the graph's own.
    """
    num_decodes, num_prefills, num_decode_tokens, num_prefill_tokens = split_decodes_and_prefills(
        common, decode_threshold=threshold
    )
    total = common.num_actual_tokens
    decodes = prefills = None
    starts: list[int] = []
    history: list[int] = []
    if num_decode_tokens:
        # The threshold and not the step's longest query: one variant of the kernels serves every step.
        decodes = _part(common, slice(0, num_decodes), slice(0, num_decode_tokens), threshold, True)
    if num_prefill_tokens:
        requests = slice(num_decodes, num_decodes + num_prefills)
        prefills = _part(common, requests, slice(num_decode_tokens, total), common.max_query_len, False)
        host = common.query_start_loc_cpu[num_decodes : num_decodes + num_prefills + 1]
        starts = (host - num_decode_tokens).tolist()
        bounds = common.seq_lens_cpu_upper_bound
        lengths = [common.max_seq_len] * num_prefills if bounds is None else bounds[requests].tolist()
        new = [b - a for a, b in pairwise(starts)]
        history = [max(0, length - n) if n else 0 for length, n in zip(lengths, new, strict=True)]
    return GpuMetadata(total, decodes, prefills, starts, history, page_tokens)


def _part(
    common: CommonAttentionMetadata, requests: slice, tokens: slice, max_query_len: int, is_decode: bool
) -> StepPart:
    return StepPart(
        requests=requests,
        tokens=tokens,
        query_start_loc=_rebased(common.query_start_loc[requests.start : requests.stop + 1], tokens.start),
        seq_lens=_slice(common.seq_lens, requests, is_decode),
        block_table=_slice(common.block_table_tensor, requests, is_decode),
        slot_mapping=_slice(common.slot_mapping, tokens, is_decode),
        max_query_len=max_query_len,
        max_seq_len=common.max_seq_len,
        is_decode=is_decode,
    )


def _slice(tensor: torch.Tensor, rows: slice, is_view: bool) -> torch.Tensor:
    """Rows of a tensor: a view where it must be, else with its address and rows at multiples of 16.

    Triton compiles a kernel once more for a pointer or a stride that is none, which would happen in the middle of
    serving: where prefills begin in a batch varies from step to step.
    """
    part = tensor[rows]
    is_matrix = part.dim() == 2
    if is_view or (part.data_ptr() % 16 == 0 and not (is_matrix and part.stride(0) % 16)):
        return part
    if not is_matrix:
        return part.clone()
    count, width = part.shape
    return part.new_empty(count, -(-width // 16) * 16)[:, :width].copy_(part)


def _rebased(query_start_loc: torch.Tensor, first_token: int) -> torch.Tensor:
    return query_start_loc - first_token if first_token else query_start_loc


def group_requests(history: Sequence[int], page_tokens: int, workspace_tokens: int) -> list[tuple[int, int]]:
    """(begin, end) of runs of requests, each with at most as many histories as the workspace holds pages.

    Runs begin and end at a request with history; requests without may lie between.
    """
    most = workspace_tokens // page_tokens
    runs: list[tuple[int, int]] = []
    count = 0
    for request, tokens in enumerate(history):
        if not tokens:
            continue
        if count and count < most:
            runs[-1] = (runs[-1][0], request + 1)
            count += 1
        else:
            runs.append((request, request + 1))
            count = 1
    return runs


def plan_tiles(history: Sequence[int], page_tokens: int, workspace_tokens: int) -> list[tuple[int, int]]:
    """(first_token, tile_tokens) of tiles that cover all histories, each as long as the workspace allows.

    Tokens are shared out evenly, and what short histories leave goes to the long ones.
    """
    tiles = []
    first = 0
    while remaining := sorted(tokens - first for tokens in history if tokens > first):
        tokens_left, size = workspace_tokens, -(-remaining[-1] // page_tokens) * page_tokens
        for position, tokens in enumerate(remaining):
            share = tokens_left // (len(remaining) - position)
            if tokens > share:
                size = share // page_tokens * page_tokens
                break
            tokens_left -= tokens
        tiles.append((first, size))
        first += size
    return tiles
