# SPDX-License-Identifier: Apache-2.0
"""TurboQuant (arXiv 2504.19874) at 3.5 bits: half of the channels, the outliers, at 4 bits and half at 3.

The paper says only that the ratio is not that of 2.5 bits; 32 channels at 5 bits and 96 at 3 would be 3.5 as well.
"""

from vllm_kvcompress.formats import turboquant_4
from vllm_kvcompress.formats.base import RowCode

HALF_FOUR_BITS = RowCode(quantizer="lloyd-max", bits=(4, 3), outlier_share=0.5)

FORMAT = turboquant_4.FORMAT.model_copy(
    update={
        "name": "turboquant-3.5",
        "summary": "random rotations, 4-bit Lloyd-Max codes for outlier channels and 3-bit ones; no calibration",
        "keys": HALF_FOUR_BITS,
        "values": HALF_FOUR_BITS,
    }
)
