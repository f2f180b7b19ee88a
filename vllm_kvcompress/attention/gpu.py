# SPDX-License-Identifier: Apache-2.0
"""Attention of one layer with the GPU kernels: store, then decodes by the decode kernel, prefills by FlashAttention.

Decodes run inside captured CUDA graphs: their kernels see the same buffers in every step, their launches depend on
host numbers alone, and nothing here waits for the device. Prefills never run inside a graph.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch

from vllm_kvcompress import compat
from vllm_kvcompress.attention.gpu_metadata import GpuMetadata, HistoryGroup, StepPart
from vllm_kvcompress.attention.prefill import HISTORY_TOKENS, FlashAttention
from vllm_kvcompress.attention.window_layer import WindowMetadata
from vllm_kvcompress.episodic.policies import Policy
from vllm_kvcompress.formats.base import PageLayout
from vllm_kvcompress.kernels.decode import Cache, Rows, decode, decode_workspace_elements
from vllm_kvcompress.kernels.workspace import Workspace
from vllm_kvcompress.triton_kernels.compact import compact
from vllm_kvcompress.triton_kernels.gather import gather_history
from vllm_kvcompress.triton_kernels.merge import merge_states
from vllm_kvcompress.triton_kernels.rotate import rotate
from vllm_kvcompress.triton_kernels.score import Slots, score
from vllm_kvcompress.triton_kernels.store import store

_OWN_SCRATCH = Workspace()


@dataclass(frozen=True)
class Limits:
    """Largest step the scheduler makes; scratch memory is sized by it."""

    max_tokens: int
    max_requests: int
    decode_query_len: int
    """most new tokens of a request that is served as a decode"""


@dataclass(frozen=True)
class LayerConstants:
    """What calibration gives a layer, as the kernels take it. None: identity, or no centring."""

    k_rotation: torch.Tensor | None
    """[H, D, D] float16 contiguous: entries are at most 1, so fp16 keeps 10 bits of each, as tf32 would"""
    v_rotation: torch.Tensor | None
    v_unrotation: torch.Tensor | None
    """[H, D, D] float16 contiguous: its transpose"""
    k_mean: torch.Tensor | None
    """[H, D] float32"""
    k_offset: torch.Tensor | None
    """[H, D] float32: the mean in cache space, by the rotation as it is rounded"""
    clip_k: torch.Tensor
    """[H] float32"""
    clip_v: torch.Tensor
    sketch: torch.Tensor | None
    """S [D, D] float16 contiguous, of formats with residual signs"""
    sign_rotation: torch.Tensor | None
    """[H, D, D] float16 contiguous: queries to S times them in cache space"""

    def update(self, other: LayerConstants) -> None:
        """Take over values; the memory stays, for captured graphs read it."""
        for field in fields(self):
            mine = getattr(self, field.name)
            if mine is not None:
                mine.copy_(getattr(other, field.name))


def layer_constants(
    device: torch.device,
    num_kv_heads: int,
    k_rotation: torch.Tensor | None,
    v_rotation: torch.Tensor | None,
    k_mean: torch.Tensor | None,
    clip_k: torch.Tensor | float,
    clip_v: torch.Tensor | float,
    sketch: torch.Tensor | None = None,
) -> LayerConstants:
    """From rotations [H, D, D], mean [H, D], clips [H] or one number and S [D, D], in float32 or wider."""

    def half(matrix: torch.Tensor | None) -> torch.Tensor | None:
        return None if matrix is None else matrix.to(device, torch.float16).contiguous()

    def clip(share: torch.Tensor | float) -> torch.Tensor:
        given = torch.as_tensor(share, dtype=torch.float32, device=device)
        return given.expand(num_kv_heads).contiguous()

    sign_rotation = None
    if sketch is not None:
        sketch = sketch.to(device)
        sign_rotation = (sketch.mT if k_rotation is None else k_rotation.to(device, sketch.dtype) @ sketch.mT).expand(
            num_kv_heads, -1, -1
        )
    rotation = half(k_rotation)
    mean = offset = None if k_mean is None else k_mean.to(device, torch.float32).contiguous()
    if mean is not None and rotation is not None:
        offset = torch.einsum("hd,hde->he", mean, rotation.float()).contiguous()
    return LayerConstants(
        k_rotation=rotation,
        v_rotation=half(v_rotation),
        v_unrotation=half(None if v_rotation is None else v_rotation.mT),
        k_mean=mean,
        k_offset=offset,
        clip_k=clip(clip_k),
        clip_v=clip(clip_v),
        sketch=half(sketch),
        sign_rotation=half(sign_rotation),
    )


class GpuAttention:
    def __init__(
        self,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        scale: float,
        dtype: torch.dtype,
        window_dtype: torch.dtype,
        sink_tokens: int,
        recent_tokens: int,
        constants: LayerConstants,
        decode_kernel: Literal["cuda", "triton"],
        flash: FlashAttention | None,
        limits: Limits,
        device: torch.device,
        history_tokens: int = HISTORY_TOKENS,
    ) -> None:
        """
        Args:
            dtype: the model's; window_dtype: of the companion cache.
            flash: serves prefills; None: Triton's `attend` does, over the pages themselves.
            history_tokens: history dequantised at a time for `flash`.
        """
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.scale = scale
        self.dtype = dtype
        self.window_dtype = window_dtype
        self.sink_tokens = sink_tokens
        self.recent_tokens = recent_tokens
        self.constants = constants
        self.decode_kernel = decode_kernel
        self.flash = flash
        self.limits = limits
        self.device = device
        self.history_tokens = history_tokens
        kernels: set[Literal["cuda", "triton"]] = {decode_kernel} if flash else {decode_kernel, "triton"}
        group, requests = num_heads // num_kv_heads, limits.max_requests
        self._workspace_elements = max(
            decode_workspace_elements(kernel, device, num_kv_heads, group, head_dim, requests, limits.decode_query_len)
            for kernel in kernels
        )

    def scratch(self, page_tokens: int) -> dict[str, torch.Tensor]:
        """Scratch tensors of any step, shared by all layers: the same memory at every call.

        First called while vLLM profiles memory, so that it is counted.
        """
        shapes = self._scratch_shapes(page_tokens)
        manager = compat.workspace_manager()
        if manager is not None:
            return dict(zip(shapes, manager.get_simultaneous(*shapes.values()), strict=True))
        return {name: _OWN_SCRATCH.get(name, *shape, self.device) for name, shape in shapes.items()}

    def key_workspace(self, page_tokens: int) -> torch.Tensor:
        """[N, H, D] float16 for scoring between two layers' attention: all of the scratch memory that vLLM keeps."""
        row = (self.num_kv_heads, self.head_dim)
        manager = compat.workspace_manager()
        if manager is None or self.flash is None:
            shape = (self._history_tokens(page_tokens), *row)
            return _OWN_SCRATCH.get("scored_keys", shape, torch.float16, self.device)
        shapes = self._scratch_shapes(page_tokens).values()
        scratch_bytes = sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes)
        rows = scratch_bytes // (math.prod(row) * torch.float16.itemsize)
        (found,) = manager.get_simultaneous(((rows, *row), torch.float16))
        assert isinstance(found, torch.Tensor)
        return found

    def _scratch_shapes(self, page_tokens: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        limits = self.limits
        tokens = limits.max_tokens
        decode_tokens = min(tokens, limits.max_requests * limits.decode_query_len)
        per_query = (self.num_heads, self.head_dim)
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "q": ((tokens, *per_query), torch.float16),
            "workspace": ((self._workspace_elements,), torch.float32),
        }
        if self.decode_kernel == "cuda" and self.constants.sign_rotation is not None:
            shapes["q_signs"] = ((decode_tokens, *per_query), torch.float16)
        new_kv = (self.num_kv_heads, 2 * self.head_dim)
        if self.flash is None:
            shapes["new_kv"] = ((tokens, *new_kv), self.window_dtype)
            shapes["cache_out"] = ((tokens, *per_query), torch.float16)
        else:
            shapes["new_kv"] = ((decode_tokens, *new_kv), self.window_dtype)
            if self.decode_kernel == "triton":
                shapes["cache_out"] = ((decode_tokens, *per_query), torch.float16)
            history = (self._history_tokens(page_tokens), self.num_kv_heads, self.head_dim)
            shapes["keys"] = shapes["values"] = (history, torch.float16)
            shapes["history_out"] = shapes["tile_out"] = ((tokens, *per_query), torch.float16)
            if self.constants.k_mean is not None:
                shapes["centred"] = ((tokens, self.num_kv_heads, self.head_dim), self.dtype)
        return shapes

    def _history_tokens(self, page_tokens: int) -> int:
        return max(self.history_tokens, page_tokens)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        pages: torch.Tensor,
        layout: PageLayout,
        window_cache: torch.Tensor | None,
        metadata: GpuMetadata,
        windows: WindowMetadata | None,
        out: torch.Tensor,
    ) -> None:
        """Store a step's tokens and attend.

        Args:
            query: [>= T, Hq, D]; key, value: [>= T, H, D] in the model's dtype; rows from T on are padding.
            pages: [num_pages, H, head_bytes] uint8, written.
            window_cache: [num_blocks, H, block, 4 * D] uint8, written; None without windows, like `windows`.
            out: [>= T, Hq, D] in the model's dtype, written but for padding.
        """
        cache = Cache(pages, layout, window_cache, self.window_dtype, self.sink_tokens, self.recent_tokens)
        scratch = self.scratch(layout.page_tokens)
        part = metadata.decodes
        if part is not None:
            q, k, v, o = query[part.tokens], key[part.tokens], value[part.tokens], out[part.tokens]
            self._store(k, v, cache, part, windows, scratch["new_kv"])
            self._attend_pages(q, cache, part, windows, o, scratch, self.decode_kernel)
        part = metadata.prefills
        if part is not None:
            q, k, v, o = query[part.tokens], key[part.tokens], value[part.tokens], out[part.tokens]
            if self.flash is None:
                self._store(k, v, cache, part, windows, scratch["new_kv"])
                self._attend_pages(q, cache, part, windows, o, scratch, "triton")
            else:
                self._store(k, v, cache, part, windows, None)
                groups = metadata.history(self._history_tokens(layout.page_tokens))
                self._attend_chunks(self.flash, q, k, v, cache, part, groups, windows, o, scratch)

    def _store(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        cache: Cache,
        part: StepPart,
        windows: WindowMetadata | None,
        new_kv: torch.Tensor | None,
    ) -> None:
        constants = self.constants
        store(
            cache.pages,
            cache.layout,
            key,
            value,
            part.slot_mapping,
            part.query_start_loc,
            part.seq_lens,
            part.block_table,
            k_rotation=constants.k_rotation,
            v_rotation=constants.v_rotation,
            k_mean=constants.k_mean,
            clip_k=constants.clip_k,
            clip_v=constants.clip_v,
            sketch=constants.sketch,
            window_cache=cache.window_cache,
            window_slots=None if windows is None else windows.slots(part),
            window_dtype=cache.window_dtype,
            new_kv=new_kv,
            max_query_len=part.max_query_len,
        )

    def _attend_pages(
        self,
        query: torch.Tensor,
        cache: Cache,
        part: StepPart,
        windows: WindowMetadata | None,
        out: torch.Tensor,
        scratch: Mapping[str, torch.Tensor],
        kernel: Literal["cuda", "triton"],
    ) -> None:
        """New tokens, just written to scratch's new_kv, over the pages as they are."""
        rotated = scratch["q"][: part.num_tokens]
        rotate(query, self.constants.k_rotation, rotated)
        q_signs = None
        if kernel == "cuda" and self.constants.sign_rotation is not None:
            q_signs = scratch["q_signs"][: part.num_tokens]
            rotate(query, self.constants.sign_rotation, q_signs)
        cache_out = scratch.get("cache_out")
        rows = Rows(
            query_start_loc=part.query_start_loc,
            seq_lens=part.seq_lens,
            block_table=part.block_table,
            window_table=None if windows is None else windows.table(part),
            max_query_len=part.max_query_len,
            max_seq_len=part.max_seq_len,
        )
        decode(
            kernel,
            rotated,
            scratch["new_kv"],
            cache,
            rows,
            self.constants.v_unrotation,
            self.scale,
            out,
            sketch=self.constants.sketch,
            q_signs=q_signs,
            cache_out=None if cache_out is None else cache_out[: part.num_tokens],
            workspace=scratch["workspace"],
        )

    def _attend_chunks(
        self,
        flash: FlashAttention,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cache: Cache,
        part: StepPart,
        groups: tuple[HistoryGroup, ...],
        windows: WindowMetadata | None,
        out: torch.Tensor,
        scratch: Mapping[str, torch.Tensor],
    ) -> None:
        """Prefills: their new tokens among themselves in the model's own basis, their history in cache space."""
        if groups and self.constants.k_mean is not None:
            # Centring shifts all scores of a query alike, which its softmax does not see but its log-sum-exp does: both
            # sides of the merge must be centred. Subtracted in float32: a mean may be far larger than what is left.
            key = torch.sub(key, self.constants.k_mean, out=scratch["centred"][: part.num_tokens])
        lse = flash.exact(query, key, value, part.query_start_loc, part.max_query_len, self.scale, out)
        for group in groups:
            window_table = None if windows is None else windows.table(group)
            count = group.tokens.stop - group.tokens.start
            rotated, history_out, tile_out = (scratch[name][:count] for name in ("q", "history_out", "tile_out"))
            rotate(query[group.tokens], self.constants.k_rotation, rotated)
            history_lse: torch.Tensor | None = None
            for tile in group.tiles:
                gather_history(
                    cache.pages,
                    cache.layout,
                    group.block_table,
                    group.seq_lens,
                    group.query_start_loc,
                    tile.cu_history,
                    tile.first_token,
                    scratch["keys"],
                    scratch["values"],
                    tile_tokens=tile.tile_tokens,
                    window_cache=cache.window_cache,
                    window_table=window_table,
                    window_dtype=cache.window_dtype,
                    sink_tokens=cache.sink_tokens,
                    recent_tokens=cache.recent_tokens,
                    sketch=self.constants.sketch,
                )
                target = history_out if history_lse is None else tile_out
                tile_lse = flash.history(
                    rotated,
                    scratch["keys"][: tile.rows],
                    scratch["values"][: tile.rows],
                    group.query_start_loc,
                    tile.cu_history,
                    group.max_query_len,
                    tile.max_tokens,
                    self.scale,
                    target,
                )
                # The running result stays in cache space, where vLLM's merge will do: un-rotation is linear, so it is
                # paid once, in our own merge with the exact part below.
                if history_lse is None:
                    history_lse = tile_lse
                else:
                    history_lse = flash.merge(history_out, history_lse, tile_out, tile_lse)
            assert history_lse is not None  # a group has history, so a tile
            exact = out[group.tokens]
            merge_states(
                exact,
                exact,
                _aligned(lse[:, group.tokens]),
                history_out,
                _aligned(history_lse),
                self.constants.v_unrotation,
            )


