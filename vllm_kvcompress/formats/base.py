# SPDX-License-Identifier: Apache-2.0
"""Page formats: what a KV page holds and where, declared as data.

A page of `page_tokens` tokens is, per KV head, one contiguous run of bytes (so a kernel fetches it with one bulk copy).
Every region has one row per token, but for the mean:

    [K codes | V codes | K signs | K scales | K sign norms | V scales | K mean]

Codes and scales repeat for each part of the channels that has a quantiser of its own. The 2-bit affine formats have one
part and no signs:

    [K codes  page_tokens x D/4 | V codes  page_tokens x D/4 |
     K scale,zero  page_tokens x 2 fp16 | V scale,zero  page_tokens x 2 fp16 | K mean  D fp16 (page centring only)]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator

from vllm_kvcompress.errors import UnsupportedModelError
from vllm_kvcompress.quantizers import affine, lloyd_max, packing, qjl

Quantizer = Literal["affine", "lloyd-max"]
_HALVES: dict[Quantizer, int] = {"affine": 2, "lloyd-max": 1}
"""fp16 numbers of a token and part: scale and zero-point, or the norm."""
Rotation = Literal["none", "hadamard", "random", "calibrated"]
Centring = Literal["none", "static", "page"]

SUPPORTED_HEAD_DIMS = (64, 96, 128, 256)
PAGE_TOKENS = 128
"""Tokens of a page unless the user asks for another multiple of it."""
_ROW_MULTIPLE = 16
_SCALE_BYTES = 2  # fp16
_SKETCH_SEED = 0
"""Of S, which is a function of the head size alone: every layer and process has the same, and no page holds it."""


class RowCode(BaseModel):
    """How one row, a token's key or value in one KV head, becomes bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    quantizer: Quantizer
    bits: tuple[int, ...] = Field(min_length=1, max_length=2)
    """Bits a channel. Two numbers: of the outlier channels and of the others, each with a quantiser and norm of its own
    (TurboQuant, arXiv 2504.19874, section 4.3)."""
    outlier_share: float = Field(default=0.0, ge=0, lt=1)
    """Share of the channels that are outliers, which come first in cache space."""
    signs: bool = False
    """Also the signs of a random projection of what the codes leave over, and its norm (quantizers/qjl.py)."""

    @model_validator(mode="after")
    def _check(self) -> RowCode:
        if (len(self.bits) == 2) != (self.outlier_share > 0):
            raise ValueError("two numbers of bits go with an outlier_share, one goes without")
        if self.quantizer == "affine" and self.bits != (2,):
            raise ValueError("the affine quantiser has 2 bits")
        return self

    def part_sizes(self, head_dim: int) -> tuple[int, ...]:
        """Channels of each part."""
        if len(self.bits) == 1:
            return (head_dim,)
        outliers = round(head_dim * self.outlier_share)
        return outliers, head_dim - outliers


TWO_BIT = RowCode(quantizer="affine", bits=(2,))


@dataclass(frozen=True)
class Part:
    """Channels with a quantiser of their own, and where their codes and scales lie in a head's share of a page."""

    first_channel: int
    channels: int
    bits: int
    codes: int
    scales: int

    @property
    def code_bytes(self) -> int:
        """Bytes of one token's codes."""
        return self.channels * self.bits // 8


@dataclass(frozen=True)
class RowLayout:
    """Where the rows of keys or of values lie in a head's share of a page, in bytes."""

    quantizer: Quantizer
    parts: tuple[Part, ...]
    signs: int | None
    sign_norms: int | None


@dataclass(frozen=True)
class PageLayout:
    """Byte offsets of one KV head's share of a page. All sizes in bytes."""

    head_dim: int
    page_tokens: int
    bytes_per_token: int
    """Per KV head, K and V together, scales and page mean included."""
    keys: RowLayout
    values: RowLayout
    k_mean: int | None
    """Offset of the page's mean key, None unless the format centres per page."""

    @property
    def head_bytes(self) -> int:
        """Bytes of one head's share of a page."""
        return self.bytes_per_token * self.page_tokens

    @property
    def is_two_bit(self) -> bool:
        """Whether keys and values are 2-bit affine codes without signs, for which kernels have paths of their own."""
        rows = (self.keys, self.values)
        return all(row.quantizer == "affine" and row.signs is None for row in rows)

    @property
    def code_bytes(self) -> int:
        """Bytes of one token's codes of one tensor, in the 2-bit affine formats."""
        return self.keys.parts[0].code_bytes


