# SPDX-License-Identifier: Apache-2.0
"""Every private seam of vLLM this package leans on, one function each: what `kvcompress doctor` and our tests look at.

A function returns if its seam is as the package expects, else it raises: whatever an import or a missing name does.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import traceback
from collections.abc import Callable
from typing import Any, get_args

from vllm_kvcompress import compat
from vllm_kvcompress.formats import format_names

SEAMS: dict[str, Callable[[], None]] = {}


def moved(name: str) -> str | None:
    """What is not as expected of a seam; None if it is where it was."""
    try:
        SEAMS[name]()
    except Exception as error:
        here = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == __file__]
        line = here[1]  # the seam's own
        return f"{type(error).__name__}: {error} at {line.name}, line {line.lineno}: {line.line}"
    return None


def _seam(check: Callable[[], None]) -> Callable[[], None]:
    SEAMS[check.__name__] = check
    return check


class SeamMovedError(Exception):
    """A seam is there, but not as expected."""


def _require(condition: Any, about: Any = "not as expected") -> None:
    if not condition:
        raise SeamMovedError(about)


def _parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


@_seam
def cache_dtype():
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
        _require(list(known).count(name) == 1)
        _require(cache.CacheConfig(cache_dtype=name).cache_dtype == name)
        _require(torch_utils.STR_DTYPE_TO_TORCH_DTYPE[name].itemsize == 1)
        # Asked of the engine's dtype by backends of layers that keep another one, which would then expect fp8 pages.
        _require(not is_quantized_kv_cache(name))
    try:
        cache.CacheConfig(cache_dtype="no-such-format")
    except ValueError:
        return
    _require(False)


@_seam
def platform():
    """type(current_platform).get_attn_backend_cls and .check_and_update_config are classmethods we can wrap."""
    from vllm.platforms import current_platform

    platform = type(current_platform)
    choose = platform.get_attn_backend_cls
    _require(inspect.ismethod(choose) and _parameters(choose)[:2] == ["selected_backend", "attn_selector_config"])
    check = platform.check_and_update_config
    _require(inspect.ismethod(check) and _parameters(check) == ["vllm_config"])


@_seam
def layer_backend():
    """A layer's backend is an attribute, and vLLM asks it, not the choice it was made by, for the layer's spec."""
    from vllm.model_executor.layers.attention import Attention
    from vllm.v1.worker.gpu.attn_utils import get_kv_cache_spec

    layer, backend = Attention.__new__(Attention), type("Backend", (), {})
    compat.set_attention_backend(layer, backend)
    _require(layer.get_attn_backend() is backend)
    _require("get_attn_backend()" in inspect.getsource(get_kv_cache_spec))


@_seam
def block_size():
    """Where a layer of another dtype learns its page: the platform's step is ours to leave out, its result to give."""
    from vllm.config import CacheConfig
    from vllm.model_executor.layers.attention import Attention
    from vllm.platforms import current_platform

    choose = type(current_platform).update_block_size_for_backend
    _require(inspect.ismethod(choose) and _parameters(choose) == ["vllm_config"])
    names = {field.name for field in dataclasses.fields(CacheConfig)}
    _require({"skip_page_size_padded", "user_specified_block_size"} <= names)
    _require('"sliding_window" in cache_config.kv_cache_dtype_skip_layers' in inspect.getsource(Attention.__init__))
    _require("skip_page_size_padded" in inspect.getsource(Attention.get_kv_cache_spec))


@_seam
def backend_validation():
    """AttentionBackend.validate_configuration takes every field of the selector's configuration."""
    from vllm.v1.attention.backend import AttentionBackend
    from vllm.v1.attention.selector import AttentionSelectorConfig

    accepted = set(_parameters(AttentionBackend.validate_configuration))
    _require(set(AttentionSelectorConfig._fields) <= accepted)


