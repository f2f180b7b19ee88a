# SPDX-License-Identifier: Apache-2.0
"""Entry point of vLLM's general plugins: runs in every process, before arguments are parsed; registrations only."""

from __future__ import annotations

_registered = False


def register() -> None:
    """Teach vLLM the page formats. Idempotent: vLLM may call it several times in a process."""
    global _registered
    if _registered:
        return
    from vllm_kvcompress import compat, formats

    compat.check_version()
    compat.register_cache_dtypes(formats.format_names())
    compat.wrap_attention_backend_choice(formats.is_ours, _backend_path, _evicting_backend)
    compat.wrap_config_check(_check_config)
    compat.wrap_block_size_choice(formats.is_ours, _align_pages)
    compat.wrap_request_check(_check_request)
    compat.wrap_lone_prefills(_evicts)
    compat.watch_loaded_models()
    compat.observe_schedulers(_observe)
    compat.export_statistics(_is_observed, _make_metrics)
    _registered = True


def _backend_path(cache_dtype: str) -> str:
    from vllm_kvcompress.attention.backend import backend_path

    return backend_path(cache_dtype)


def _evicting_backend(path: str) -> str:
    from vllm_kvcompress.attention.plain import evicting_backend

    return evicting_backend(path)


def _check_config(vllm_config) -> None:
    from vllm_kvcompress.checks import check_config

    check_config(vllm_config)


def _check_request(vllm_config, sampling_params) -> None:
    from vllm_kvcompress.checks import check_request

    check_request(vllm_config, sampling_params)


def _evicts(vllm_config) -> bool:
    from vllm_kvcompress.checks import evicts

    return evicts(vllm_config)


def _align_pages(vllm_config) -> None:
    from vllm_kvcompress.sliding import align_pages

    align_pages(vllm_config)


def _is_observed(vllm_config) -> bool:
    from vllm_kvcompress.operations.facts import is_observed

    return is_observed(vllm_config)


def _observe(scheduler):
    if not _is_observed(scheduler.vllm_config):
        return None
    from vllm_kvcompress.operations.observer import observe

    return observe(scheduler)


def _make_metrics(*args):
    from vllm_kvcompress.operations.metrics import Metrics

    return Metrics(*args)
