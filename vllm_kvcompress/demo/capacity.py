# SPDX-License-Identifier: Apache-2.0
"""What the demo saved against bf16, as a table."""

from __future__ import annotations

from vllm_kvcompress.capacity.geometry import Geometry, head_bytes_per_token
from vllm_kvcompress.capacity.text import aligned


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
    note = (
        f"[1] {kv_cache_dtype}: as the running server logged it, 16-bit windows included (they weigh less the longer\n"
        "    requests are). bf16: computed from the same memory and the bytes above; no bf16 server was started."
    )
    return "\n".join([*aligned(rows), note])