@_seam
def spec_registry():
    from vllm.v1.kv_cache_interface import FullAttentionSpec
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    from vllm_kvcompress.attention.windows import WindowManager, WindowSpec

    _require(KVCacheSpecRegistry._ensure_registered)
    built_in = KVCacheSpecRegistry.get_manager_class(_full_attention_spec())
    _require(built_in is not None and built_in.__name__ == "FullAttentionManager", FullAttentionSpec)
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
    _require(KVCacheSpecRegistry.get_manager_class(spec) is WindowManager)


def _full_attention_spec():
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    return FullAttentionSpec(block_size=128, num_kv_heads=1, head_size=64, dtype=torch.uint8)


@_seam
def spec_fields():
    from vllm.v1.kv_cache_interface import AttentionSpec, SlidingWindowSpec

    names = {field.name for field in dataclasses.fields(AttentionSpec)}
    _require({"state_content_bytes", "page_size_padded", "kv_quant_mode", "num_kv_heads", "head_size"} <= names)
    _require(
        _parameters(SlidingWindowSpec.max_admission_blocks_per_request)[1:]
        == [
            "max_in_flight_tokens",
            "max_model_len",
        ]
    )


@_seam
def block_managers():
    """WindowManager overrides these with the very parameters the coordinator passes."""
    from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager

    from vllm_kvcompress.attention.windows import WindowManager

    for method in (
        "find_longest_cache_hit",
        "get_num_blocks_to_allocate",
        "add_local_computed_blocks",
        "allocate_new_blocks",
        "remove_skipped_blocks",
        "pop_blocks_for_free",
        "get_num_skipped_tokens",
    ):
        _require(_parameters(getattr(WindowManager, method)) == _parameters(getattr(SlidingWindowManager, method)))


@_seam
def attention_impl():
    """Attention.__init__ passes ten positional arguments to the implementation."""
    from vllm.v1.attention.backend import AttentionImpl

    from vllm_kvcompress.attention.impl import KVCompressImpl

    upstream = _parameters(AttentionImpl.__init__)
    _require(_parameters(KVCompressImpl.__init__)[: len(upstream)] == upstream)
    _require(_parameters(KVCompressImpl.forward) == _parameters(AttentionImpl.forward))


@_seam
def attention_layer():
    """Layers are found in static_forward_context and expose get_attn_backend, get_kv_cache_spec, bind_kv_cache."""
    from vllm.config import CompilationConfig
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

    _require(isinstance(CompilationConfig().static_forward_context, dict))
    for method in ("get_attn_backend", "get_kv_cache_spec", "bind_kv_cache"):
        _require(hasattr(AttentionLayerBase, method))


@_seam
def common_metadata():
    from vllm.v1.attention.backend import CommonAttentionMetadata

    names = {field.name for field in dataclasses.fields(CommonAttentionMetadata)}
    needed = {"query_start_loc_cpu", "seq_lens", "num_reqs", "num_actual_tokens", "block_table_tensor", "slot_mapping"}
    needed |= {"query_start_loc", "max_query_len", "max_seq_len", "seq_lens_cpu_upper_bound"}
    _require(needed <= names)


@_seam
def decode_and_prefill():
    """Which requests are decodes, and what graphs may hold: the GPU kernels' metadata builders."""
    from vllm.v1.attention.backend import AttentionCGSupport, AttentionMetadataBuilder, max_decode_query_len
    from vllm.v1.attention.backends.utils import split_decodes_and_prefills

    _require(_parameters(split_decodes_and_prefills)[:2] == ["common_attn_metadata", "decode_threshold"])
    _require(_parameters(max_decode_query_len) == ["vllm_config"])
    for method in ("get_cudagraph_support", "get_varlen_cudagraph_max_query_len"):
        _require(_parameters(getattr(AttentionMetadataBuilder, method)) == ["vllm_config", "kv_cache_spec"])
    _require(AttentionCGSupport.UNIFORM_BATCH and AttentionCGSupport.NEVER)


