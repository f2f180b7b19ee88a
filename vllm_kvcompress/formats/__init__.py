# SPDX-License-Identifier: Apache-2.0
"""Registry of page formats. A new format is a file beside this one and a line in `_FORMATS`."""

from __future__ import annotations

from vllm_kvcompress.errors import KVCompressError
from vllm_kvcompress.formats import (
    hadamard_int2,
    int2,
    oscar_int2,
    oscar_int2_qjl,
    oscar_int2_static,
    turboquant_2_5,
    turboquant_2_5_qjl,
    turboquant_3_5,
    turboquant_3_5_qjl,
    turboquant_4,
)
from vllm_kvcompress.formats.base import PageFormat, PageLayout

_FORMATS: dict[str, PageFormat] = {
    module.FORMAT.name: module.FORMAT
    for module in (
        oscar_int2,
        oscar_int2_static,
        oscar_int2_qjl,
        hadamard_int2,
        int2,
        turboquant_4,
        turboquant_3_5,
        turboquant_3_5_qjl,
        turboquant_2_5,
        turboquant_2_5_qjl,
    )
}

__all__ = ["PageFormat", "PageLayout", "format_names", "get_format", "is_ours"]


def format_names() -> tuple[str, ...]:
    """The names `--kv-cache-dtype` gains from this package."""
    return tuple(_FORMATS)


def is_ours(kv_cache_dtype: str | None) -> bool:
    return kv_cache_dtype in _FORMATS


def get_format(name: str) -> PageFormat:
    """The format of that name.

    Raises:
        KVCompressError: no such format.
    """
    try:
        return _FORMATS[name]
    except KeyError:
        raise KVCompressError(f"unknown KV page format {name!r}; known: {', '.join(_FORMATS)}") from None
