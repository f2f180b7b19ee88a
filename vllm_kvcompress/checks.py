# SPDX-License-Identifier: Apache-2.0
"""Refusals at start, in the process the user started: what is wrong, with which value, and what to do instead."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from vllm_kvcompress import compat, recipes, rotations, sliding
from vllm_kvcompress.config import KernelSetting, Settings, load_settings
from vllm_kvcompress.episodic import request
from vllm_kvcompress.episodic.policies import budget_classes
from vllm_kvcompress.errors import KVCompressError, RotationError, UnsupportedModelError
from vllm_kvcompress.formats import PageFormat, get_format, is_ours
from vllm_kvcompress.formats.base import PAGE_TOKENS
from vllm_kvcompress.kernels.selection import MAX_DECODE_QUERY_LEN, Case, choose_path

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.config import VllmConfig

logger = logging.getLogger("vllm.kvcompress")


@dataclass(frozen=True)
class Resolved:
    """What the settings, the recipe and the format come to for one engine."""

    page_format: PageFormat
    sink_tokens: int
    recent_tokens: int
    rotation: Path | None
    """Rotation file; None for formats that need none, or that would take from it which channels are outliers."""
    kernels: KernelSetting
    profile: Path | None
    """Rotation file that budgets by layer are from; None where all layers keep the same."""
    budget_shares: Mapping[int, float]
    """Layer id -> share of the budget that it keeps; empty where all keep the same"""

    @property
    def has_windows(self) -> bool:
        return self.sink_tokens > 0 or self.recent_tokens > 0


def resolve(vllm_config: VllmConfig) -> Resolved:
    """Settings of an engine; the same in every process of it.

    Raises:
        KVCompressError: bad settings, or no rotation file where one is needed.
    """
    model_config, load_config = vllm_config.model_config, vllm_config.load_config
    return _resolve(
        vllm_config.cache_config.cache_dtype,
        load_settings(vllm_config.additional_config),
        model_config.model,
        model_config.revision,
        load_config.download_dir,
    )


# Every layer asks, and looking up a model in the user cache means reading samples of its weights.
@functools.lru_cache(maxsize=8)
def _resolve(
    cache_dtype: str, settings: Settings, model: str, revision: str | None, download_dir: str | None
) -> Resolved:
    page_format = get_format(cache_dtype)
    sinks, recent = settings.windows(model)
    folder = functools.partial(rotations.model_folder, model, revision, download_dir)
    rotation, profile, shares = None, None, {}
    if page_format.needs_calibration or page_format.splits_channels:
        find = rotations.find_rotation if page_format.needs_calibration else rotations.find_optional_rotation
        rotation = find(model, folder(), settings.rotation)
    if settings.episodic is not None and settings.episodic.layer_budgets == "sensitivity":
        profile = rotation or rotations.find_rotation(model, folder(), settings.rotation)
        alpha = recipes.alpha_for(model) if settings.episodic.alpha is None else settings.episodic.alpha
        shares = _budget_shares(model, profile, alpha)
    elif rotation is None and settings.rotation is not None:
        raise KVCompressError(
            f"--kv-cache-dtype {page_format.name} uses no rotation file, but rotation={settings.rotation} is set; "
            "remove the setting or use --kv-cache-dtype oscar-int2"
        )
    return Resolved(page_format, sinks, recent, rotation, settings.kernels, profile, shares)


def _budget_shares(model: str, profile: Path, alpha: float) -> dict[int, float]:
    """Layer id -> share of the budget."""
    metadata = rotations.read_metadata(profile)
    setting, instead = '"layer_budgets": "sensitivity"', 'Otherwise set "layer_budgets": "uniform".'
    if not metadata.sensitivity:
        raise RotationError(
            f"{setting} needs the layers' sensitivities, which {profile} lacks (it was imported, or made by an early "
            f"release). Make a new one with: kvcompress calibrate {model}. {instead}"
        )
    try:
        return dict(zip(metadata.layer_ids, budget_classes(metadata.sensitivity, alpha), strict=True))
    except ValueError as error:
        raise UnsupportedModelError(f"{setting} cannot serve {model}: {error}. {instead}") from None


def _folder(vllm_config: VllmConfig) -> Path | None:
    model_config = vllm_config.model_config
    return rotations.model_folder(model_config.model, model_config.revision, vllm_config.load_config.download_dir)


def check_config(vllm_config: VllmConfig) -> None:
    """Refuse what cannot be served with our page formats, or with eviction; does nothing for other engines.

    The changes it makes: sliding-window layers keep their 16-bit cache (`sliding`), eviction gets its connector.

    Raises:
        KVCompressError: with the reason and the way out.
    """
    if vllm_config.model_config is None:
        return
    ours, episodic = (
        is_ours(vllm_config.cache_config.cache_dtype),
        load_settings(vllm_config.additional_config).episodic,
    )
    if not ours and episodic is None:
        return
    if episodic is not None:
        _turn_on_eviction(vllm_config)
    for reason in unsupported_reasons(vllm_config):
        raise UnsupportedModelError(
            f"--kv-cache-dtype {vllm_config.cache_config.cache_dtype}: {reason}. Otherwise use --kv-cache-dtype auto."
        )
    if not ours:
        return
    _keep_sliding_windows(vllm_config)
    resolved = resolve(vllm_config)
    resolved.page_format.layout(vllm_config.model_config.get_head_size(), _page_tokens(vllm_config))
    kernel_path(vllm_config)
    _check_rotation(vllm_config, resolved)


PLAIN_DTYPES = ("auto", "bfloat16", "float16")
"""Cache dtypes of vLLM's own whose pages may be evicted."""
_CONNECTOR_MODULE = "vllm_kvcompress.episodic.connector"