class PageFormat(BaseModel):
    """One KV page format. The name is what `--kv-cache-dtype` takes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")
    summary: str
    keys: RowCode = TWO_BIT
    values: RowCode = TWO_BIT
    rotation: Rotation
    centring: Centring
    clip_k: float = Field(default=1.0, gt=0, le=1)
    """Affine: share of a row's range the levels span (quantizers/affine.py), where no calibrated one exists."""
    clip_v: float = Field(default=1.0, gt=0, le=1)

    @property
    def needs_calibration(self) -> bool:
        return self.rotation == "calibrated" or self.centring == "static"

    @property
    def splits_channels(self) -> bool:
        """Whether outlier channels have a quantiser of their own: a calibration file may say which they are."""
        return len(self.keys.bits) > 1 or len(self.values.bits) > 1

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
        used = 0

        def take(bytes_per_token: int) -> int:
            nonlocal used
            begin, used = used, used + page_tokens * bytes_per_token
            return begin

        codes = [
            [take(size * bits // 8) for size, bits in zip(rows.part_sizes(head_dim), rows.bits, strict=True)]
            for rows in (self.keys, self.values)
        ]
        signs = take(head_dim // 8) if self.keys.signs else None
        keys = self._row_layout(self.keys, head_dim, codes[0], signs, take)
        values = self._row_layout(self.values, head_dim, codes[1], None, take)
        has_mean = self.centring == "page"
        k_mean = used if has_mean else None
        used += head_dim * _SCALE_BYTES if has_mean else 0
        return PageLayout(
            head_dim=head_dim,
            page_tokens=page_tokens,
            # vLLM sizes pages as tokens x bytes, so the page mean is spread over the tokens and rounded up.
            bytes_per_token=-(-used // page_tokens),
            keys=keys,
            values=values,
            k_mean=k_mean,
        )

    def _row_layout(
        self, rows: RowCode, head_dim: int, codes: list[int], signs: int | None, take: Callable[[int], int]
    ) -> RowLayout:
        sizes = rows.part_sizes(head_dim)
        scales = [take(_HALVES[rows.quantizer] * _SCALE_BYTES) for _ in sizes]
        parts, first = [], 0
        for size, bits, code_offset, scale_offset in zip(sizes, rows.bits, codes, scales, strict=True):
            parts.append(Part(first, size, bits, code_offset, scale_offset))
            first += size
        sign_norms = take(_SCALE_BYTES) if signs is not None else None
        return RowLayout(rows.quantizer, tuple(parts), signs, sign_norms)


@dataclass(frozen=True)
class RowFields:
    """Typed views of the keys' or the values' regions, a list entry for each part."""

    codes: list[torch.Tensor]
    """[P, H, page_tokens, code_bytes] uint8"""
    scales: list[torch.Tensor]
    """float16: affine [P, H, page_tokens, 2], scale and zero; else [P, H, page_tokens], the norm"""
    signs: torch.Tensor | None
    """[P, H, page_tokens, D/8] uint8"""
    sign_norms: torch.Tensor | None
    """[P, H, page_tokens] float16"""


@dataclass(frozen=True)
class PageFields:
    """Typed views into raw pages [P, H, head_bytes] uint8; writing through them writes the pages."""

    keys: RowFields
    values: RowFields
    k_mean: torch.Tensor | None
    """[P, H, D] float16"""

    # Of the 2-bit affine formats.
    @property
    def k_codes(self) -> torch.Tensor:
        """[P, H, page_tokens, D/4] uint8"""
        return self.keys.codes[0]

    @property
    def v_codes(self) -> torch.Tensor:
        return self.values.codes[0]

    @property
    def k_scales(self) -> torch.Tensor:
        """[P, H, page_tokens, 2] float16: scale, zero"""
        return self.keys.scales[0]

    @property
    def v_scales(self) -> torch.Tensor:
        return self.values.scales[0]


def page_fields(pages: torch.Tensor, layout: PageLayout) -> PageFields:
    """Views of the regions of raw pages.

    Args:
        pages: [P, H, head_bytes] uint8, last dimension contiguous; any stride of P (vLLM may pad between pages).
        layout: the format's layout.
    """
    tokens = layout.page_tokens

    def rows_of(offset: int, width: int) -> torch.Tensor:
        return pages[..., offset : offset + tokens * width].unflatten(-1, (tokens, width))

    def halves(offset: int, count: int) -> torch.Tensor:
        return pages[..., offset : offset + count * _SCALE_BYTES].view(torch.float16)

    def fields(rows: RowLayout) -> RowFields:
        scales = [halves(part.scales, tokens * _HALVES[rows.quantizer]) for part in rows.parts]
        if rows.quantizer == "affine":
            scales = [scale.unflatten(-1, (tokens, 2)) for scale in scales]
        return RowFields(
            codes=[rows_of(part.codes, part.code_bytes) for part in rows.parts],
            scales=scales,
            signs=None if rows.signs is None else rows_of(rows.signs, layout.head_dim // 8),
            sign_norms=None if rows.sign_norms is None else halves(rows.sign_norms, tokens),
        )

    return PageFields(
        keys=fields(layout.keys),
        values=fields(layout.values),
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
    keys = _read_rows(fields.keys, layout.keys)
    if fields.keys.signs is not None and fields.keys.sign_norms is not None:
        keys += qjl.dequantize(
            fields.keys.signs, fields.keys.sign_norms, sketch_matrix(layout.head_dim).to(pages.device)
        )
    if fields.k_mean is not None:
        keys += fields.k_mean.float().unsqueeze(-2)
    return keys, _read_rows(fields.values, layout.values)


def _read_rows(fields: RowFields, rows: RowLayout) -> torch.Tensor:
    found = [
        _dequantize(rows.quantizer, packing.unpack_bits(packed, part.bits), stored, part.bits)
        for part, packed, stored in zip(rows.parts, fields.codes, fields.scales, strict=True)
    ]
    return found[0] if len(found) == 1 else torch.cat(found, dim=-1)  # one part is spared the copy


def _dequantize(quantizer: Quantizer, codes: torch.Tensor, stored: torch.Tensor, bits: int) -> torch.Tensor:
    """[..., channels] float32 of a part's codes and of what `RowFields.scales` has for them."""
    if quantizer == "affine":
        return affine.dequantize(codes, stored[..., 0], stored[..., 1])
    return lloyd_max.dequantize(codes, stored, bits)


def sketch_matrix(head_dim: int) -> torch.Tensor:
    """S [D, D] float32. Orthogonal rows: as unbiased, and 2.75 times less variance (quantizers/qjl.py)."""
    return qjl.sketch_matrix(head_dim, _SKETCH_SEED, orthogonal=True)


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
    for x, clip, rows, field in (
        (keys, clip_k, layout.keys, fields.keys),
        (values, clip_v, layout.values, fields.values),
    ):
        read_back = []
        for part, code_field, scale_field in zip(rows.parts, field.codes, field.scales, strict=True):
            channels = x[..., part.first_channel : part.first_channel + part.channels]
            if rows.quantizer == "affine":
                codes, scale, zero = affine.quantize(channels, clip)
                stored = torch.stack((scale, zero), dim=-1)
            else:
                # Signs correct the codes' bias themselves, and want the least residual.
                codes, stored = lloyd_max.quantize(channels, part.bits, norm_correction=field.signs is None)
            # Advanced indices split by a slice put the token dimension first: [T, H, ...].
            code_field[page, :, offset] = packing.pack_bits(codes, part.bits)
            scale_field[page, :, offset] = stored
            if field.signs is not None:
                read_back.append(_dequantize(rows.quantizer, codes, stored, part.bits))
        if field.signs is not None and field.sign_norms is not None:
            residual = x.float() - torch.cat(read_back, dim=-1)
            signs, norms = qjl.sketch(residual, sketch_matrix(layout.head_dim).to(x.device))
            field.signs[page, :, offset] = signs
            field.sign_norms[page, :, offset] = norms
