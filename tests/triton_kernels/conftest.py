# SPDX-License-Identifier: Apache-2.0
"""Kernels run on a GPU where there is one, else in Triton's interpreter (tests/conftest.py switches it on)."""

import pytest
import torch
import triton
from triton.runtime.interpreter import InterpretedFunction


@pytest.fixture(scope="session")
def device() -> torch.device:
    if not triton.knobs.runtime.interpret:
        return torch.device("cuda")
    # The variable is read while triton is imported: set later, it leaves functions that cannot be interpreted.
    assert isinstance(triton.language.cdiv, InterpretedFunction), "triton was imported before TRITON_INTERPRET was set"
    return torch.device("cpu")


@pytest.fixture(autouse=True)
def _fresh_seed():
    """Every run draws new inputs; the seed is printed with a failure."""
    print(f"seed {torch.seed()}")
