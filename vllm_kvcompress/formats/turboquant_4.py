# SPDX-License-Identifier: Apache-2.0
"""TurboQuant (arXiv 2504.19874) at 4 bits: random rotation, Lloyd-Max codes of the unit vector and its norm.

Keys are centred on a mean per page, which is not in the paper: key biases (Qwen2.5) are far longer than what varies.
"""

from vllm_kvcompress.formats.base import PageFormat, RowCode

FOUR_BITS = RowCode(quantizer="lloyd-max", bits=(4,))

FORMAT = PageFormat(
    name="turboquant-4",
    summary="random rotation, 4-bit Lloyd-Max codes, keys centred per page; no calibration",
    keys=FOUR_BITS,
    values=FOUR_BITS,
    rotation="random",
    centring="page",
)
