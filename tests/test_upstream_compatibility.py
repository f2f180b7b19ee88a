# SPDX-License-Identifier: Apache-2.0
"""Every private seam of vLLM this package leans on, one test each: a failure names the seam that moved."""

import dataclasses
import importlib.util
import inspect
from typing import get_args

import pytest

from vllm_kvcompress import compat
from vllm_kvcompress.formats import format_names


def parameters(function):
    return list(inspect.signature(function).parameters)


def test_version_is_served():
    compat.check_version()


def test_cache_dtype_seam():
    """0.32: CacheConfig's Literal; 0.33: register_kv_cache_dtype and KV_CACHE_DTYPES."""
    from vllm.config import cache
    from vllm.utils import torch_utils

    if hasattr(cache, "register_kv_cache_dtype"):
        from vllm.v1.kv_cache_interface import is_quantized_kv_cache
    else:
        from vllm.utils.torch_utils import is_quantized_kv_cache

    compat.register_cache_dtypes(format_names())
    known = cache.KV_CACHE_DTYPES if hasattr(cache, "register_kv_cache_dtype") else get_args(cache.CacheDType)
    for name in format_names():
        assert list(known).count(name) == 1
        assert cache.CacheConfig(cache_dtype=name).cache_dtype == name
        assert torch_utils.STR_DTYPE_TO_TORCH_DTYPE[name].itemsize == 1
        # Asked of the engine's dtype by backends of layers that keep another one, which would then expect fp8 pages.
        assert not is_quantized_kv_cache(name)
    with pytest.raises(ValueError):
        cache.CacheConfig(cache_dtype="no-such-format")


def test_platform_seams():
    """type(current_platform).get_attn_backend_cls and .check_and_update_config are classmethods we can wrap."""
    from vllm.platforms import current_platform

    platform = type(current_platform)
    choose = platform.get_attn_backend_cls
    assert inspect.ismethod(choose) and parameters(choose)[:2] == ["selected_backend", "attn_selector_config"]
    check = platform.check_and_update_config
    assert inspect.ismethod(check) and parameters(check) == ["vllm_config"]


def test_layer_backend_seam():
    """A layer's backend is an attribute, and vLLM asks it, not the choice it was made by, for the layer's spec."""
    from vllm.model_executor.layers.attention import Attention
    from vllm.v1.worker.gpu.attn_utils import get_kv_cache_spec

    layer, backend = Attention.__new__(Attention), type("Backend", (), {})
    compat.set_attention_backend(layer, backend)
    assert layer.get_attn_backend() is backend
    assert "get_attn_backend()" in inspect.getsource(get_kv_cache_spec)


def test_block_size_seam():
    """Where a layer of another dtype learns its page: the platform's step is ours to leave out, its result to give."""
    from vllm.config import CacheConfig
    from vllm.model_executor.layers.attention import Attention
    from vllm.platforms import current_platform

    choose = type(current_platform).update_block_size_for_backend
    assert inspect.ismethod(choose) and parameters(choose) == ["vllm_config"]
    names = {field.name for field in dataclasses.fields(CacheConfig)}
    assert {"skip_page_size_padded", "user_specified_block_size"} <= names
    assert '"sliding_window" in cache_config.kv_cache_dtype_skip_layers' in inspect.getsource(Attention.__init__)
    assert "skip_page_size_padded" in inspect.getsource(Attention.get_kv_cache_spec)


def test_backend_validation_seam():
    """AttentionBackend.validate_configuration takes every field of the selector's configuration."""
    from vllm.v1.attention.backend import AttentionBackend
    from vllm.v1.attention.selector import AttentionSelectorConfig

    accepted = set(parameters(AttentionBackend.validate_configuration))
    assert set(AttentionSelectorConfig._fields) <= accepted


def test_spec_registry_seam():
    from vllm.v1.kv_cache_interface import FullAttentionSpec
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    from vllm_kvcompress.attention.windows import WindowManager, WindowSpec

    assert KVCacheSpecRegistry._ensure_registered
    built_in = KVCacheSpecRegistry.get_manager_class(_full_attention_spec())
    assert built_in is not None and built_in.__name__ == "FullAttentionManager", FullAttentionSpec
    spec = WindowSpec(
        block_size=16,
        num_kv_heads=1,
        head_size=64,
        dtype=_full_attention_spec().dtype,
        sliding_window=65,
        sink_tokens=32,
        recent_tokens=64,
        rollback_tokens=0,
    )
    assert KVCacheSpecRegistry.get_manager_class(spec) is WindowManager


def _full_attention_spec():
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    return FullAttentionSpec(block_size=128, num_kv_heads=1, head_size=64, dtype=torch.uint8)


