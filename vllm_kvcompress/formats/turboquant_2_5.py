# SPDX-License-Identifier: Apache-2.0
"""TurboQuant (arXiv 2504.19874, section 4.3) at 2.5 bits: a quarter of the channels, outliers, at 3, others at 2."""

from vllm_kvcompress.formats import turboquant_4
from vllm_kvcompress.formats.base import RowCode

QUARTER_THREE_BITS = RowCode(quantizer="lloyd-max", bits=(3, 2), outlier_share=0.25)

FORMAT = turboquant_4.FORMAT.model_copy(
    update={
        "name": "turboquant-2.5",
        "summary": "random rotations, 3-bit Lloyd-Max codes for outlier channels and 2-bit ones; no calibration",
        "keys": QUARTER_THREE_BITS,
        "values": QUARTER_THREE_BITS,
    }
)
