# SPDX-License-Identifier: Apache-2.0
"""Plain 2-bit pages, for comparison only: no rotation, no centring, the whole range of each row."""

from vllm_kvcompress.formats.base import PageFormat

FORMAT = PageFormat(
    name="int2",
    summary="no rotation, no centring; for comparison only",
    rotation="none",
    centring="none",
    clip_k=1.0,
    clip_v=1.0,
)
