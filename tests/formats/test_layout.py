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
    RowCode,
    page_fields,
    read_pages,
    write_tokens,
)
from vllm_kvcompress.quantizers import affine, lloyd_max, qjl

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


TURBOQUANT_BYTES = {
    # K and V at head size 128: codes, a norm for each part, signs and their norm; + 2 for the page mean's share.
    "turboquant-4": 2 * (64 + 2) + 2,
    "turboquant-3.5": 2 * (32 + 24 + 4) + 2,
    "turboquant-3.5-qjl": (24 + 16 + 4) + (16 + 2) + (32 + 24 + 4) + 2,
    "turboquant-2.5": 2 * (12 + 24 + 4) + 2,
    "turboquant-2.5-qjl": (8 + 12 + 4) + (16 + 2) + (12 + 24 + 4) + 2,
    "oscar-int2-qjl": 74 + 16 + 2,
}


@pytest.mark.parametrize(("name", "expected"), TURBOQUANT_BYTES.items())
def test_bytes_per_token_of_other_quantisers(name, expected):
    assert get_format(name).layout(128, 128).bytes_per_token == expected


def regions(layout: PageLayout) -> list[tuple[int, int]]:
    tokens = layout.page_tokens
    found = [] if layout.k_mean is None else [(layout.k_mean, layout.head_dim * 2)]
    for rows in (layout.keys, layout.values):
        for part in rows.parts:
            found.append((part.codes, tokens * part.channels * part.bits // 8))
            found.append((part.scales, tokens * (4 if rows.quantizer == "affine" else 2)))
        if rows.signs is not None:
            found += [(rows.signs, tokens * layout.head_dim // 8), (rows.sign_norms, tokens * 2)]
    return found


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
    # Nothing is wasted but what rounding the mean's share to whole bytes a token adds.
    assert sum(size for _, size in regions(layout)) > layout.head_bytes - page_tokens
    for rows in (layout.keys, layout.values):
        firsts = [part.first_channel for part in rows.parts]
        ends = [part.first_channel + part.channels for part in rows.parts]
        assert firsts == [0, *ends[:-1]] and ends[-1] == head_dim


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


@pytest.mark.parametrize("name", TURBOQUANT_BYTES)
@pytest.mark.parametrize("head_dim", SUPPORTED_HEAD_DIMS)
def test_other_quantisers_read_back_what_was_quantised(name, head_dim):
    page_format = get_format(name)
    layout = page_format.layout(head_dim, 16)
    pages = torch.randint(0, 256, (3, 2, layout.head_bytes), dtype=torch.uint8)
    fields = page_fields(pages, layout)
    fields.k_mean.copy_(torch.randn(3, 2, head_dim))
    slots = torch.randperm(48)[:20]
    keys, values = torch.randn(2, 20, 2, head_dim)
    write_tokens(pages, layout, slots, keys, values, None, None)
    page, offset = slots // 16, slots % 16
    mean = fields.k_mean[page].float()

    def quantised(x, rows):
        if rows.quantizer == "affine":
            return affine.dequantize(*affine.quantize(x))
        parts = x.split(rows.part_sizes(head_dim), dim=-1)
        coded = [lloyd_max.quantize(part, bits, not rows.signs) for part, bits in zip(parts, rows.bits, strict=True)]
        return torch.cat([lloyd_max.dequantize(*c, bits) for c, bits in zip(coded, rows.bits, strict=True)], dim=-1)

    found_k, found_v = read_pages(pages, layout)
    assert torch.equal(found_v[page, :, offset], quantised(values, page_format.values))
    expected_k = quantised(keys - mean, page_format.keys)
    if page_format.keys.signs:
        # What is read is such that a query's product with it is the estimator's: q . codes + q . signs.
        queries, matrix = torch.randn(5, head_dim), qjl.sketch_matrix(head_dim, 0, orthogonal=True)
        signs, norms = qjl.sketch((keys - mean - expected_k).flatten(0, 1), matrix)
        wanted = queries @ expected_k.flatten(0, 1).mT + qjl.correction(queries, matrix, signs, norms)
        found = queries @ (found_k[page, :, offset] - mean).flatten(0, 1).mT
        # float32 sums of D products of magnitude 1, and the mean added and taken away again.
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * head_dim)
    else:
        assert torch.equal(found_k[page, :, offset], expected_k + mean)


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


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"quantizer": "lloyd-max", "bits": (4, 3)}, "outlier_share"),
        ({"quantizer": "lloyd-max", "bits": (4,), "outlier_share": 0.5}, "outlier_share"),
        ({"quantizer": "affine", "bits": (3,)}, "2 bits"),
    ],
)
def test_row_codes_that_make_no_sense(given, reason):
    with pytest.raises(ValueError, match=reason):
        RowCode(**given)


def test_which_formats_need_a_rotation_file():
    assert get_format("oscar-int2").needs_calibration and get_format("oscar-int2-qjl").needs_calibration
    assert not get_format("turboquant-3.5").needs_calibration
    assert not get_format("hadamard-int2").needs_calibration
    assert not get_format("int2").needs_calibration
