# SPDX-License-Identifier: Apache-2.0
"""TurboQuant at 3.5 bits, inner-product variant (arXiv 2504.19874, 3.2): a bit of the keys for residual signs."""

from vllm_kvcompress.formats import turboquant_3_5
from vllm_kvcompress.formats.base import RowCode

FORMAT = turboquant_3_5.FORMAT.model_copy(
    update={
        "name": "turboquant-3.5-qjl",
        "summary": "turboquant-3.5 with one bit of the keys spent on residual signs (QJL)",
        "keys": RowCode(quantizer="lloyd-max", bits=(3, 2), outlier_share=0.5, signs=True),
    }
)
