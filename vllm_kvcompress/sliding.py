# SPDX-License-Identifier: Apache-2.0
"""Models that mix sliding-window layers with full attention: only the latter get 2-bit pages.

A sliding-window layer holds no more than its window, so there is little to save: vLLM's own backend keeps it, in the
model's dtype (`kv_cache_dtype_skip_layers`). All layers share one pool of blocks, whose pages must have equal bytes.
Ours are the measure: 128 tokens in 2 bits have the bytes of 16 to 20 in 16 bits. The other backend takes as many tokens
as fit and leaves the rest of the page empty; where not even its smallest block fits, our pages hold more tokens.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from vllm_kvcompress.errors import UnsupportedModelError
from vllm_kvcompress.formats import get_format, is_ours
from vllm_kvcompress.formats.base import PAGE_TOKENS

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = logging.getLogger("vllm.kvcompress")

SKIP_LAYERS = ["sliding_window"]
"""vLLM's `kv_cache_dtype_skip_layers` for "every layer with a sliding window"."""


def full_attention_layers(text_config: Any, num_layers: int) -> list[int]:
    """Indices of the layers whose cache grows with the context; those get 2-bit pages.

    Args:
        text_config: Hugging Face's; under `--disable-sliding-window` vLLM takes the window out of it.
    """
    layers = range(num_layers)
    if not getattr(text_config, "sliding_window", None):
        return list(layers)
    # Without a list of kinds every layer has the window.
    kinds = getattr(text_config, "layer_types", None)
    return [layer for layer in layers if kinds is not None and kinds[layer] != "sliding_attention"]


def align_pages(vllm_config: VllmConfig) -> None:
    """Give all layers pages of equal bytes, once they and their backends are known.

    Raises:
        UnsupportedModelError: pages must hold more tokens than the GPU kernels were chosen for.
    """
    from vllm.v1.attention.backend import MultipleOf

    from vllm_kvcompress.checks import kernel_path

    cache = vllm_config.cache_config
    page_format = get_format(cache.cache_dtype)
    base = cache.block_size if cache.user_specified_block_size else PAGE_TOKENS
    cache.block_size, cache.skip_page_size_padded = base, None
    # Those of this process: under tensor parallelism they hold a share of the heads, under pipeline of the layers.
    ours: Any = None
    needed = 0
    for layer in vllm_config.compilation_config.static_forward_context.values():
        dtype = getattr(layer, "kv_cache_dtype", None)
        if dtype is None:  # a companion of ours
            continue
        backend, spec = layer.get_attn_backend(), layer.get_kv_cache_spec(vllm_config)
        if is_ours(dtype):
            ours = spec
            continue
        token_bytes = backend.customize_spec(spec).unpadded_page_size_bytes // spec.block_size
        sizes = backend.get_supported_kernel_block_sizes(spec)
        smallest = min((size.base if isinstance(size, MultipleOf) else size for size in sizes), default=1)
        needed = max(needed, smallest * token_bytes)
    if ours is None:
        return

    def page_bytes(tokens: int) -> int:
        return ours.num_kv_heads * page_format.layout(ours.head_size, tokens).head_bytes

    tokens = base
    while page_bytes(tokens) < needed:
        tokens += base
    if tokens != base:
        if kernel_path(vllm_config)[0] == "gpu":
            raise UnsupportedModelError(
                f"--kv-cache-dtype {cache.cache_dtype}: a page of {base} tokens has {page_bytes(base)} bytes, and the "
                f"sliding-window layers of this model need {needed}; set --block-size {tokens}"
            )
        logger.info("pages of %d tokens: those of %d are too small for the sliding-window layers", tokens, base)
    cache.block_size, cache.skip_page_size_padded = tokens, page_bytes(tokens)
