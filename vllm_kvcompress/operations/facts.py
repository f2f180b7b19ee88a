# SPDX-License-Identifier: Apache-2.0
"""What does not change while an engine runs; the same in every process of it. Nothing here initialises CUDA."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from vllm_kvcompress import checks, compat, rotations
from vllm_kvcompress.config import load_settings
from vllm_kvcompress.formats import is_ours
from vllm_kvcompress.kernels.selection import expected_decode

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@dataclass(frozen=True)
class Facts:
    cache_dtype: str
    """As `--kv-cache-dtype` has it; `auto` and the like in engines that only evict"""
    bytes_per_token: int
    """In one layer and KV head, keys and values"""
    plain_bytes: int
    """The same in 16 bits"""
    rotation: Path | None
    fingerprint: str
    """Of the weights that the rotation file was made for; empty without a file, or where it names none"""
    kernels: Literal["cuda", "triton", "torch", "vllm"]
    """What decodes; `vllm`: its own backend, over 16-bit pages"""
    reason: str
    """for these kernels"""

    @property
    def ratio(self) -> float:
        return self.plain_bytes / self.bytes_per_token


def is_observed(vllm_config: VllmConfig) -> bool:
    """Whether an engine has pages of ours, or evicts."""
    return vllm_config.model_config is not None and (
        is_ours(vllm_config.cache_config.cache_dtype) or checks.evicts(vllm_config)
    )


def find_facts(vllm_config: VllmConfig) -> Facts:
    """Only for engines that are observed, and have passed `checks.check_config`."""
    model_config, cache_dtype = vllm_config.model_config, vllm_config.cache_config.cache_dtype
    head_dim = model_config.get_head_size()
    plain_bytes = 2 * 2 * head_dim
    if not is_ours(cache_dtype):
        assert isinstance(model_config.dtype, torch.dtype)
        stored = 2 * head_dim * (model_config.dtype.itemsize if cache_dtype == "auto" else 2)
        return Facts(cache_dtype, stored, plain_bytes, None, "", "vllm", "vLLM's own pages, which requests may evict")
    resolved, case = checks.resolve(vllm_config), checks.kernel_case(vllm_config)
    path, reason = checks.kernel_path(vllm_config)
    return Facts(
        cache_dtype=cache_dtype,
        bytes_per_token=case.page_format.layout(head_dim, case.page_tokens).bytes_per_token,
        plain_bytes=plain_bytes,
        rotation=resolved.rotation,
        fingerprint="" if resolved.rotation is None else rotations.read_metadata(resolved.rotation).fingerprint,
        kernels="torch" if path == "torch" else expected_decode(resolved.kernels, compat.device_capability(), case),
        reason=reason,
    )


def start_line(vllm_config: VllmConfig, tokens: int, requests: float) -> str:
    """What the log says of an engine's KV cache.

    Args:
        tokens, requests: that fit, as vLLM counts: `compat.kv_cache_capacity`.
    """
    facts = find_facts(vllm_config)
    parts = [
        f"KV cache format {facts.cache_dtype}: {facts.bytes_per_token} bytes per token, layer and KV head "
        f"(16-bit: {facts.plain_bytes}, {facts.ratio:.1f}x)",
        f"{tokens:,} tokens fit ({requests:.2f} requests of {vllm_config.model_config.max_model_len:,})",
    ]
    if is_ours(facts.cache_dtype):
        resolved = checks.resolve(vllm_config)
        rotation = "none needed"
        if facts.rotation is not None:
            rotation = f"{facts.rotation} (fingerprint {facts.fingerprint or 'of no model'})"
        parts += [
            f"keys centred: {resolved.page_format.centring}",
            f"16-bit windows: first {resolved.sink_tokens} and last {resolved.recent_tokens} tokens",
            f"rotation file: {rotation}",
        ]
    episodic = load_settings(vllm_config.additional_config).episodic
    if episodic is not None:
        parts.append(f"eviction: budget {episodic.budget:,} tokens ({episodic.policy})")
    return ", ".join([*parts, f"attention kernels: {facts.kernels} ({facts.reason})"])
