# SPDX-License-Identifier: Apache-2.0
"""Heads, head size and bytes per token of a model, from its Hugging Face configuration; no vLLM needed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_kvcompress.formats import get_format, is_ours
from vllm_kvcompress.formats.base import PAGE_TOKENS
from vllm_kvcompress.sliding import full_attention_layers

BF16_BYTES = 2


@dataclass(frozen=True)
class Geometry:
    """What decides the size of a model's KV cache."""

    num_layers: int
    """Those whose cache grows with the context: not the sliding-window layers"""
    num_kv_heads: int
    head_dim: int
    max_positions: int

    @property
    def heads(self) -> int:
        """KV heads of all layers."""
        return self.num_layers * self.num_kv_heads


def geometry_of(text_config: Any) -> Geometry:
    """Geometry in a text model's configuration (`PretrainedConfig.get_text_config()`)."""
    heads = text_config.num_attention_heads
    return Geometry(
        num_layers=len(full_attention_layers(text_config, text_config.num_hidden_layers)),
        num_kv_heads=getattr(text_config, "num_key_value_heads", None) or heads,
        head_dim=getattr(text_config, "head_dim", None) or text_config.hidden_size // heads,
        max_positions=text_config.max_position_embeddings,
    )


def read_geometry(folder: Path) -> Geometry:
    """Geometry of the model in a Hugging Face folder."""
    from transformers import AutoConfig

    return geometry_of(AutoConfig.from_pretrained(folder).get_text_config())


def head_bytes_per_token(kv_cache_dtype: str, head_dim: int) -> int:
    """Bytes of one token in one KV head, keys and values, scales included; bf16 for dtypes that are not ours."""
    if is_ours(kv_cache_dtype):
        return get_format(kv_cache_dtype).layout(head_dim, PAGE_TOKENS).bytes_per_token
    return 2 * head_dim * BF16_BYTES
