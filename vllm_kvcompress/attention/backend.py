# SPDX-License-Identifier: Apache-2.0
"""The attention backend that vLLM picks for our cache dtypes."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadata,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, KVCacheSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

from vllm_kvcompress.attention.gaps import ClosesGaps, Origin
from vllm_kvcompress.attention.gpu_metadata import (
    GpuMetadata,
    cudagraph_support,
    make_metadata,
    max_varlen_query_len,
)
from vllm_kvcompress.attention.pages import PageSpec
from vllm_kvcompress.attention.plan import StepPlan, make_plan
from vllm_kvcompress.attention.window_layer import WindowMetadata
from vllm_kvcompress.checks import kernel_path, resolve
from vllm_kvcompress.formats import PageFormat, format_names, get_format
from vllm_kvcompress.formats.base import PAGE_TOKENS, SUPPORTED_HEAD_DIMS


@dataclass
class KVCompressMetadata(AttentionMetadata):
    """One step of one KV cache group, on the torch path. Tensors are vLLM's own; all layers share one plan."""

    num_actual_tokens: int
    query_start_loc: torch.Tensor
    """[num_reqs + 1] int32, on the host"""
    seq_lens: torch.Tensor
    """[num_reqs] int32, on the host: history plus this step's tokens"""
    block_table: torch.Tensor
    """[num_reqs, max_pages] int32; 0 = null page"""
    slot_mapping: torch.Tensor
    """[num_tokens] int64; negative or in page 0: not stored"""
    page_tokens: int
    centres_pages: bool
    sink_tokens: int
    recent_tokens: int
    origin: Origin | None = None
    _plan: StepPlan | None = None

    def plan(self, windows: WindowMetadata | None) -> StepPlan:
        """Index tensors of the step; computed at the first layer, shared by the rest."""
        if self._plan is None:
            self._plan = make_plan(self, windows)
        return self._plan


class KVCompressMetadataBuilder(ClosesGaps[KVCompressMetadata | GpuMetadata]):
    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._resolved = resolve(vllm_config)
        self._on_gpu = kernel_path(vllm_config)[0] == "gpu"
        if self._on_gpu:
            # Decodes come first in the batch, verified drafts with them.
            self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)

    @classmethod
    def get_cudagraph_support(cls, vllm_config: VllmConfig, kv_cache_spec: KVCacheSpec) -> AttentionCGSupport:
        return cudagraph_support(vllm_config)

    @classmethod
    def get_varlen_cudagraph_max_query_len(cls, vllm_config: VllmConfig, kv_cache_spec: KVCacheSpec) -> int | None:
        return max_varlen_query_len(vllm_config)

    def make(self, common: CommonAttentionMetadata) -> KVCompressMetadata | GpuMetadata:
        if self._on_gpu:
            assert self.reorder_batch_threshold is not None
            return make_metadata(common, self.reorder_batch_threshold, self.kv_cache_spec.block_size)
        return KVCompressMetadata(
            num_actual_tokens=common.num_actual_tokens,
            query_start_loc=common.query_start_loc_cpu[: common.num_reqs + 1],
            seq_lens=common.seq_lens[: common.num_reqs].cpu(),
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
            page_tokens=self.kv_cache_spec.block_size,
            centres_pages=self._resolved.page_format.centring == "page",
            sink_tokens=self._resolved.sink_tokens,
            recent_tokens=self._resolved.recent_tokens,
        )


class KVCompressBackend(AttentionBackend):
    """2-bit pages with 16-bit windows; one subclass per page format (`backend_path`).

    `get_name` is CUSTOM: vLLM's enum has no other name that survives pickling.
    """

    page_format: ClassVar[PageFormat]
    budget_share: ClassVar[float] = 1.0
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: KVCacheSpec | None = None) -> list[int | MultipleOf]:
        # MultipleOf(16) would make CUDA platforms choose 16, too small for a 16-bit companion page.
        return [MultipleOf(PAGE_TOKENS)]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return list(SUPPORTED_HEAD_DIMS)

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        # Each head of a page contiguous, so that a kernel fetches it in one copy.
        return (KVCacheLayout.LBHNC,)

    @classmethod
    def supports_kv_cache_dtype(cls, kv_cache_dtype: str | None) -> bool:
        return kv_cache_dtype == cls.page_format.name

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        return attn_type == AttentionType.DECODER

    @classmethod
    def supports_kv_connector(cls) -> bool:
        return True  # our own (`episodic.connector`); others are refused at start

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> PageSpec:
        """Pages of our bytes: vLLM allocates heads x tokens x `bytes_per_token`, whose inside is ours."""
        layout = cls.page_format.layout(spec.head_size, spec.block_size)
        assert isinstance(spec, FullAttentionSpec)
        pages = PageSpec.of(spec)
        return replace(pages, state_content_bytes=layout.bytes_per_token, budget_share=cls.budget_share)

    @staticmethod
    def get_impl_cls():
        from vllm_kvcompress.attention.impl import KVCompressImpl

        return KVCompressImpl

    @staticmethod
    def get_builder_cls() -> type[KVCompressMetadataBuilder]:
        return KVCompressMetadataBuilder


@functools.cache
def with_budget_share(backend: type[KVCompressBackend], share: float) -> type[KVCompressBackend]:
    """The backend of layers that keep a share of the budget: vLLM asks a layer's backend for its spec."""
    return type(backend.__name__, (backend,), {"budget_share": share, "__module__": backend.__module__})


def _class_name(format_name: str) -> str:
    return "".join(part.capitalize() for part in format_name.replace(".", "-").split("-")) + "Backend"


def backend_path(format_name: str) -> str:
    """Qualified name of the backend of a format: vLLM resolves backends by name, in every process anew."""
    return f"{__name__}.{_class_name(format_name)}"


for _name in format_names():
    globals()[_class_name(_name)] = type(
        _class_name(_name), (KVCompressBackend,), {"page_format": get_format(_name), "__module__": __name__}
    )