@_seam
def workspace():
    """Scratch of the GPU kernels: one buffer cut into tensors, the same addresses at every call."""
    from vllm.v1.worker import workspace

    _require(_parameters(workspace.WorkspaceManager.get_simultaneous) == ["self", "shapes_and_dtypes"])
    _require(compat.workspace_manager() is None and workspace.current_workspace_manager)


@_seam
def flash_attention():
    """vLLM's FlashAttention and its merge of attention states, by the arguments the prefill passes."""
    import ast
    from pathlib import Path

    import vllm
    from vllm.v1.attention.backends import fa_utils
    from vllm.v1.attention.ops.merge_attn_states import merge_attn_states

    _require("head_size" in _parameters(fa_utils.get_flash_attn_version))
    _require(
        _parameters(merge_attn_states)[:6]
        == [
            "output",
            "prefix_output",
            "prefix_lse",
            "suffix_output",
            "suffix_lse",
            "output_lse",
        ]
    )
    # Not imported: only CUDA builds can.
    source = Path(vllm.__file__).parent / "vllm_flash_attn" / "flash_attn_interface.py"
    functions = {node.name: node for node in ast.parse(source.read_text()).body if isinstance(node, ast.FunctionDef)}
    accepted = {argument.arg for argument in functions["flash_attn_varlen_func"].args.args}
    _require(accepted >= {
        "q", "k", "v", "max_seqlen_q", "cu_seqlens_q", "max_seqlen_k", "cu_seqlens_k", "softmax_scale", "causal",
        "return_softmax_lse", "out", "fa_version",
    })  # fmt: skip


@_seam
def config_fields():
    from vllm.config import CacheConfig, ModelConfig, ParallelConfig, SchedulerConfig, SpeculativeConfig, VllmConfig

    fields = {
        CacheConfig: {"cache_dtype", "block_size", "kv_cache_dtype_skip_layers"},
        ParallelConfig: {"decode_context_parallel_size", "prefill_context_parallel_size", "tensor_parallel_size"},
        SchedulerConfig: {"disable_hybrid_kv_cache_manager", "max_num_batched_tokens", "max_num_seqs"},
        VllmConfig: {"additional_config", "speculative_config", "kv_transfer_config", "load_config"},
    }
    for config, names in fields.items():
        _require(names <= {field.name for field in dataclasses.fields(config)}, config)
    for name in (
        "use_mla",
        "is_encoder_decoder",
        "is_hybrid",
        "get_head_size",
        "get_sliding_window",
        "get_total_num_kv_heads",
        "get_total_num_hidden_layers",
    ):
        _require(hasattr(ModelConfig, name), name)
    for name in ("max_concurrent_batches", "num_speculative_tokens"):
        _require(isinstance(inspect.getattr_static(VllmConfig, name), property), name)
    _require(isinstance(inspect.getattr_static(ParallelConfig, "use_ubatching"), property))
    _require(callable(SpeculativeConfig.use_ngram))


@_seam
def capacity():
    """What counts blocks and tokens: 0.32's kv_cache_utils groups layers itself, 0.33's kv_cache_planning is given."""
    from vllm.config import CacheConfig, ModelConfig
    from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.kv_cache_interface import FullAttentionSpec, get_kv_quant_mode

    given = ["vllm_config", "kv_cache_specs", "available_memory"]
    if importlib.util.find_spec("vllm.v1.core.kv_cache_planning"):
        planning = importlib.import_module("vllm.v1.core.kv_cache_planning")
        _require(_parameters(planning.get_global_kv_cache_groups) == given[:2])
        _require(_parameters(planning.get_kv_cache_configs) == [*given, "global_kv_cache_groups"])
    else:
        _require(_parameters(kv_cache_utils.get_kv_cache_configs) == given)
    _require(_parameters(kv_cache_utils.get_kv_cache_capacity) == ["vllm_config", "kv_cache_config"])
    _require(_parameters(kv_cache_utils.generate_scheduler_kv_cache_config) == ["kv_cache_configs"])
    _require(compat.DEFAULT_BLOCK_SIZES["gpu"] == CacheConfig.DEFAULT_BLOCK_SIZE)
    _require("kv_cache_layout" in {field.name for field in dataclasses.fields(CacheConfig)})
    # What asks for the longest request that fits, -1, is remembered there.
    _require("self.original_max_model_len = " in inspect.getsource(ModelConfig))
    for name in ("verify_with_parallel_config", "get_num_kv_heads", "get_num_layers"):
        _require(hasattr(ModelConfig, name), name)
    _require(_parameters(kv_cache_dtype_str_to_dtype) == ["kv_cache_dtype", "model_config"])
    _require(_parameters(get_kv_quant_mode) == ["kv_cache_dtype"])
    names = {field.name for field in dataclasses.fields(FullAttentionSpec)}
    _require({"block_size", "num_kv_heads", "head_size", "dtype", "kv_quant_mode"} <= names)