def score_layers(
    layers: Sequence[GpuAttention],
    pages: Sequence[torch.Tensor],
    layout: PageLayout,
    table: torch.Tensor,
    num_slots: int,
    policy: Policy,
    queries: Sequence[torch.Tensor] | None,
    previous: torch.Tensor | None,
) -> torch.Tensor:
    """[L, H, num_slots] float32 of one request's slots in several layers: `triton_kernels.score.score`.

    Args:
        queries: of every layer [Q, Hq, D] in the model's dtype, the last dimension contiguous; or None.
    """
    first = layers[0]
    rotated = offset = None
    if queries is not None:
        rotated = torch.empty(len(layers), *queries[0].shape, dtype=torch.float16, device=first.device)
        for layer, own, out in zip(layers, queries, rotated, strict=True):
            rotate(own, layer.constants.k_rotation, out)
    if first.constants.k_offset is not None:
        offset = torch.stack([layer.constants.k_offset for layer in layers if layer.constants.k_offset is not None])
    slots = Slots(pages, layout, table, num_slots, first.key_workspace(layout.page_tokens), first.constants.sketch)
    return score(policy, slots, rotated, offset, first.scale, previous)


def compact_layers(
    layers: Sequence[GpuAttention],
    pages: Sequence[torch.Tensor],
    layout: PageLayout,
    table: torch.Tensor,
    targets: torch.Tensor,
    kept: torch.Tensor,
    is_first: bool,
) -> None:
    """Evict from one request's pages in several layers, in place: `triton_kernels.compact.compact`."""
    clip_k = torch.stack([layer.constants.clip_k for layer in layers])
    compact(pages, layout, table, targets, kept, is_first, clip_k, sketch=layers[0].constants.sketch)


def _aligned(lse: torch.Tensor) -> torch.Tensor:
    """[Hq, T] with rows at multiples of 16: Triton would compile `merge_states` once more for others."""
    if lse.data_ptr() % 16 == 0 and lse.stride(0) % 16 == 0:
        return lse
    heads, tokens = lse.shape
    return lse.new_empty(heads, -(-tokens // 16) * 16)[:, :tokens].copy_(lse)
