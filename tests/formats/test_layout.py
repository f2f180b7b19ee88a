# SPDX-License-Identifier: Apache-2.0
"""Page layouts, and pages written and read through them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_kvcompress.errors import KVCompressError, UnsupportedModelError
from vllm_kvcompress.formats import format_names, get_format, is_ours
from vllm_kvcompress.formats.base import (
    SUPPORTED_HEAD_DIMS,
    PageFormat,
    PageLayout,
    page_fields,
    read_pages,
    write_tokens,
)
from vllm_kvcompress.quantizers import affine

PAGED = PageFormat(name="paged", summary="", rotation="none", centring="page", clip_k=0.8, clip_v=0.9)
PLAIN = PAGED.model_copy(update={"name": "plain", "centring": "none"})


@pytest.mark.parametrize(
    ("page_format", "head_dim", "expected"),
    # K and V: 2 x (D / 4 bytes of codes + 4 of scale and zero); a page mean adds D x 2 / 128, rounded up.
    [(PLAIN, 128, 72), (PAGED, 128, 74), (PLAIN, 64, 40), (PAGED, 64, 41), (PLAIN, 96, 56), (PLAIN, 256, 136)],
)
def test_bytes_per_token(page_format, head_dim, expected):
    layout = page_format.layout(head_dim, 128)
    assert layout.bytes_per_token == expected
    assert layout.head_bytes == expected * 128


def regions(layout: PageLayout) -> list[tuple[int, int]]:
    codes, scales = layout.page_tokens * layout.code_bytes, layout.page_tokens * 4
    found = [
        (layout.k_codes, codes),
        (layout.v_codes, codes),
        (layout.k_scales, scales),
        (layout.v_scales, scales),
    ]
    return found if layout.k_mean is None else [*found, (layout.k_mean, layout.head_dim * 2)]


@pytest.mark.parametrize("name", format_names())
@pytest.mark.parametrize("head_dim", SUPPORTED_HEAD_DIMS)
@pytest.mark.parametrize("page_tokens", [16, 32, 128, 256])
def test_regions_fit_and_do_not_overlap(name, head_dim, page_tokens):
    layout = get_format(name).layout(head_dim, page_tokens)
    end = 0
    for offset, size in sorted(regions(layout)):
        assert offset >= end
        assert offset % 2 == 0  # fp16 views need it
        end = offset + size
    assert end <= layout.head_bytes


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    page_format=st.sampled_from([PLAIN, PAGED]),
    head_dim=st.sampled_from([64, 96, 128]),
    heads=st.sampled_from([1, 2, 3]),
    page_tokens=st.sampled_from([16, 48]),
)
def test_pages_read_back_what_was_quantised(seed, page_format, head_dim, heads, page_tokens):
    generator = torch.Generator().manual_seed(seed)
    layout = page_format.layout(head_dim, page_tokens)
    pages = torch.randint(0, 256, (3, heads, layout.head_bytes), dtype=torch.uint8, generator=generator)
    if layout.k_mean is not None:
        fields = page_fields(pages, layout)
        fields.k_mean.copy_(torch.randn(3, heads, head_dim, generator=generator))
    slots = torch.randperm(3 * page_tokens, generator=generator)[:20]
    keys, values = torch.randn(2, 20, heads, head_dim, generator=generator)
    before = read_pages(pages, layout)
    clip_k, clip_v = torch.rand(2, heads, generator=generator) * 0.5 + 0.5
    write_tokens(pages, layout, slots, keys, values, clip_k, clip_v)

    page, offset = slots // page_tokens, slots % page_tokens
    mean = torch.zeros(20, heads, head_dim)
    if layout.k_mean is not None:
        mean = page_fields(pages, layout).k_mean[page].float()
    found_k, found_v = read_pages(pages, layout)
    expected_k = affine.dequantize(*affine.quantize(keys - mean, clip_k)) + mean
    expected_v = affine.dequantize(*affine.quantize(values, clip_v))
    assert torch.equal(found_k[page, :, offset], expected_k)
    assert torch.equal(found_v[page, :, offset], expected_v)

    untouched = torch.ones(3, page_tokens, dtype=torch.bool)
    untouched[page, offset] = False
    for found, old in zip((found_k, found_v), before, strict=True):
        # Random bytes are NaN here and there; untouched means the same bits.
        kept = found.transpose(1, 2)[untouched].contiguous().view(torch.int32)
        assert torch.equal(kept, old.transpose(1, 2)[untouched].contiguous().view(torch.int32))


def test_views_write_through_padded_pages():
    layout = PLAIN.layout(64, 16)
    raw = torch.zeros(2, 3 * layout.head_bytes + 64, dtype=torch.uint8)  # vLLM may pad between pages
    pages = raw[:, : 3 * layout.head_bytes].unflatten(1, (3, layout.head_bytes))
    write_tokens(pages, layout, torch.tensor([17]), torch.randn(1, 3, 64), torch.randn(1, 3, 64), 0.8, 0.8)
    assert raw[0].eq(0).all() and raw[1].ne(0).any()
    assert raw[:, 3 * layout.head_bytes :].eq(0).all()


@pytest.mark.parametrize("head_dim", [0, 32, 80, 112, 192, 512])
def test_other_head_sizes_are_refused(head_dim):
    with pytest.raises(UnsupportedModelError, match=f"this model has {head_dim}"):
        get_format("oscar-int2").layout(head_dim, 128)


@pytest.mark.parametrize("page_tokens", [0, -16, 1, 8, 24, 100])
def test_other_page_sizes_are_refused(page_tokens):
    with pytest.raises(UnsupportedModelError, match="multiple of 16"):
        get_format("oscar-int2").layout(128, page_tokens)


def test_registry():
    assert {"oscar-int2", "hadamard-int2", "int2"} <= set(format_names())
    assert is_ours("oscar-int2") and not is_ours("auto") and not is_ours(None)
    assert get_format("oscar-int2").layout(128, 128).bytes_per_token == 74
    assert get_format("oscar-int2-static").layout(128, 128).bytes_per_token == 72
    with pytest.raises(KVCompressError, match="unknown KV page format 'int3'"):
        get_format("int3")


def test_which_formats_need_a_rotation_file():
    assert get_format("oscar-int2").needs_calibration
    assert not get_format("hadamard-int2").needs_calibration
    assert not get_format("int2").needs_calibration
