# SPDX-License-Identifier: Apache-2.0
"""The companion cache as vLLM sees it: an attention-like layer without arithmetic that owns pages and metadata."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadata,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

from vllm_kvcompress.attention.gaps import ClosesGaps, Origin
from vllm_kvcompress.attention.gpu_metadata import (
    HistoryGroup,
    StepPart,
    cudagraph_support,
    max_varlen_query_len,
)
from vllm_kvcompress.attention.pages import PageSpec
from vllm_kvcompress.attention.windows import WindowSpec, make_window_spec

WINDOW_SUFFIX = ".window"
"""Of a companion's name, after its layer's"""


@dataclass
class WindowMetadata(AttentionMetadata):
    """Where the windows of a step lie."""

    block_table: torch.Tensor
    """[num_reqs, max_blocks] int32; 0 = no 16-bit copy"""
    slot_mapping: torch.Tensor
    """[num_tokens] int64; slots in block 0 and negative ones are not written"""
    block_size: int
    origin: Origin | None = None
    _tables: dict[StepPart | HistoryGroup, torch.Tensor] = field(default_factory=dict)
    _slots: dict[StepPart, torch.Tensor] = field(default_factory=dict)

    def table(self, requests: StepPart | HistoryGroup) -> torch.Tensor:
        """[R, max_blocks] int32 of some of the step's requests; made once for all layers."""
        if requests not in self._tables:
            self._tables[requests] = requests.rows_of(self.block_table)
        return self._tables[requests]

    def slots(self, part: StepPart) -> torch.Tensor:
        """[T] int64 of a part of the step; made once for all layers."""
        if part not in self._slots:
            self._slots[part] = part.tokens_of(self.slot_mapping)
        return self._slots[part]


class WindowMetadataBuilder(ClosesGaps[WindowMetadata]):
    def __init__(
        self, kv_cache_spec: WindowSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    # vLLM takes the weakest of all builders, so this one must support what the pages' does.
    @classmethod
    def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: KVCacheSpec) -> AttentionCGSupport:
        return cudagraph_support(vllm_config)

    @classmethod
    def get_varlen_cudagraph_max_query_len(cls, vllm_config: VllmConfig, kv_cache_spec: KVCacheSpec) -> int | None:
        return max_varlen_query_len(vllm_config)

    def make(self, common: CommonAttentionMetadata) -> WindowMetadata:
        return WindowMetadata(
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
            block_size=self.kv_cache_spec.block_size,
        )


class WindowBackend(AttentionBackend):
    """Names the layout of the companion pages; never runs."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: KVCacheSpec | None = None) -> list[int | MultipleOf]:
        return [MultipleOf(1)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBHNC,)

    @staticmethod
    def get_impl_cls():
        raise NotImplementedError("the window cache is read by the layer it belongs to")

    @staticmethod
    def get_builder_cls() -> type[WindowMetadataBuilder]:
        return WindowMetadataBuilder


class WindowLayer(AttentionLayerBase):
    """Companion of one attention layer. Not an nn.Module: it must not appear among the model's modules."""

    def __init__(self, main: AttentionLayerBase, num_heads: int, sink_tokens: int, recent_tokens: int) -> None:
        self._main = main
        self._windows = (sink_tokens, recent_tokens)
        self.num_heads = num_heads
        self.kv_cache = torch.tensor([])
        """[B, H, block_size, 4 * D] uint8 once bound"""

    def get_attn_backend(self) -> type[AttentionBackend]:
        return WindowBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> WindowSpec:
        # Asked late, like the main layer: vLLM may still change the block size after the model is loaded.
        main = self._main.get_kv_cache_spec(vllm_config)
        assert isinstance(main, AttentionSpec)
        pages = self._main.get_attn_backend().customize_spec(main)
        assert isinstance(pages, PageSpec)
        return make_window_spec(pages, vllm_config, *self._windows)
