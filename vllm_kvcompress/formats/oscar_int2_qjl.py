# SPDX-License-Identifier: Apache-2.0
"""OSCAR's 2-bit codes and, for keys, the signs of what they leave over (QJL, arXiv 2406.03482): 3 bits a channel."""

from vllm_kvcompress.formats import oscar_int2
from vllm_kvcompress.formats.base import TWO_BIT

FORMAT = oscar_int2.FORMAT.model_copy(
    update={
        "name": "oscar-int2-qjl",
        "summary": "oscar-int2 and residual signs of the keys (QJL)",
        "keys": TWO_BIT.model_copy(update={"signs": True}),
    }
)
