# SPDX-License-Identifier: Apache-2.0
"""What fits in memory for the KV cache, as vLLM counts: its own functions on the specs its layers would give.

Nothing is loaded and no engine is started: the specs follow from the configuration alone. So blocks, tokens and
concurrency are those that an engine with the same memory reports, null block, rounding and 16-bit windows included.
"""

from __future__ import annotations

import copy
import pkgutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from huggingface_hub.errors import StrictDataclassError
from pydantic import ValidationError

from vllm_kvcompress import compat, plugin
from vllm_kvcompress.checks import unsupported_reasons
from vllm_kvcompress.errors import KVCompressError, UnsupportedModelError
from vllm_kvcompress.formats import format_names, is_ours
from vllm_kvcompress.formats.base import PAGE_TOKENS
from vllm_kvcompress.sliding import full_attention_layers

if TYPE_CHECKING:
    from vllm.config import VllmConfig

Device = Literal["gpu", "cpu"]
FORMATS = ("auto", "fp8", *format_names())


@dataclass(frozen=True)
class Capacity:
    """What fits in one format. All figures are zero where `problem` says why."""

    kv_cache_dtype: str
    bytes_per_token: int = 0
    """Of all layers on one GPU, scales and page means included, 16-bit windows not."""
    block_size: int = 0
    """Tokens of a block of pages."""
    blocks: int = 0
    """Blocks that vLLM allocates, its null block included."""
    tokens: int = 0
    """vLLM's "KV cache size" with requests of the planned length."""
    requests: float = 0.0
    """vLLM's "maximum concurrency" with requests of the planned length."""
    longest: int = 0
    """Most tokens of a single request, at most what the model can do: what vLLM picks for `--max-model-len auto`."""
    problem: str = ""


def configure(
    model: str, folder: Path, *, dtype: str = "auto", tensor_parallel: int = 1, trust_remote_code: bool = False
) -> VllmConfig:
    """vLLM's configuration of a model in 16 bits, with the model's longest context; needs no weights and no GPUs.

    Raises:
        UnsupportedModelError: a model that this package cannot serve, or whose layers differ.
        KVCompressError: what vLLM itself refuses.
    """
    plugin.register()
    from vllm.engine.arg_utils import EngineArgs

    try:
        config = EngineArgs(
            model=str(folder),
            dtype=dtype,  # type: ignore[arg-type]
            skip_tokenizer_init=True,
            generation_config="vllm",
            trust_remote_code=trust_remote_code,
        ).create_engine_config()
        # Set afterwards: vLLM would refuse to plan for more GPUs than there are here.
        config.parallel_config.tensor_parallel_size = tensor_parallel
        config.model_config.verify_with_parallel_config(config.parallel_config)
    except ValidationError as error:
        raise KVCompressError(f"{model}: {'; '.join(map(_problem, error.errors()))}") from None
    except (ValueError, OSError, NotImplementedError, StrictDataclassError) as error:
        # What follows the first paragraph is advice to developers.
        reason = str(error).split("\n\n")[0]
        raise KVCompressError(f"{model}: {reason}") from None
    for reason in [*unsupported_reasons(config), *_unplanned(config)]:
        raise UnsupportedModelError(f"{model} cannot be planned: {reason}")
    return config


def _problem(error: Any) -> str:
    """One of pydantic's errors: its own text, or that of the check that raised it."""
    if error["type"] == "value_error":
        return error["msg"].removeprefix("Value error, ")
    return f"{'.'.join(map(str, error['loc']))}={error['input']!r}: {error['msg']}"


def _unplanned(config: VllmConfig) -> list[str]:
    """Reasons for which the specs of a supported configuration do not follow from it as below."""
    model_config: Any = config.model_config
    layers = model_config.get_total_num_hidden_layers()
    heads, ranks = model_config.get_total_num_kv_heads(), config.parallel_config.tensor_parallel_size
    found = [
        (getattr(model_config, "is_attention_free", False), "models without attention keep no KV cache"),
        (
            getattr(model_config.model_arch_config, "per_layer_overrides", None) is not None,
            "models whose layers differ in heads or head size are not planned",
        ),
        (
            len(full_attention_layers(model_config.hf_text_config, layers)) < layers,
            "models with sliding-window layers, which keep a cache of their own beside ours, are not planned",
        ),
        (
            bool(heads % ranks and ranks % heads),
            f"--tp {ranks} neither divides the model's {heads} KV heads nor is a multiple of them",
        ),
    ]
    return [reason for wrong, reason in found if wrong]


def default_block_size(kv_cache_dtype: str, device: Device) -> int:
    """Tokens of a block where --block-size is not given."""
    return PAGE_TOKENS if is_ours(kv_cache_dtype) else compat.DEFAULT_BLOCK_SIZES[device]


def plan(
    config: VllmConfig,
    kv_cache_dtype: str,
    memory_bytes: int,
    *,
    max_model_len: int,
    block_size: int,
    windows: tuple[int, int] = (0, 0),
) -> Capacity:
    """What fits in one format.

    Args:
        config: `configure`'s; not changed.
        kv_cache_dtype: one of FORMATS.
        memory_bytes: memory of one GPU for the KV cache (vLLM's --kv-cache-memory-bytes).
        max_model_len: tokens of the requests that are counted.
        block_size: tokens of a block.
        windows: first and last tokens that formats of ours keep in 16 bits.
    """
    config = copy.copy(config)
    config.cache_config = copy.copy(config.cache_config)
    config.model_config = copy.copy(config.model_config)
    if kv_cache_dtype != "auto":  # which vLLM has resolved: a checkpoint may name another
        config.cache_config.cache_dtype = kv_cache_dtype  # type: ignore[assignment]
    config.cache_config.block_size = block_size
    try:
        pages, specs = _layer_specs(config, windows)
        kv_cache, longest = compat.fit_kv_cache(config, specs, memory_bytes)
    except UnsupportedModelError as error:
        return Capacity(kv_cache_dtype, problem=str(error))
    except ValueError as error:  # not even one token fits; the rest is advice on an engine's settings
        return Capacity(kv_cache_dtype, problem=str(error).split(". ")[0])
    config.model_config.max_model_len = max_model_len
    tokens, requests = compat.kv_cache_capacity(config, kv_cache)
    return Capacity(
        kv_cache_dtype,
        bytes_per_token=sum(spec.page_size_bytes for spec in pages) // block_size,
        block_size=block_size,
        blocks=kv_cache.num_blocks,
        tokens=tokens,
        requests=requests,
        longest=longest,
    )


def _layer_specs(config: VllmConfig, windows: tuple[int, int]) -> tuple[Sequence[Any], dict[str, Any]]:
    """(specs of the layers' pages, specs of pages and windows by the name of their layer)."""
    from vllm_kvcompress.attention.backend import backend_path
    from vllm_kvcompress.attention.windows import make_window_spec

    spec = compat.attention_spec(config)
    window = None
    if is_ours(config.cache_config.cache_dtype):
        spec = pkgutil.resolve_name(backend_path(config.cache_config.cache_dtype)).customize_spec(spec)
        if any(windows):
            window = make_window_spec(spec, config, *windows)
    layers = [f"layers.{index}" for index in range(config.model_config.get_num_layers(config.parallel_config))]
    specs = dict.fromkeys(layers, spec)
    if window is not None:
        specs |= dict.fromkeys((f"{layer}.window" for layer in layers), window)
    return [spec] * len(layers), specs
