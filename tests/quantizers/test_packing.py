# SPDX-License-Identifier: Apache-2.0
"""Packing: four codes a byte in channel order, low bits first."""

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
