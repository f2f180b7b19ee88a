# SPDX-License-Identifier: Apache-2.0
"""Every private seam of vLLM this package leans on, one test each: a failure names the seam that moved."""

import pytest

from vllm_kvcompress import compat
from vllm_kvcompress.operations.seams import SEAMS


def test_version_is_served():
    compat.check_version()


@pytest.mark.parametrize("seam", SEAMS)
def test_seam(seam):
    SEAMS[seam]()
