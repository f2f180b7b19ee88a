# SPDX-License-Identifier: Apache-2.0
"""Scratch tensors kept between calls: a fresh megabyte a layer costs more in page faults than the arithmetic on it."""

from __future__ import annotations

import math

import torch


class Workspace:
    """Named flat buffers that grow on demand. One per process: layers run one after another."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], torch.Tensor] = {}

    def get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """An uninitialised contiguous tensor; its former content, under the same name, is gone."""
        count = math.prod(shape)
        key = (name, dtype, device)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < count:
            buffer = self._buffers[key] = torch.empty(count, dtype=dtype, device=device)
        return buffer[:count].view(shape)
