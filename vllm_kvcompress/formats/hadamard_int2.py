# SPDX-License-Identifier: Apache-2.0
"""Hadamard rotation with a mean key per page: 2 bits without any calibration (rotation as in QuaRot, 2404.00456)."""

from vllm_kvcompress.formats.base import PageFormat

FORMAT = PageFormat(
    name="hadamard-int2",
    summary="Hadamard rotation, keys centred per page; no calibration",
    rotation="hadamard",
    centring="page",
    clip_k=0.75,
    clip_v=0.75,
)
