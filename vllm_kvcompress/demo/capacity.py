# SPDX-License-Identifier: Apache-2.0
"""Bytes per token of a model's KV cache in bf16 and in one of our page formats."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

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


def read_geometry(folder: Path) -> Geometry:
    """Geometry of the model in a Hugging Face folder."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder).get_text_config()
    heads = config.num_attention_heads
    return Geometry(
        num_layers=len(full_attention_layers(config, config.num_hidden_layers)),
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        max_positions=config.max_position_embeddings,
    )


def head_bytes_per_token(kv_cache_dtype: str, head_dim: int) -> int:
    """Bytes of one token in one KV head, keys and values, scales included; bf16 for dtypes that are not ours."""
    if is_ours(kv_cache_dtype):
        return get_format(kv_cache_dtype).layout(head_dim, PAGE_TOKENS).bytes_per_token
    return 2 * head_dim * BF16_BYTES


def table(geometry: Geometry, kv_cache_dtype: str, memory_bytes: int, max_model_len: int, vllm_tokens: int) -> str:
    """The comparison with bf16 that the demo prints.

    Args:
        memory_bytes: memory given to the KV cache.
        vllm_tokens: capacity that the running server logged for `kv_cache_dtype`.
    """
    ours, bf16 = (head_bytes_per_token(dtype, geometry.head_dim) for dtype in (kv_cache_dtype, "bfloat16"))
    rows = [("", "bf16", kv_cache_dtype, "ratio")]

    def add(name: str, left: int, right: int, larger_is_better: bool = False) -> None:
        ratio = right / left if larger_is_better else left / right
        rows.append((name, f"{left:,}", f"{right:,}", f"{ratio:.1f}x"))

    add("bytes per token and KV head", bf16, ours)
    add("bytes per token, all layers", bf16 * geometry.heads, ours * geometry.heads)
    bf16_tokens, our_tokens = (memory_bytes // (size * geometry.heads) for size in (bf16, ours))
    add(f"tokens in {memory_bytes / 2**20:,.0f} MiB, pages alone", bf16_tokens, our_tokens, larger_is_better=True)
    add(f"the same, requests of {max_model_len:,} tokens [1]", bf16_tokens, vllm_tokens, larger_is_better=True)
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells))
    lines.insert(1, "  ".join("-" * width for width in widths))
    note = (
        f"[1] {kv_cache_dtype}: as the running server logged it, 16-bit windows included (they weigh less the longer\n"
        "    requests are). bf16: computed from the same memory and the bytes above; no bf16 server was started."
    )
    return "\n".join([*lines, note])