def test_spec_fields_seam():
    from vllm.v1.kv_cache_interface import AttentionSpec, SlidingWindowSpec

    names = {field.name for field in dataclasses.fields(AttentionSpec)}
    assert {"state_content_bytes", "page_size_padded", "kv_quant_mode", "num_kv_heads", "head_size"} <= names
    assert parameters(SlidingWindowSpec.max_admission_blocks_per_request)[1:] == [
        "max_in_flight_tokens",
        "max_model_len",
    ]


@pytest.mark.parametrize(
    "method",
    [
        "find_longest_cache_hit",
        "get_num_blocks_to_allocate",
        "add_local_computed_blocks",
        "allocate_new_blocks",
        "remove_skipped_blocks",
        "pop_blocks_for_free",
        "get_num_skipped_tokens",
    ],
)
def test_block_manager_seam(method):
    """WindowManager overrides these with the very parameters the coordinator passes."""
    from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager

    from vllm_kvcompress.attention.windows import WindowManager

    assert parameters(getattr(WindowManager, method)) == parameters(getattr(SlidingWindowManager, method))


def test_attention_impl_seam():
    """Attention.__init__ passes ten positional arguments to the implementation."""
    from vllm.v1.attention.backend import AttentionImpl

    from vllm_kvcompress.attention.impl import KVCompressImpl

    upstream = parameters(AttentionImpl.__init__)
    assert parameters(KVCompressImpl.__init__)[: len(upstream)] == upstream
    assert parameters(KVCompressImpl.forward) == parameters(AttentionImpl.forward)


def test_attention_layer_seam():
    """Layers are found in static_forward_context and expose get_attn_backend, get_kv_cache_spec, bind_kv_cache."""
    from vllm.config import CompilationConfig
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    assert isinstance(CompilationConfig().static_forward_context, dict)
    for method in ("get_attn_backend", "get_kv_cache_spec", "bind_kv_cache"):
        assert hasattr(AttentionLayerBase, method)


def test_common_metadata_seam():
    from vllm.v1.attention.backend import CommonAttentionMetadata

    names = {field.name for field in dataclasses.fields(CommonAttentionMetadata)}
    needed = {"query_start_loc_cpu", "seq_lens", "num_reqs", "num_actual_tokens", "block_table_tensor", "slot_mapping"}
    needed |= {"query_start_loc", "max_query_len", "max_seq_len", "seq_lens_cpu_upper_bound"}
    assert needed <= names


def test_decode_and_prefill_seam():
    """Which requests are decodes, and what graphs may hold: the GPU kernels' metadata builders."""
    from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadataBuilder, max_decode_query_len
    from vllm.v1.attention.backends.utils import split_decodes_and_prefills

    assert parameters(split_decodes_and_prefills)[:2] == ["common_attn_metadata", "decode_threshold"]
    assert parameters(max_decode_query_len) == ["vllm_config"]
    for method in ("get_cudagraph_support", "get_varlen_cudagraph_max_query_len"):
        assert parameters(getattr(AttentionMetadataBuilder, method)) == ["vllm_config", "kv_cache_spec"]
    assert AttentionCGSupport.UNIFORM_BATCH and AttentionCGSupport.NEVER


def test_workspace_seam():
    """Scratch of the GPU kernels: one buffer cut into tensors, the same addresses at every call."""
    from vllm.v1.worker import workspace

    assert parameters(workspace.WorkspaceManager.get_simultaneous) == ["self", "shapes_and_dtypes"]
    assert compat.workspace_manager() is None and workspace.current_workspace_manager


def test_flash_attention_seam():
    """vLLM's FlashAttention and its merge of attention states, by the arguments the prefill passes."""
    import ast
    from pathlib import Path

    import vllm
    from vllm.v1.attention.backends import fa_utils
    from vllm.v1.attention.ops.merge_attn_states import merge_attn_states

    assert "head_size" in parameters(fa_utils.get_flash_attn_version)
    assert parameters(merge_attn_states)[:6] == [
        "output",
        "prefix_output",
        "prefix_lse",
        "suffix_output",
        "suffix_lse",
        "output_lse",
    ]
    # Not imported: only CUDA builds can.
    source = Path(vllm.__file__).parent / "vllm_flash_attn" / "flash_attn_interface.py"
    functions = {node.name: node for node in ast.parse(source.read_text()).body if isinstance(node, ast.FunctionDef)}
    accepted = {argument.arg for argument in functions["flash_attn_varlen_func"].args.args}
    assert accepted >= {
        "q", "k", "v", "max_seqlen_q", "cu_seqlens_q", "max_seqlen_k", "cu_seqlens_k", "softmax_scale", "causal",
        "return_softmax_lse", "out", "fa_version",
    }  # fmt: skip