def _turn_on_eviction(vllm_config: VllmConfig) -> None:
    """Evicting requests need our connector, and steps no longer than a block.

    Raises:
        UnsupportedModelError: what eviction does not go with yet.
    """
    from vllm.config import KVTransferConfig

    episodic = load_settings(vllm_config.additional_config).episodic
    assert episodic is not None
    scheduler, parallel, model_config = (
        vllm_config.scheduler_config, vllm_config.parallel_config, vllm_config.model_config,
    )  # fmt: skip
    total = model_config.get_total_num_hidden_layers()
    own = vllm_config.kv_transfer_config
    text_config: Any = model_config.hf_text_config
    dtype, device = vllm_config.cache_config.cache_dtype, vllm_config.device_config.device_type
    plain = dtype in PLAIN_DTYPES
    for wrong, reason in (
        (
            not plain and not is_ours(dtype),
            f"eviction goes with --kv-cache-dtype auto and those of kvcompress, not with {dtype}",
        ),
        (
            plain and episodic.layer_budgets != "uniform",
            f'"layer_budgets": "{episodic.layer_budgets}" needs a --kv-cache-dtype of kvcompress; remove it',
        ),
        (
            plain and device == "cpu" and not compat.cpu_cache_is_plain(vllm_config),
            "eviction from 16-bit pages does not know the cache of this CPU's kernels; use a --kv-cache-dtype of "
            "kvcompress or --dtype float32",
        ),
        (
            _other_connector(vllm_config),
            "eviction is a KV connector and there can be one; remove --kv-transfer-config and --kv-offloading-size",
        ),
        (
            len(sliding.full_attention_layers(text_config, total)) < total,
            "eviction does not support models with sliding-window layers",
        ),
        (parallel.pipeline_parallel_size > 1, "eviction does not support pipeline parallelism"),
        (vllm_config.speculative_config is not None, "eviction does not go with speculative decoding"),
        (vllm_config.lora_config is not None, "eviction does not go with LoRA"),
    ):
        if wrong:
            raise UnsupportedModelError(f'{reason}. Otherwise remove "episodic" from the kvcompress settings.')
    if own is None:
        vllm_config.kv_transfer_config = KVTransferConfig(
            kv_connector="EvictionConnector", kv_connector_module_path=_CONNECTOR_MODULE, kv_role="kv_both"
        )
    compat.add_http_middleware("vllm_kvcompress.serving.middleware.EpisodicMiddleware")
    longest = scheduler.long_prefill_token_threshold or scheduler.max_num_batched_tokens
    scheduler.long_prefill_token_threshold = min(longest, episodic.block_tokens)
    scheduler.long_prefill_token_threshold_adaptive = False  # it would let steps grow past a block


def _other_connector(vllm_config: VllmConfig) -> bool:
    """Whether a KV connector is asked for that is not ours; --kv-offloading-size makes one after this check."""
    own = vllm_config.kv_transfer_config
    foreign = own is not None and own.kv_connector_module_path != _CONNECTOR_MODULE
    return foreign or vllm_config.cache_config.kv_offloading_size is not None


def evicts(vllm_config: VllmConfig) -> bool:
    """Whether requests of this engine may evict."""
    transfer = vllm_config.kv_transfer_config
    return transfer is not None and transfer.kv_connector_module_path == _CONNECTOR_MODULE


