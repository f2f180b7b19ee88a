# SPDX-License-Identifier: Apache-2.0
"""OSCAR rotations with the calibrated mean key instead of a mean per page: the smallest page, 2.25 bits per element."""

from vllm_kvcompress.formats import oscar_int2

FORMAT = oscar_int2.FORMAT.model_copy(
    update={
        "name": "oscar-int2-static",
        "summary": "calibrated rotation, keys centred on their calibrated mean",
        "centring": "static",
    }
)