def test_config_fields_seam():
    from vllm.config import CacheConfig, ModelConfig, ParallelConfig, SchedulerConfig, SpeculativeConfig, VllmConfig

    fields = {
        CacheConfig: {"cache_dtype", "block_size", "kv_cache_dtype_skip_layers"},
        ParallelConfig: {"decode_context_parallel_size", "prefill_context_parallel_size", "tensor_parallel_size"},
        SchedulerConfig: {"disable_hybrid_kv_cache_manager", "max_num_batched_tokens", "max_num_seqs"},
        VllmConfig: {"additional_config", "speculative_config", "kv_transfer_config", "load_config"},
    }
    for config, names in fields.items():
        assert names <= {field.name for field in dataclasses.fields(config)}, config
    for name in (
        "use_mla",
        "is_encoder_decoder",
        "is_hybrid",
        "get_head_size",
        "get_sliding_window",
        "get_total_num_kv_heads",
        "get_total_num_hidden_layers",
    ):
        assert hasattr(ModelConfig, name), name
    for name in ("max_concurrent_batches", "num_speculative_tokens"):
        assert isinstance(inspect.getattr_static(VllmConfig, name), property), name
    assert isinstance(inspect.getattr_static(ParallelConfig, "use_ubatching"), property)
    assert callable(SpeculativeConfig.use_ngram)


def test_capacity_seam():
    """What counts blocks and tokens: 0.32's kv_cache_utils groups layers itself, 0.33's kv_cache_planning is given."""
    from vllm.config import CacheConfig, ModelConfig
    from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.kv_cache_interface import FullAttentionSpec, get_kv_quant_mode

    given = ["vllm_config", "kv_cache_specs", "available_memory"]
    if importlib.util.find_spec("vllm.v1.core.kv_cache_planning"):
        planning = importlib.import_module("vllm.v1.core.kv_cache_planning")
        assert parameters(planning.get_global_kv_cache_groups) == given[:2]
        assert parameters(planning.get_kv_cache_configs) == [*given, "global_kv_cache_groups"]
    else:
        assert parameters(kv_cache_utils.get_kv_cache_configs) == given
    assert parameters(kv_cache_utils.get_kv_cache_capacity) == ["vllm_config", "kv_cache_config"]
    assert parameters(kv_cache_utils.generate_scheduler_kv_cache_config) == ["kv_cache_configs"]
    assert compat.DEFAULT_BLOCK_SIZES["gpu"] == CacheConfig.DEFAULT_BLOCK_SIZE
    assert "kv_cache_layout" in {field.name for field in dataclasses.fields(CacheConfig)}
    # What asks for the longest request that fits, -1, is remembered there.
    assert "self.original_max_model_len = " in inspect.getsource(ModelConfig)
    for name in ("verify_with_parallel_config", "get_num_kv_heads", "get_num_layers"):
        assert hasattr(ModelConfig, name), name
    assert parameters(kv_cache_dtype_str_to_dtype) == ["kv_cache_dtype", "model_config"]
    assert parameters(get_kv_quant_mode) == ["kv_cache_dtype"]
    names = {field.name for field in dataclasses.fields(FullAttentionSpec)}
    assert {"block_size", "num_kv_heads", "head_size", "dtype", "kv_quant_mode"} <= names


def test_eviction_seams():
    """What evicting requests lean on: the step's budget, the request check, the loader, the connector's hooks."""
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
    from vllm.v1.engine.input_processor import InputProcessor

    source = inspect.getsource(inspect.unwrap(Scheduler.schedule))
    assert "token_budget = self.max_num_scheduled_tokens" in source
    assert "long_prefill_token_threshold" in source
    assert len(inspect.signature(Scheduler.get_request_counts).parameters) == 1
    assert parameters(inspect.unwrap(InputProcessor._validate_params))[:2] == ["self", "params"]
    assert parameters(inspect.unwrap(BaseModelLoader.load_model))[1:3] == ["vllm_config", "model_config"]
    for hook in ("on_new_request", "bind_kv_cache_manager", "build_connector_meta", "request_finished"):
        assert hasattr(KVConnectorBase_V1, hook)
    # Called for a request that has finished too, once more (PageManager.end_eviction).
    assert "remove_skipped_blocks" in inspect.getsource(Scheduler._connector_finished)
    assert parameters(FullAttentionManager.remove_skipped_blocks)[2:] == [
        "processed_computed_tokens",
        "num_prompt_tokens",
    ]


def test_pinning_seam():
    """Host memory of exactly the size asked for, pinned: torch's own would be rounded up."""
    from vllm.v1.simple_kv_offload.cuda_mem_ops import pin_tensor

    assert parameters(pin_tensor) == ["tensor"]