def eviction_defaults(vllm_config: VllmConfig) -> request.Defaults:
    """What requests that evict get where they say nothing. Only for engines with episodic settings."""
    settings, cache_config = load_settings(vllm_config.additional_config), vllm_config.cache_config
    episodic = settings.episodic
    assert episodic is not None
    ours = is_ours(cache_config.cache_dtype)
    sinks, recent = settings.windows(vllm_config.model_config.model)
    return request.Defaults(
        policy=episodic.policy,
        block_tokens=min(episodic.block_tokens, vllm_config.scheduler_config.max_num_batched_tokens),
        page_tokens=_page_tokens(vllm_config) if ours else cache_config.block_size,
        sink_tokens=sinks,
        recent_tokens=recent if ours else 0,
        vocabulary=vllm_config.model_config.get_vocab_size(),
        max_model_len=vllm_config.model_config.max_model_len,
    )


def check_request(vllm_config: VllmConfig, params: SamplingParams) -> None:
    """Refuse a request whose arguments for us cannot be served; the engine core would not survive them.

    Raises:
        KVCompressError: with the argument, its value and what to do.
    """
    ours = [name for name in params.extra_args or () if name.startswith(request.PREFIX)]
    if not ours:
        return
    if not evicts(vllm_config):
        raise KVCompressError(
            f"{ours[0]} needs a server that evicts: start it with "
            '--additional-config \'{"kvcompress": {"episodic": {"budget": 4096}}}\''
        )
    request.parse(params.extra_args, eviction_defaults(vllm_config))


def _keep_sliding_windows(vllm_config: VllmConfig) -> None:
    model_config = vllm_config.model_config
    text_config: Any = model_config.hf_text_config
    total = model_config.get_total_num_hidden_layers()
    ours = len(sliding.full_attention_layers(text_config, total))
    if ours == total:
        return
    vllm_config.cache_config.kv_cache_dtype_skip_layers = list(sliding.SKIP_LAYERS)
    logger.info(
        "%d of %d layers have a sliding window (%d tokens) and keep their cache in %s; 2-bit pages hold the other %d",
        total - ours,
        total,
        text_config.sliding_window,
        str(model_config.dtype).removeprefix("torch."),
        ours,
    )


def kernel_case(vllm_config: VllmConfig) -> Case:
    """What this engine's layers ask of their kernels."""
    model_config, parallel = vllm_config.model_config, vllm_config.parallel_config
    assert isinstance(model_config.dtype, torch.dtype)  # vLLM has resolved "auto" by now
    page_format = get_format(vllm_config.cache_config.cache_dtype)
    return Case(
        head_dim=model_config.get_head_size(),
        page_tokens=_page_tokens(vllm_config),
        group=model_config.get_num_attention_heads(parallel) // model_config.get_num_kv_heads(parallel),
        dtype=model_config.dtype,
        page_format=page_format,
    )


def kernel_path(vllm_config: VllmConfig) -> tuple[Literal["gpu", "torch"], str]:
    """Whether GPU kernels or the torch path serve this engine, and why; the same in every process of it.

    Raises:
        UnsupportedModelError: the setting `kernels` asks for what cannot run here.
    """
    setting = load_settings(vllm_config.additional_config).kernels
    device_type = vllm_config.device_config.device_type
    return choose_path(setting, device_type, compat.device_capability(), kernel_case(vllm_config))


def _page_tokens(vllm_config: VllmConfig) -> int:
    """Tokens of a page: what the user asked for, else ours. (vLLM's own default may still change after this point.)"""
    cache_config = vllm_config.cache_config
    if not cache_config.user_specified_block_size:
        return PAGE_TOKENS
    # 0.32 and 0.33 later put the smallest of all groups there, the windows' (`EngineCore._initialize_kv_caches`),
    # and workers in the core's process share the object.
    asked = cache_config.__dict__.setdefault("kvcompress_asked_block_size", cache_config.block_size)
    if asked % PAGE_TOKENS:
        raise UnsupportedModelError(
            f"--kv-cache-dtype {cache_config.cache_dtype} needs --block-size to be a multiple of {PAGE_TOKENS}, "
            f"got {asked}. Leave --block-size out to get {PAGE_TOKENS}."
        )
    return asked


def _check_rotation(vllm_config: VllmConfig, resolved: Resolved) -> None:
    path = resolved.rotation or resolved.profile
    if path is not None:
        read_fitting_rotation(path, rotation_needs(vllm_config))


@dataclass(frozen=True)
class RotationNeeds:
    """What the model asks of its rotation file."""

    folder: Path | None
    layer_ids: tuple[int, ...]
    num_kv_heads: int
    head_dim: int