@_seam
def eviction():
    """What evicting requests lean on: the step's budget, the request check, the loader, the connector's hooks."""
    from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
    from vllm.v1.engine.input_processor import InputProcessor

    source = inspect.getsource(inspect.unwrap(Scheduler.schedule))
    _require("token_budget = self.max_num_scheduled_tokens" in source)
    _require("long_prefill_token_threshold" in source)
    _require(len(inspect.signature(Scheduler.get_request_counts).parameters) == 1)
    _require(_parameters(inspect.unwrap(InputProcessor._validate_params))[:2] == ["self", "params"])
    _require(_parameters(inspect.unwrap(BaseModelLoader.load_model))[1:3] == ["vllm_config", "model_config"])
    for hook in ("on_new_request", "bind_kv_cache_manager", "build_connector_meta", "request_finished"):
        _require(hasattr(KVConnectorBase_V1, hook))
    # Called for a request that has finished too, once more (PageManager.end_eviction).
    _require("remove_skipped_blocks" in inspect.getsource(Scheduler._connector_finished))
    _require(
        _parameters(FullAttentionManager.remove_skipped_blocks)[2:]
        == [
            "processed_computed_tokens",
            "num_prompt_tokens",
        ]
    )


@_seam
def http_middleware():
    """Where --middleware is read, in the API server's process."""
    from vllm.entrypoints.launchers import app

    _require(_parameters(inspect.unwrap(app.init_entrypoints_middleware))[0] == "args")


@_seam
def statistics():
    """How numbers get from the scheduler to /metrics, with a KV connector or without."""
    from vllm.distributed.kv_transfer.kv_connector.v1 import metrics
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.metrics.loggers import LoggingStatLogger, PrometheusStatLogger
    from vllm.v1.metrics.stats import SchedulerStats

    _require("kv_connector_stats" in {field.name for field in dataclasses.fields(SchedulerStats)})
    _require(_parameters(inspect.unwrap(Scheduler.__init__))[1:3] == ["vllm_config", "kv_cache_config"])
    _require(hasattr(Scheduler, "has_unfinished_requests"))
    given = ["vllm_config", "labelnames", "per_engine_labelvalues"]
    _require(_parameters(inspect.unwrap(metrics.KVConnectorProm.__init__))[1:] == given)
    _require(_parameters(metrics.KVConnectorPromMetrics.observe)[1:] == ["transfer_stats_data", "engine_idx"])
    for kind in ("_gauge_cls", "_counter_cls", "_histogram_cls"):
        _require(hasattr(metrics.KVConnectorProm, kind))
    for logger, call in (
        (PrometheusStatLogger, "self.kv_connector_prom.observe("),
        (LoggingStatLogger, "self.kv_connector_logging.observe("),
    ):
        _require(call in inspect.getsource(logger.record))


@_seam
def pinning():
    """Host memory of exactly the size asked for, pinned: torch's own would be rounded up."""
    from vllm.v1.simple_kv_offload.cuda_mem_ops import pin_tensor

    _require(_parameters(pin_tensor) == ["tensor"])
