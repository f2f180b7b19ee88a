# SPDX-License-Identifier: Apache-2.0
"""Attention of one layer over 2-bit pages and their 16-bit windows."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionImpl, AttentionType, max_decode_query_len
from vllm.v1.kv_cache_interface import AttentionSpec

from vllm_kvcompress import compat, rotations
from vllm_kvcompress.attention.backend import KVCompressMetadata, with_budget_share
from vllm_kvcompress.attention.gpu_metadata import GpuMetadata, StepPart
from vllm_kvcompress.attention.plan import ReadGroup
from vllm_kvcompress.attention.window_layer import WINDOW_SUFFIX, WindowLayer, WindowMetadata
from vllm_kvcompress.checks import evicts, kernel_case, kernel_path, read_fitting_rotation, resolve, rotation_needs
from vllm_kvcompress.errors import UnsupportedModelError
from vllm_kvcompress.formats.base import PageLayout, page_fields, sketch_matrix
from vllm_kvcompress.kernels import compaction, torch_attention
from vllm_kvcompress.kernels.selection import choose_decode
from vllm_kvcompress.quantizers.hadamard import hadamard
from vllm_kvcompress.quantizers.random_rotation import split_rotation

if TYPE_CHECKING:
    from vllm.config import VllmConfig

    from vllm_kvcompress.attention.gpu import GpuAttention, LayerConstants
    from vllm_kvcompress.episodic.policies import Policy

logger = logging.getLogger("vllm.kvcompress")

# Seeds of the random rotations, far enough apart for the groups of channels that count up from them.
_KEY_SEED, _VALUE_SEED = 0, 100
# A first prompt with fewer tokens is a poor sample of which channels are outliers.
_ENOUGH_TOKENS = 64


_read_once = functools.lru_cache(maxsize=1)(read_fitting_rotation)
"""For all layers of a process."""


def _read_rotation(path: Path, vllm_config: VllmConfig) -> rotations.RotationSet:
    return _read_once(path, rotation_needs(vllm_config))


@functools.cache
def _say_once(text: str) -> None:
    """Log once a process: every layer knows the same."""
    logger.info(text)


class KVCompressImpl(AttentionImpl[KVCompressMetadata]):
    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **unsupported: object,
    ) -> None:
        refused = {
            "ALiBi": alibi_slopes is not None,
            "sliding-window layers": sliding_window is not None,
            "soft-capped attention logits": bool(logits_soft_cap),
            "KV cache sharing between layers": kv_sharing_target_layer_name is not None,
            **{name: value is not None for name, value in unsupported.items()},
        }
        for feature, present in refused.items():
            if present:
                raise UnsupportedModelError(
                    f"--kv-cache-dtype {kv_cache_dtype} does not support {feature}, which this model uses; "
                    "use --kv-cache-dtype auto"
                )
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.num_queries_per_kv = self.num_heads // self.num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype
        # Kept: the configuration is no longer "current" when weights have been loaded.
        self._vllm_config = get_current_vllm_config()
        self._resolved = resolve(self._vllm_config)
        model_dtype = self._vllm_config.model_config.dtype
        assert isinstance(model_dtype, torch.dtype)  # vLLM has resolved "auto" by now
        self._window_dtype: torch.dtype = model_dtype if model_dtype.itemsize == 2 else torch.bfloat16
        self._window: WindowLayer | None = None
        self._window_name = ""
        self._k_rotation: torch.Tensor | None = None
        self._v_rotation: torch.Tensor | None = None
        self._k_mean: torch.Tensor | None = None
        self._clip_k: torch.Tensor | float = self._resolved.page_format.clip_k
        self._clip_v: torch.Tensor | float = self._resolved.page_format.clip_v
        self._chooses_outliers = False
        """Whether the next tokens stored settle which channels are outliers"""
        self._gpu: GpuAttention | None = None
        """None: the torch path serves"""
        self._layer: AttentionLayerBase | None = None

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Load this layer's rotations and register its companion cache; the first moment the layer's name is known."""
        context = self._vllm_config.compilation_config.static_forward_context
        name, layer = next((n, module) for n, module in context.items() if getattr(module, "impl", None) is self)
        index = extract_layer_index(name)
        self._load_rotation(index)
        share = self._resolved.budget_shares.get(index, 1.0)
        if share != layer.get_attn_backend().budget_share:
            compat.set_attention_backend(layer, with_budget_share(layer.get_attn_backend(), share))
        if self._resolved.has_windows and not self._window_name:
            sinks, recent = self._resolved.sink_tokens, self._resolved.recent_tokens
            self._window = WindowLayer(layer, self.num_heads, sinks, recent)
            self._window_name = name + WINDOW_SUFFIX
            context[self._window_name] = self._window
        path, reason = kernel_path(self._vllm_config)
        if path == "gpu":
            self._layer = layer
            self._make_gpu_attention()
        else:
            _say_once(f"attention over {self.kv_cache_dtype} pages in torch: {reason}")

    def _make_gpu_attention(self) -> None:
        # Imports Triton, which an engine on the torch path need not have.
        from vllm_kvcompress.attention.gpu import GpuAttention, Limits
        from vllm_kvcompress.attention.prefill import find_flash_attention

        config = self._vllm_config
        device = config.device_config.device
        assert isinstance(device, torch.device)
        if self._gpu is not None:  # weights are loaded once more
            if self._k_rotation is not None:  # random ones are not made anew
                self._gpu.constants.update(self._take_constants())
            return
        constants = self._take_constants()
        case = kernel_case(config)
        kernel, why = choose_decode(self._resolved.kernels, device, case)
        flash = find_flash_attention(self.head_size, case.dtype)
        prefill = f"Triton ({flash})" if isinstance(flash, str) else flash.name
        decodes = "CUDA" if kernel == "cuda" else "Triton"
        _say_once(f"attention over {self.kv_cache_dtype} pages: decode {decodes} ({why}), prefill {prefill}")
        self._gpu = GpuAttention(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_size,
            scale=self.scale,
            dtype=case.dtype,
            window_dtype=self._window_dtype,
            sink_tokens=self._resolved.sink_tokens,
            recent_tokens=self._resolved.recent_tokens,
            constants=constants,
            decode_kernel=kernel,
            flash=None if isinstance(flash, str) else flash,
            limits=Limits(
                max_tokens=config.scheduler_config.max_num_batched_tokens,
                max_requests=config.scheduler_config.max_num_seqs,
                decode_query_len=max_decode_query_len(config),
            ),
            device=device,
        )

    def _load_rotation(self, layer_index: int) -> None:
        device = self._vllm_config.device_config.device
        page_format = self._resolved.page_format
        if page_format.rotation == "hadamard":
            matrix = hadamard(self.head_size).to(device).expand(self.num_kv_heads, -1, -1)
            self._k_rotation = self._v_rotation = matrix
        if page_format.rotation == "random":
            if self._k_rotation is None and self._gpu is None:  # never anew: pages may hold tokens rotated by it
                self._load_random_rotations(layer_index)
            return
        if self._resolved.rotation is None:
            return
        layer = _read_rotation(self._resolved.rotation, self._vllm_config).layers[layer_index]
        heads = self._own_kv_heads(layer.k_rotation.shape[0])
        self._k_rotation = layer.k_rotation[heads].to(device)
        self._v_rotation = layer.v_rotation[heads].to(device)
        self._clip_k, self._clip_v = layer.k_clip[heads].to(device), layer.v_clip[heads].to(device)
        if page_format.centring == "static":
            self._k_mean = layer.k_mean[heads].to(device)

    def _load_random_rotations(self, layer_index: int) -> None:
        device = self._vllm_config.device_config.device
        path = self._resolved.rotation
        metadata = None if path is None else _read_rotation(path, self._vllm_config).metadata
        if metadata is None or not metadata.k_channels:
            unsplit = torch.arange(self.head_size, device=device).expand(self.num_kv_heads, -1)
            self._set_random_rotations(unsplit, unsplit)
            self._chooses_outliers = self._resolved.page_format.splits_channels
            if self._chooses_outliers:
                missing = "" if path is None else f": {path} does not say, it was made by an earlier release"
                _say_once(f"{self.kv_cache_dtype}: the first prompt decides which channels are outliers{missing}")
            return
        heads = self._own_kv_heads(metadata.num_kv_heads)
        index = metadata.layer_ids.index(layer_index)
        k_order, v_order = (
            torch.tensor(channels[index], device=device)[heads]
            for channels in (metadata.k_channels, metadata.v_channels)
        )
        self._set_random_rotations(k_order, v_order)

    def _set_random_rotations(self, k_order: torch.Tensor, v_order: torch.Tensor) -> None:
        """k_order, v_order: [H, D] int64, the channels of each head, outliers first."""
        page_format, dim = self._resolved.page_format, self.head_size
        self._k_rotation = split_rotation(k_order, page_format.keys.part_sizes(dim), _KEY_SEED)
        self._v_rotation = split_rotation(v_order, page_format.values.part_sizes(dim), _VALUE_SEED)

    def _choose_outliers(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Settle which channels of this layer's heads are outliers, by the first tokens stored: the largest energy.

        Once for the engine's lifetime: what is in the pages depends on it.

        Args:
            key, value: [T, H, D] of the first prompt's first chunk.
        """
        self._chooses_outliers = False
        k, v = key.float(), value.float()
        if self._resolved.page_format.centring == "page":
            k = k - k.mean(dim=0)
        k_order, v_order = (x.square().sum(dim=0).argsort(dim=-1, descending=True, stable=True) for x in (k, v))
        self._set_random_rotations(k_order, v_order)
        if len(key) < _ENOUGH_TOKENS:
            _say_once(
                f"{self.kv_cache_dtype}: outlier channels were chosen by a first prompt of {len(key)} tokens; one of "
                f"{_ENOUGH_TOKENS} or more is a better sample"
            )

    def _choose_outliers_on_gpu(
        self, key: torch.Tensor, value: torch.Tensor, part: StepPart, pages: torch.Tensor, layout: PageLayout
    ) -> None:
        """The same by a step's prefills, unless all of it is padding: then the choice is left to a later step.

        Waits for the device, at the first prompt only. Prompts of a single token are served as decodes, inside graphs,
        where no Python runs: if such came first, the channels stay in their own order, or they would be misread.
        """
        assert self._gpu is not None
        real = part.slot_mapping >= layout.page_tokens
        if not bool(real.any()):
            return
        if bool(page_fields(pages, layout).keys.scales[0][1:].any()):  # vLLM allocates zeros
            self._chooses_outliers = False
            _say_once(
                f"{self.kv_cache_dtype}: tokens were stored before a prompt of more than one token came; all channels "
                "count alike, none as outliers"
            )
            return
        self._choose_outliers(key[part.tokens][real], value[part.tokens][real])
        self._gpu.constants.update(self._take_constants())

    def _take_constants(self) -> LayerConstants:
        """Rotations, mean and clips as the GPU kernels take them; the torch path's are let go."""
        from vllm_kvcompress.attention.gpu import layer_constants

        device = self._vllm_config.device_config.device
        assert isinstance(device, torch.device)
        signs = self._resolved.page_format.keys.signs
        constants = layer_constants(
            device,
            self.num_kv_heads,
            self._k_rotation,
            self._v_rotation,
            self._k_mean,
            self._clip_k,
            self._clip_v,
            sketch_matrix(self.head_size) if signs else None,
        )
        self._k_rotation = self._v_rotation = self._k_mean = None
        return constants

    def _own_kv_heads(self, total: int) -> list[int]:
        """Indices of this rank's KV heads; ranks beyond `total` hold replicas, as vLLM lays them out."""
        rank, world = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        if total >= world:
            return list(range(rank * self.num_kv_heads, (rank + 1) * self.num_kv_heads))
        return [rank * total // world]

    def forward(  # type: ignore[override]  # the layer is vLLM's Attention module
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: KVCompressMetadata | GpuMetadata | None,  # type: ignore[override]
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend and store.

        Args:
            query: [T, Hq, D]; key, value: [T, H, D] in the model's dtype, T padded.
            kv_cache: [num_pages, H, page_tokens, bytes_per_token] uint8.
            attn_metadata: None in profiling runs.
            output: [T, Hq, D], written in place.
        """
        if attn_metadata is None:
            if self._gpu is not None:
                self._prepare_gpu(self._gpu)
            return output.zero_()
        windows: WindowMetadata | None = None
        window_cache: torch.Tensor | None = None
        if self._window is not None:
            context = get_forward_context().attn_metadata
            assert isinstance(context, dict)  # a list of them is micro-batching, refused at start
            found = context[self._window_name]
            assert isinstance(found, WindowMetadata)
            windows, window_cache = found, self._window.kv_cache
        pages, layout = self._pages(kv_cache)
        if isinstance(attn_metadata, GpuMetadata):
            assert self._gpu is not None
            if self._chooses_outliers and attn_metadata.prefills is not None:
                self._choose_outliers_on_gpu(key, value, attn_metadata.prefills, pages, layout)
            self._gpu.forward(query, key, value, pages, layout, window_cache, attn_metadata, windows, output)
            return output
        plan = attn_metadata.plan(windows)
        total = attn_metadata.num_actual_tokens
        query, key, value, output = query[:total], key[:total], value[:total], output[:total]
        if self._chooses_outliers and len(plan.slots):
            self._choose_outliers(key[plan.stored_tokens], value[plan.stored_tokens])
        k_cache, v_cache = self._to_cache_space(key, value)
        for group in plan.groups:
            rows = group.tokens.flatten()
            if group.has_history:
                result = self._attend_history(
                    group, pages, layout, query[rows], k_cache[rows], v_cache[rows], window_cache
                )
            else:
                result = self._attend_exact(group, query[rows], key[rows], value[rows])
            output[rows] = result.to(output.dtype)
        torch_attention.store(
            pages, layout, plan, k_cache, v_cache, self._clip_k, self._clip_v, window_cache, self._window_dtype
        )
        return output

    @staticmethod
    def score(
        layers: Sequence[Any],
        table: torch.Tensor,
        num_slots: int,
        policy: Policy,
        queries: Sequence[torch.Tensor] | None,
        previous: torch.Tensor | None,
    ) -> torch.Tensor:
        """[L, H, num_slots] float32: a request's slots by a policy, `compaction.score` in layers of one KV cache group.

        Args:
            queries: of every layer [Q, Hq, D] in the model's dtype; or None.
            previous: [L, H, T'] float32, as of `compaction.score`.
        """
        impls, pages, layout, gpus = KVCompressImpl._parts(layers)
        if gpus:
            from vllm_kvcompress.attention.gpu import score_layers

            return score_layers(gpus, pages, layout, table, num_slots, policy, queries, previous)
        found = []
        for number, (impl, one) in enumerate(zip(impls, pages, strict=True)):
            before = None if previous is None else previous[number]
            asked, offset = None if queries is None else queries[number], impl._k_mean
            if impl._k_rotation is not None:
                if offset is not None:
                    offset = torch.einsum("hd,hde->he", offset.float(), impl._k_rotation)
                if asked is not None:
                    grouped = asked.float().unflatten(1, (impl.num_kv_heads, -1))
                    asked = torch.einsum("thgd,hde->thge", grouped, impl._k_rotation).flatten(1, 2)
            found.append(compaction.score(one, layout, table, num_slots, policy, asked, offset, impl.scale, before))
        return torch.stack(found)

    @staticmethod
    def compact(
        layers: Sequence[Any], table: torch.Tensor, targets: torch.Tensor, kept: torch.Tensor, is_first: bool
    ) -> None:
        """Evict from one request's pages, in place: `compaction.compact` in layers of one KV cache group.

        Args:
            kept: [L, H, M] int64, of every layer.
        """
        impls, pages, layout, gpus = KVCompressImpl._parts(layers)
        if gpus:
            from vllm_kvcompress.attention.gpu import compact_layers

            compact_layers(gpus, pages, layout, table, targets, kept, is_first)
            return
        for impl, one, slots in zip(impls, pages, kept, strict=True):
            compaction.compact(one, layout, table, targets, slots, is_first, impl._clip_k)

    @staticmethod
    def _parts(
        layers: Sequence[Any],
    ) -> tuple[list[KVCompressImpl], list[torch.Tensor], PageLayout, list[GpuAttention]]:
        """Of layers of one KV cache group: what implements each, their pages and layout, their GPU kernels if any."""
        impls: list[KVCompressImpl] = [layer.impl for layer in layers]
        found = [impl._pages(layer.kv_cache) for impl, layer in zip(impls, layers, strict=True)]
        gpus = [impl._gpu for impl in impls if impl._gpu is not None]
        return impls, [pages for pages, _ in found], found[0][1], gpus

    def _pages(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, PageLayout]:
        """[num_pages, H, head_bytes] uint8, and what is where in them."""
        layout = self._resolved.page_format.layout(self.head_size, kv_cache.shape[2])
        return kv_cache.view(torch.uint8).flatten(2), layout

    def _prepare_gpu(self, gpu: GpuAttention) -> None:
        """In vLLM's profiling run: claim the scratch memory while it is counted, compile every kernel once."""
        from vllm_kvcompress.attention.gpu_warmup import warm_up, warm_up_eviction

        config = self._vllm_config
        assert self._layer is not None
        spec = self._layer.get_kv_cache_spec(config)
        assert isinstance(spec, AttentionSpec)
        layout = self._resolved.page_format.layout(self.head_size, spec.block_size)
        gpu.scratch(spec.block_size)
        window_block = None if self._window is None else self._window.get_kv_cache_spec(config).block_size
        warm_up(gpu, layout, window_block, config.model_config.max_model_len)
        if evicts(config):
            warm_up_eviction(gpu, layout)

    def _to_cache_space(self, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[T, H, D] model dtype -> keys (K - mean) R_k and values V R_v, [T, H, D] float32."""
        k, v = key.float(), value.float()
        if self._k_mean is not None:
            k = k - self._k_mean
        if self._k_rotation is not None and self._v_rotation is not None:
            k = torch.matmul(k.transpose(0, 1), self._k_rotation).transpose(0, 1)
            v = torch.matmul(v.transpose(0, 1), self._v_rotation).transpose(0, 1)
        return k, v

    def _attend_history(
        self,
        group: ReadGroup,
        pages: torch.Tensor,
        layout: PageLayout,
        query: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        window_cache: torch.Tensor | None,
    ) -> torch.Tensor:
        batch, new = group.tokens.shape
        heads, dim = self.num_kv_heads, self.head_size
        # [B * n, H, G, D] -> [H, B * n * G, D] so that one batched product rotates every query.
        q = query.float().view(batch * new, heads, self.num_queries_per_kv, dim)
        if self._k_rotation is not None:
            q = torch.einsum("thgd,hde->thge", q, self._k_rotation)
        q = q.view(batch, new, heads, -1, dim).permute(0, 2, 3, 1, 4)
        k = k_cache.view(batch, new, heads, dim).transpose(1, 2)
        v = v_cache.view(batch, new, heads, dim).transpose(1, 2)
        out = torch_attention.attend(group, pages, layout, q, k, v, window_cache, self._window_dtype, self.scale)
        if self._v_rotation is not None:
            out = torch.einsum("bhgne,hde->bhgnd", out, self._v_rotation)
        return out.permute(0, 3, 1, 2, 4).reshape(batch * new, self.num_heads, dim)

    def _attend_exact(
        self, group: ReadGroup, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        batch, new = group.tokens.shape
        heads, dim = self.num_kv_heads, self.head_size
        q = query.view(batch, new, heads, self.num_queries_per_kv, dim).permute(0, 2, 3, 1, 4)
        k = key.view(batch, new, heads, dim).transpose(1, 2)
        v = value.view(batch, new, heads, dim).transpose(1, 2)
        out = torch_attention.attend_first_chunk(q, k, v, self.scale)
        return out.permute(0, 3, 1, 2, 4).reshape(batch * new, self.num_heads, dim)
