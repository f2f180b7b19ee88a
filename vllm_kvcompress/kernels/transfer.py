# SPDX-License-Identifier: Apache-2.0
"""Numbers of the host for kernels."""

from __future__ import annotations

import torch


def to_device(values: list[int] | list[list[int]], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor that is on the device when kernels launched from now on run; the host does not wait."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=dtype, device=device)
    return torch.tensor(values, dtype=dtype, pin_memory=True).to(device, non_blocking=True)
