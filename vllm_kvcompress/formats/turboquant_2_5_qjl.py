# SPDX-License-Identifier: Apache-2.0
"""TurboQuant at 2.5 bits, inner-product variant (arXiv 2504.19874, 3.2): a bit of the keys for residual signs."""

from vllm_kvcompress.formats import turboquant_2_5
from vllm_kvcompress.formats.base import RowCode

FORMAT = turboquant_2_5.FORMAT.model_copy(
    update={
        "name": "turboquant-2.5-qjl",
        "summary": "turboquant-2.5 with one bit of the keys spent on residual signs (QJL)",
        "keys": RowCode(quantizer="lloyd-max", bits=(2, 1), outlier_share=0.25, signs=True),
    }
)
