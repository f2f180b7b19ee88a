# SPDX-License-Identifier: Apache-2.0
"""2-bit packing in channel order: byte j holds channels 4j..4j+3, low bits first.

Channel order keeps a token's codes in one run of D/4 bytes, so a decode step appends with one small write and the
32-bit word w of channels 16i..16i+15 gives fp16 subnormal pairs by masking (DESIGN of the decode kernel).
"""

from __future__ import annotations

import functools

import torch

CODES_PER_BYTE = 4


def pack(codes: torch.Tensor) -> torch.Tensor:
    """[..., D] uint8 codes in 0..3 -> [..., D/4] uint8."""
    quads = codes.unflatten(-1, (-1, CODES_PER_BYTE))
    return quads[..., 0] | quads[..., 1] << 2 | quads[..., 2] << 4 | quads[..., 3] << 6


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """[..., D/4] uint8 -> [..., D] uint8 codes in 0..3."""
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=packed.device)
    return (packed.unsqueeze(-1) >> shifts & 3).flatten(-2)


@functools.cache
def _float_table(device: torch.device) -> torch.Tensor:
    """[256] complex128: the four float32 codes of a byte laid side by side, so that one look-up moves 16 bytes."""
    every_byte = torch.arange(256, device=device).to(torch.uint8).unsqueeze(-1)
    return unpack(every_byte).float().contiguous().view(torch.complex128).squeeze(-1)


def unpack_float(packed: torch.Tensor, out: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """[..., D/4] uint8 -> [..., D] float32 codes by one table look-up a byte: faster than shifts on a CPU.

    Args:
        out: contiguous [..., D] float32 to fill.
        index: scratch, contiguous [..., D/4] int64. Scratch tensors are the caller's to keep: allocating them anew
            costs more in page faults than the look-up itself.
    """
    index.copy_(packed)
    torch.gather(_float_table(packed.device), 0, index.view(-1), out=out.view(torch.complex128).view(-1))
    return out


def pack_bits(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """[..., D] uint8 codes in 0..2**bits - 1 -> [..., D * bits / 8] uint8, for 1 to 4 bits.

    1, 2 and 4 bits: channel order, low bits first. 3 bits: the low two bits of all channels as by `pack`, then their
    high bits as packed for 1 bit: both runs are read like those widths, where triples of bits would straddle words.

    Raises:
        ValueError: bits is not in 1..4, or the codes do not fill whole bytes.
    """
    channels_per_run = _channels_per_run(bits)
    if codes.shape[-1] % channels_per_run:
        raise ValueError(f"{codes.shape[-1]} codes of {bits} bits: need a multiple of {channels_per_run}")
    if bits == 3:
        return torch.cat([pack(codes & 3), pack_bits(codes >> 2, 1)], dim=-1)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    # Disjoint bits: the sum is their union.
    return (codes.unflatten(-1, (-1, channels_per_run)) << shifts).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """[..., D * bits / 8] uint8 as of `pack_bits` -> [..., D] uint8 codes.

    Raises:
        ValueError: bits is not in 1..4, or the bytes are not those of whole channels.
    """
    _channels_per_run(bits)
    if bits == 3:
        if packed.shape[-1] % 3:
            raise ValueError(f"{packed.shape[-1]} bytes of 3-bit codes: need a multiple of 3")
        low, high = packed.tensor_split([packed.shape[-1] // 3 * 2], dim=-1)
        return unpack(low) | unpack_bits(high, 1) << 2
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return (packed.unsqueeze(-1) >> shifts & 2**bits - 1).flatten(-2)


def _channels_per_run(bits: int) -> int:
    """The fewest channels whose codes fill whole bytes."""
    if not 1 <= bits <= 4:
        raise ValueError(f"codes of 1 to 4 bits can be packed, got {bits}")
    return {1: 8, 2: 4, 3: 8, 4: 2}[bits]
