# SPDX-License-Identifier: Apache-2.0
"""Which layers get pages, and how many tokens a page must hold beside those of sliding-window layers."""

from types import SimpleNamespace

import pytest
import torch
from vllm.v1.attention.backend import MultipleOf
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from vllm_kvcompress import checks
from vllm_kvcompress.errors import UnsupportedModelError
from vllm_kvcompress.formats import format_names, get_format
from vllm_kvcompress.formats.base import SUPPORTED_HEAD_DIMS
from vllm_kvcompress.sliding import align_pages, full_attention_layers

S, F = "sliding_attention", "full_attention"


@pytest.mark.parametrize(
    "window,kinds,expected",
    [
        (None, None, [0, 1, 2]),
        (None, [S, F, S], [0, 1, 2]),  # --disable-sliding-window
        (128, None, []),
        (128, [S, S, S], []),
        (128, [S, F, S], [1]),
        (128, [F, F, F], [0, 1, 2]),
    ],
)
def test_layers_that_grow(window, kinds, expected):
    assert full_attention_layers(SimpleNamespace(sliding_window=window, layer_types=kinds), 3) == expected


class Layer:
    """What `align_pages` asks of vLLM's layers."""

    def __init__(self, dtype, spec, sizes=()):
        self.kv_cache_dtype, self._spec, self._sizes = dtype, spec, list(sizes)

    def get_kv_cache_spec(self, config):
        assert config.cache_config.skip_page_size_padded is None, "padding would hide the natural size"
        return self._spec

    def get_attn_backend(self):
        return SimpleNamespace(
            customize_spec=lambda spec: spec, get_supported_kernel_block_sizes=lambda spec: self._sizes
        )


def align(name, head_size, sizes, dtype=torch.bfloat16, asked=None, heads=2):
    geometry = {"num_kv_heads": heads, "head_size": head_size}
    layers = {
        "sliding": Layer("auto", SlidingWindowSpec(block_size=16, sliding_window=512, dtype=dtype, **geometry), sizes),
        "full": Layer(name, FullAttentionSpec(block_size=128, dtype=torch.uint8, **geometry)),
        "full.window": object(),
    }
    cache = SimpleNamespace(
        cache_dtype=name,
        block_size=asked or 16,  # vLLM's own default is not ours
        user_specified_block_size=asked is not None,
        skip_page_size_padded=None,
    )
    align_pages(
        SimpleNamespace(
            cache_config=cache, compilation_config=SimpleNamespace(static_forward_context=layers), model_config=None
        )
    )
    assert cache.skip_page_size_padded == heads * get_format(name).layout(head_size, cache.block_size).head_bytes
    return cache.block_size


@pytest.mark.parametrize("name", format_names())
@pytest.mark.parametrize("head_size", SUPPORTED_HEAD_DIMS)
def test_gpu_backends_fit_into_pages_of_128_tokens(name, head_size, monkeypatch):
    """FlashAttention and FlashInfer take blocks of 16 tokens, so the GPU kernels keep their pages."""
    monkeypatch.setattr(checks, "kernel_path", lambda config: ("gpu", ""))
    assert align(name, head_size, [MultipleOf(16)]) == align(name, head_size, [16, 32, 64]) == 128


@pytest.mark.parametrize("asked,expected", [(None, 256), (128, 256), (256, 256), (384, 384)])
def test_pages_grow_on_the_cpu(asked, expected, monkeypatch):
    monkeypatch.setattr(checks, "kernel_path", lambda config: ("torch", ""))
    assert align("hadamard-int2", 256, [MultipleOf(32)], asked=asked) == expected


def test_pages_do_not_outgrow_the_gpu_kernels_unasked(monkeypatch):
    """They were chosen for pages of 128 tokens before the sliding layers' backend was known."""
    monkeypatch.setattr(checks, "kernel_path", lambda config: ("gpu", ""))
    with pytest.raises(UnsupportedModelError, match="set --block-size 256"):
        align("hadamard-int2", 256, [MultipleOf(32)])
    assert align("hadamard-int2", 256, [MultipleOf(32)], asked=256) == 256
