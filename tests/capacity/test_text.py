# SPDX-License-Identifier: Apache-2.0
"""Sizes as people write them."""

import argparse

import pytest

from vllm_kvcompress.capacity.text import aligned, gib, parse_bytes


@pytest.mark.parametrize(
    "text,value",
    [
        ("80GiB", 80 << 30),
        ("80gib", 80 << 30),
        ("80GB", 80 * 10**9),
        ("80gb", 80 * 10**9),
        ("24G", 24 << 30),
        ("24g", 24 * 10**9),
        ("1.5 TiB", 3 << 39),
        ("81559MiB", 81559 << 20),
        ("512k", 512_000),
        ("123456", 123456),
        ("123456B", 123456),
    ],
)
def test_sizes(text, value):
    assert parse_bytes(text) == value


@pytest.mark.parametrize("text", ["", "GiB", "80GX", "80iB", "-1GiB", "0", "0.1B", "1e9", "nan", "80 G iB", "80GiB/s"])
def test_what_is_not_a_size(text):
    with pytest.raises(argparse.ArgumentTypeError, match="80GiB") as caught:
        parse_bytes(text)
    assert repr(text) in str(caught.value)


def test_letters_are_vllms():
    """A lone letter means the same as in `vllm serve --kv-cache-memory-bytes`."""
    from vllm.utils.argparse_utils import human_readable_int

    for letter in "kKmMgGtT":
        assert parse_bytes(f"3{letter}") == human_readable_int(f"3{letter}")


def test_output():
    assert gib(3 << 29) == "1.50 GiB" and gib(64 << 20) == "64.0 MiB"
    assert aligned([["a", "size"], ["name", "1"]]) == ["a     size", "----  ----", "name     1"]
