# SPDX-License-Identifier: Apache-2.0
"""16-bit pages that requests may evict: vLLM's own attention and cache under our block manager.

For `--kv-cache-dtype auto` with episodic settings. The backend that vLLM chose stays; a subclass of it gives its layers
the spec of our pages and builds steps again without what was evicted (`gaps`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec

from vllm_kvcompress import compat
from vllm_kvcompress.attention.gaps import ClosesGaps
from vllm_kvcompress.attention.pages import PageSpec
from vllm_kvcompress.checks import evicts
from vllm_kvcompress.episodic.policies import Layer, Policy
from vllm_kvcompress.errors import UnsupportedModelError


def evicting_backend(path: str) -> str:
    """Qualified name of the backend to take where vLLM chose `path`: another one in engines that evict.

    Raises:
        UnsupportedModelError: a backend whose cache we cannot read.
    """
    config = get_current_vllm_config_or_none()
    if config is None or not evicts(config):
        return path
    if path not in compat.PLAIN_BACKENDS:
        known = ", ".join(name.rsplit(".", 1)[-1] for name in compat.PLAIN_BACKENDS)
        raise UnsupportedModelError(
            f"eviction with --kv-cache-dtype {config.cache_config.cache_dtype} needs one of {known}, not {path}. "
            'Choose another --attention-backend, or remove "episodic" from the kvcompress settings.'
        )
    return f"{__name__}.Evicting{path.rsplit('.', 1)[-1]}"


def __getattr__(name: str) -> Any:
    """`Evicting...`: vLLM resolves backends by name, in every process anew."""
    for path in compat.PLAIN_BACKENDS:
        if name == f"Evicting{path.rsplit('.', 1)[-1]}":
            found = globals()[name] = _evicting(resolve_obj_by_qualname(path), name)
            return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _evicting(base: Any, name: str) -> type:
    built_by: Any = base.get_builder_cls()

    class Builder(ClosesGaps, built_by):  # type: ignore[misc]
        def make(self, common: CommonAttentionMetadata) -> Any:
            # No prefix in common: who shares one may have evicted different parts of it.
            return built_by.build(self, 0, common)

    class Backend(base):
        @staticmethod
        def get_builder_cls() -> type:
            return Builder

        @classmethod
        def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
            assert isinstance(spec, FullAttentionSpec)
            return PageSpec.of(super().customize_spec(spec))

    Backend.__name__ = Backend.__qualname__ = name
    Backend.__module__ = __name__
    return Backend


def score(
    layers: Sequence[Any],
    table: torch.Tensor,
    num_slots: int,
    policy: Policy,
    queries: Sequence[torch.Tensor] | None,
    previous: torch.Tensor | None,
) -> torch.Tensor:
    """As `KVCompressImpl.score`, of the caches of layers with one of vLLM's own backends."""
    found = []
    for number, layer in enumerate(layers):
        cache = compat.plain_pages(layer)[0]
        keys = cache[table[: -(-num_slots // cache.shape[2])]].transpose(1, 2).flatten(0, 1)[:num_slots]
        asked, before = (None if x is None else x[number] for x in (queries, previous))
        found.append(policy.score(Layer(keys.float(), asked, layer.impl.scale, before)))
    return torch.stack(found)


def compact(layers: Sequence[Any], table: torch.Tensor, targets: torch.Tensor, kept: torch.Tensor) -> None:
    """As `compaction.compact`, of the caches of layers with one of vLLM's own backends.

    Args:
        kept: [L, H, M] int64, of every layer.
    """
    page_tokens = compat.plain_pages(layers[0])[0].shape[2]
    heads = torch.arange(kept.shape[1], device=kept.device).unsqueeze(1)
    places = torch.arange(kept.shape[2], device=kept.device)
    into = (targets[places // page_tokens], heads, places % page_tokens)
    pages, offsets = table[kept // page_tokens], kept % page_tokens
    for number, layer in enumerate(layers):
        for cache in compat.plain_pages(layer):
            cache[into] = cache[pages[number], heads, offsets[number]]
