# SPDX-License-Identifier: Apache-2.0
"""Packing: four codes a byte in channel order, low bits first."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_kvcompress.quantizers import packing


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    dim=st.sampled_from([4, 64, 96, 128, 256]),
    lead=st.lists(st.integers(0, 4), max_size=3),
)
def test_round_trip(seed, dim, lead):
    codes = torch.randint(0, 4, (*lead, dim), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = packing.pack(codes)
    assert packed.dtype == torch.uint8 and packed.shape == (*lead, dim // 4)
    assert torch.equal(packing.unpack(packed), codes)
    out, index = torch.empty(codes.shape), torch.empty(packed.shape, dtype=torch.int64)
    assert torch.equal(packing.unpack_float(packed, out, index), codes.float())


def test_every_byte_value_unpacks_to_its_own_codes():
    packed = torch.arange(256, dtype=torch.int64).to(torch.uint8).unsqueeze(-1)
    codes = packing.unpack(packed)
    for byte in range(256):
        assert codes[byte].tolist() == [byte >> shift & 3 for shift in (0, 2, 4, 6)]
    assert torch.equal(packing.pack(codes), packed)


def test_channel_order():
    codes = torch.zeros(8, dtype=torch.uint8)
    codes[5] = 3  # channel 5: byte 1, bits 2-3
    assert packing.pack(codes).tolist() == [0, 3 << 2]


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    bits=st.sampled_from([1, 2, 3, 4]),
    dim=st.sampled_from([8, 32, 64, 96, 128, 256]),
    lead=st.lists(st.integers(0, 5), max_size=3),
)
def test_round_trip_of_every_width(seed, bits, dim, lead):
    codes = torch.randint(0, 2**bits, (*lead, dim), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = packing.pack_bits(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (*lead, dim * bits // 8)
    unpacked = packing.unpack_bits(packed, bits)
    assert unpacked.dtype == torch.uint8 and torch.equal(unpacked, codes)
    if bits == 2:
        assert torch.equal(packed, packing.pack(codes))


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_every_byte_value_is_a_packing(bits):
    byte = torch.arange(256, dtype=torch.int64).to(torch.uint8)
    packed = torch.stack([byte, byte.flip(0), byte.roll(77)], dim=-1) if bits == 3 else byte.unsqueeze(-1)
    assert torch.equal(packing.pack_bits(packing.unpack_bits(packed, bits), bits), packed)


@pytest.mark.parametrize(
    ("bits", "channel", "expected"),
    [
        (1, 10, [0, 1 << 2]),  # byte 1, bit 2
        (4, 5, [0, 0, 15 << 4, 0, 0, 0, 0, 0]),  # byte 2, high half
        (3, 5, [0, 3 << 2, 0, 0, 1 << 5, 0]),  # low bits: byte 1, bits 2-3 of four; high bit: bit 5 of the two after
    ],
)
def test_channel_order_of_every_width(bits, channel, expected):
    codes = torch.zeros(16, dtype=torch.uint8)
    codes[channel] = 2**bits - 1
    assert packing.pack_bits(codes, bits).tolist() == expected


def test_widths_and_sizes_that_do_not_fit():
    for bits in (0, 5, 8):
        with pytest.raises(ValueError, match="1 to 4 bits"):
            packing.pack_bits(torch.zeros(8, dtype=torch.uint8), bits)
        with pytest.raises(ValueError, match="1 to 4 bits"):
            packing.unpack_bits(torch.zeros(8, dtype=torch.uint8), bits)
    for bits, dim in ((1, 12), (2, 6), (3, 12), (4, 7)):
        with pytest.raises(ValueError, match=f"{dim} codes of {bits} bits"):
            packing.pack_bits(torch.zeros(dim, dtype=torch.uint8), bits)
    with pytest.raises(ValueError, match="multiple of 3"):
        packing.unpack_bits(torch.zeros(4, dtype=torch.uint8), 3)