def rotation_needs(vllm_config: VllmConfig) -> RotationNeeds:
    """Of the model being served."""
    model_config = vllm_config.model_config
    layers = sliding.full_attention_layers(model_config.hf_text_config, model_config.get_total_num_hidden_layers())
    heads, dim = model_config.get_total_num_kv_heads(), model_config.get_head_size()
    return RotationNeeds(_folder(vllm_config), tuple(layers), heads, dim)


def read_fitting_rotation(path: Path, needs: RotationNeeds) -> rotations.RotationSet:
    """Read a rotation file and refuse one of another model. At start, and again by each worker: files change.

    Raises:
        RotationError: as `rotations.read_rotation` and `rotations.check_fits`.
    """
    rotation = rotations.read_rotation(path)
    rotations.check_fits(
        rotation,
        fingerprint=None if needs.folder is None else rotations.model_fingerprint(needs.folder),
        layer_ids=needs.layer_ids,
        num_kv_heads=needs.num_kv_heads,
        head_dim=needs.head_dim,
        path=path,
    )
    return rotation


def unsupported_reasons(vllm_config: VllmConfig) -> list[str]:
    """Why our formats cannot serve a configuration, most fundamental first, each naming what the user can do."""
    model_config, cache, parallel = vllm_config.model_config, vllm_config.cache_config, vllm_config.parallel_config
    text_config: Any = model_config.hf_text_config
    num_layers = model_config.get_total_num_hidden_layers()
    full_layers = sliding.full_attention_layers(text_config, num_layers)
    # On a mixed model the list may be ours already: a configuration is checked again where it is changed.
    allowed_skips = [[], sliding.SKIP_LAYERS] if len(full_layers) < num_layers else [[]]
    found = [
        (model_config.use_mla, "multi-head latent attention (MLA) keeps one compressed latent per token already"),
        (model_config.is_encoder_decoder, "encoder-decoder models are not supported"),
        (model_config.runner_type != "generate", f"runner {model_config.runner_type!r} keeps no KV cache to compress"),
        (model_config.is_hybrid, "hybrid models with state-space layers are not supported"),
        (
            bool(getattr(text_config, "attn_logit_softcapping", None)),
            "soft-capped attention logits, which this model uses, are not supported",
        ),
        (
            not full_layers,
            "every layer has a sliding window, so no cache grows with the context and there is nothing to save",
        ),
        (
            any("chunked" in kind for kind in getattr(text_config, "layer_types", None) or ()),
            "chunked attention layers are not supported",
        ),
        (
            bool(drafts := _unsupported_drafts(vllm_config.speculative_config)),
            f"speculative decoding {drafts}; remove --speculative-config",
        ),
        (
            _other_connector(vllm_config),
            "KV connectors are not supported yet; remove --kv-transfer-config and --kv-offloading-size",
        ),
        (
            cache.kv_cache_dtype_skip_layers not in allowed_skips,
            f"--kv-cache-dtype-skip-layers {cache.kv_cache_dtype_skip_layers} is not supported; remove it",
        ),
        (
            model_config.enable_sleep_mode,
            "sleep mode is not supported: level 2 discards the rotations with the weights; remove --enable-sleep-mode",
        ),
        (
            parallel.use_ubatching,
            "micro-batching is not supported; remove --enable-dbo and --ubatch-size",
        ),
        (
            parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1,
            "context parallelism is not supported; set both context-parallel sizes to 1",
        ),
        (
            bool(vllm_config.scheduler_config.disable_hybrid_kv_cache_manager),
            "the 16-bit windows need the hybrid KV cache manager; remove --disable-hybrid-kv-cache-manager",
        ),
    ]
    return [reason for wrong, reason in found if wrong]


def _unsupported_drafts(speculative_config: Any) -> str:
    """What a speculative configuration asks for that is not supported; empty if nothing.

    Drafts that are rejected leave keys and values behind, in pages and windows. Those are written over before they are
    read: they lie past the request's length, and the next step begins with the first of them. A page that a rejected
    draft began is begun anew, its mean with it; one that stays begun rests on accepted tokens alone, for its mean is
    the previous page's, all of which came before.
    """
    if speculative_config is None:
        return ""
    if not speculative_config.use_ngram():
        # A draft model's layers would share the cache dtype, and have no rotation of their own in the file.
        return f"by {speculative_config.method!r} is not supported, only 'ngram' is: it has no KV cache of its own"
    most = MAX_DECODE_QUERY_LEN - 1
    if speculative_config.num_speculative_tokens > most:
        return f"with {speculative_config.num_speculative_tokens} tokens is not supported, at most {most} are"
    return ""
