# SPDX-License-Identifier: Apache-2.0
"""Page formats: what a KV page holds and where, declared as data.

A page of `page_tokens` tokens is, per KV head, one contiguous run of bytes (so a kernel fetches it with one bulk copy):

    [K codes  page_tokens x D/4 | V codes  page_tokens x D/4 |
     K scale,zero  page_tokens x 2 fp16 | V scale,zero  page_tokens x 2 fp16 | K mean  D fp16 (page centring only)]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from vllm_kvcompress.errors import UnsupportedModelError
from vllm_kvcompress.quantizers import affine, packing

Rotation = Literal["none", "hadamard", "calibrated"]
Centring = Literal["none", "static", "page"]

SUPPORTED_HEAD_DIMS = (64, 96, 128, 256)
PAGE_TOKENS = 128
"""Tokens of a page unless the user asks for another multiple of it."""
_ROW_MULTIPLE = 16
_SCALE_BYTES = 2  # fp16


@dataclass(frozen=True)
class PageLayout:
    """Byte offsets of one KV head's share of a page. All sizes in bytes."""

    head_dim: int
    page_tokens: int
    bytes_per_token: int
    """Per KV head, K and V together, scales and page mean included."""
    k_codes: int
    v_codes: int
    k_scales: int
    v_scales: int
    k_mean: int | None
    """Offset of the page's mean key, None unless the format centres per page."""

    @property
    def head_bytes(self) -> int:
        """Bytes of one head's share of a page."""
        return self.bytes_per_token * self.page_tokens

    @property
    def code_bytes(self) -> int:
        """Bytes of one token's codes of one tensor."""
        return self.head_dim // packing.CODES_PER_BYTE


class PageFormat(BaseModel):
    """One KV page format. The name is what `--kv-cache-dtype` takes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")
    summary: str
    bits: Literal[2] = 2
    packing: Literal["channel-order"] = "channel-order"
    scale_dtype: Literal["float16"] = "float16"
    rotation: Rotation
    centring: Centring
    clip_k: float = Field(gt=0, le=1)
    """Share of a row's range the levels span (quantizers/affine.py) for keys, where no calibrated one exists."""
    clip_v: float = Field(gt=0, le=1)

    @property
    def needs_calibration(self) -> bool:
        return self.rotation == "calibrated" or self.centring == "static"

    def layout(self, head_dim: int, page_tokens: int) -> PageLayout:
        """Layout arithmetic for one KV head.

        Raises:
            UnsupportedModelError: head_dim or page_tokens is outside what the format can hold.
        """
        if head_dim not in SUPPORTED_HEAD_DIMS:
            raise UnsupportedModelError(
                f"--kv-cache-dtype {self.name} supports head sizes {', '.join(map(str, SUPPORTED_HEAD_DIMS))}; "
                f"this model has {head_dim}. Use --kv-cache-dtype auto."
            )
        if page_tokens <= 0 or page_tokens % _ROW_MULTIPLE:
            raise UnsupportedModelError(
                f"pages of {self.name} hold a multiple of {_ROW_MULTIPLE} tokens, got {page_tokens}"
            )
        code_bytes = head_dim // packing.CODES_PER_BYTE
        v_codes = page_tokens * code_bytes
        k_scales = v_codes + page_tokens * code_bytes
        v_scales = k_scales + page_tokens * 2 * _SCALE_BYTES
        end = v_scales + page_tokens * 2 * _SCALE_BYTES
        has_mean = self.centring == "page"
        used = end + (head_dim * _SCALE_BYTES if has_mean else 0)
        return PageLayout(
            head_dim=head_dim,
            page_tokens=page_tokens,
            # vLLM sizes pages as tokens x bytes, so the page mean is spread over the tokens and rounded up.
            bytes_per_token=-(-used // page_tokens),
            k_codes=0,
            v_codes=v_codes,
            k_scales=k_scales,
            v_scales=v_scales,
            k_mean=end if has_mean else None,
        )


@dataclass(frozen=True)
class PageFields:
    """Typed views into raw pages [P, H, head_bytes] uint8; writing through them writes the pages."""

    k_codes: torch.Tensor
    """[P, H, page_tokens, D/4] uint8"""
    v_codes: torch.Tensor
    k_scales: torch.Tensor
    """[P, H, page_tokens, 2] float16: scale, zero"""
    v_scales: torch.Tensor
    k_mean: torch.Tensor | None
    """[P, H, D] float16"""


def page_fields(pages: torch.Tensor, layout: PageLayout) -> PageFields:
    """Views of the regions of raw pages.

    Args:
        pages: [P, H, head_bytes] uint8, last dimension contiguous; any stride of P (vLLM may pad between pages).
        layout: the format's layout.
    """
    tokens = layout.page_tokens

    def codes(offset: int) -> torch.Tensor:
        return pages[..., offset : offset + tokens * layout.code_bytes].unflatten(-1, (tokens, layout.code_bytes))

    def halves(offset: int, count: int) -> torch.Tensor:
        return pages[..., offset : offset + count * _SCALE_BYTES].view(torch.float16)

    return PageFields(
        k_codes=codes(layout.k_codes),
        v_codes=codes(layout.v_codes),
        k_scales=halves(layout.k_scales, tokens * 2).unflatten(-1, (tokens, 2)),
        v_scales=halves(layout.v_scales, tokens * 2).unflatten(-1, (tokens, 2)),
        k_mean=None if layout.k_mean is None else halves(layout.k_mean, layout.head_dim),
    )


def read_pages(pages: torch.Tensor, layout: PageLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """Dequantise whole pages: the torch reference of every kernel that reads them.

    Args:
        pages: [P, H, head_bytes] uint8.

    Returns:
        keys and values, each [P, H, page_tokens, D] float32, in cache space (rotated, statically centred).
    """
    fields = page_fields(pages, layout)
    keys = affine.dequantize(packing.unpack(fields.k_codes), fields.k_scales[..., 0], fields.k_scales[..., 1])
    values = affine.dequantize(packing.unpack(fields.v_codes), fields.v_scales[..., 0], fields.v_scales[..., 1])
    if fields.k_mean is not None:
        keys = keys + fields.k_mean.float().unsqueeze(-2)
    return keys, values


def write_tokens(
    pages: torch.Tensor,
    layout: PageLayout,
    slots: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    clip_k: torch.Tensor | float | None,
    clip_v: torch.Tensor | float | None,
) -> None:
    """Quantise, pack and store tokens: the torch reference of every store kernel. Page means must be set already.

    Args:
        pages: [P, H, head_bytes] uint8, written in place.
        slots: [T] int64, page * page_tokens + offset; every slot must be real (the caller drops padding).
        keys, values: [T, H, D] float in cache space.
        clip_k, clip_v: shares of the range (quantizers/affine.py), float or [H].
    """
    fields = page_fields(pages, layout)
    page, offset = slots // layout.page_tokens, slots % layout.page_tokens
    if fields.k_mean is not None:
        keys = keys.float() - fields.k_mean[page].float()
    for x, clip, code_field, scale_field in (
        (keys, clip_k, fields.k_codes, fields.k_scales),
        (values, clip_v, fields.v_codes, fields.v_scales),
    ):
        codes, scale, zero = affine.quantize(x, clip)
        # Advanced indices split by a slice put the token dimension first: [T, H, ...].
        code_field[page, :, offset] = packing.pack(codes)
        scale_field[page, :, offset] = torch.stack((scale, zero), dim=-1)
