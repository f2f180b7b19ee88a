# SPDX-License-Identifier: Apache-2.0
"""OSCAR (arXiv 2605.17757) at 2 bits: calibrated rotations per layer and KV head, and a mean key per page.

Centring is not in the paper. A mean per page and head, unlike a calibrated one, follows the drift RoPE gives a key
bias; it costs 2 bytes per token and head at head size 128. docs/accuracy.md has figures of both.
"""

from vllm_kvcompress.formats.base import PageFormat

FORMAT = PageFormat(
    name="oscar-int2",
    summary="calibrated rotation, keys centred per page",
    rotation="calibrated",
    centring="page",
    clip_k=0.75,
    clip_v=0.75,
)
