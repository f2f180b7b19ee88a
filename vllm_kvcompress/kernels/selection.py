# SPDX-License-Identifier: Apache-2.0
"""Which kernels serve an engine: the setting `kernels`, the device, and what each can do. Refuses what cannot be."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

import torch

from vllm_kvcompress.config import KernelSetting
from vllm_kvcompress.errors import UnsupportedModelError
from vllm_kvcompress.formats.base import PAGE_TOKENS, PageFormat
from vllm_kvcompress.kernels import cuda_ops

MAX_DECODE_QUERY_LEN = 8
"""Most new tokens of a request that the decode kernels take (speculative decoding: one and the drafts)."""
TRITON_CAPABILITY = (8, 0)
_MAX_CUDA_GROUP = 16


@dataclass(frozen=True)
class Case:
    """What a layer asks of its kernels."""

    head_dim: int
    page_tokens: int
    group: int
    """query heads per KV head"""
    dtype: torch.dtype
    """the model's"""
    page_format: PageFormat


def choose_path(
    setting: KernelSetting, device_type: str, capability: tuple[int, int] | None, case: Case
) -> tuple[Literal["gpu", "torch"], str]:
    """Whether the GPU kernels (CUDA or Triton) or the torch path serve, and why. Does not initialise CUDA.

    Args:
        capability: of the CUDA device; None on other platforms.

    Raises:
        UnsupportedModelError: the setting asks for kernels that cannot run here; with the reason and the way out.
    """
    if setting == "torch":
        return "torch", "kernels=torch"
    reason = _no_triton(device_type, capability)
    if setting == "auto":
        if device_type == "cpu":
            return "torch", "this engine runs on the CPU"
        return ("gpu", "kernels=auto") if reason is None else ("torch", reason)
    if reason is None and setting == "cuda":
        reason = no_cuda_op(case)
        if reason is None and capability != cuda_ops.CAPABILITY:
            found = "none" if capability is None else _dotted(capability)
            reason = (
                f"the CUDA kernel is written for compute capability {_dotted(cuda_ops.CAPABILITY)} (H100, H200), this "
                f"device has {found}"
            )
        if reason is None:
            reason = cuda_ops.load()
    if reason is not None:
        raise UnsupportedModelError(f"kernels={setting} cannot serve: {reason}. Or leave kernels at auto.")
    return "gpu", f"kernels={setting}"


def choose_decode(setting: KernelSetting, device: torch.device, case: Case) -> tuple[Literal["cuda", "triton"], str]:
    """The decode kernel of an engine on GPU kernels, and why; for the worker: it looks at the device itself.

    Raises:
        UnsupportedModelError: kernels=cuda, and the CUDA op cannot run; with the reason.
    """
    if setting == "triton":
        return "triton", "kernels=triton"
    reason = no_cuda_op(case)
    if reason is None:
        available, reason = cuda_ops.is_available(device)
        if available:
            return "cuda", reason
    if setting == "cuda":
        raise UnsupportedModelError(f"kernels=cuda cannot serve: {reason}. Or leave kernels at auto.")
    return "triton", f"no CUDA kernel: {reason}"


def expected_decode(
    setting: KernelSetting, capability: tuple[int, int] | None, case: Case
) -> Literal["cuda", "triton"]:
    """What `choose_decode` comes to in the workers, for the processes that serve none. Does not initialise CUDA."""
    if setting == "triton" or no_cuda_op(case) is not None or capability != cuda_ops.CAPABILITY:
        return "triton"
    return "cuda" if cuda_ops.is_loadable()[0] else "triton"


def no_cuda_op(case: Case) -> str | None:
    """Why the CUDA decode op cannot serve a case on any device; None if it can."""
    if case.head_dim not in cuda_ops.HEAD_DIMS:
        return f"it serves head sizes {', '.join(map(str, cuda_ops.HEAD_DIMS))}, this model has {case.head_dim}"
    if case.page_tokens != PAGE_TOKENS:
        return f"it serves pages of {PAGE_TOKENS} tokens, --block-size is {case.page_tokens}"
    if cuda_ops.code_arguments(case.page_format.layout(case.head_dim, case.page_tokens)) is None:
        return f"it does not read pages of {case.page_format.name} at head size {case.head_dim}"
    if case.group > _MAX_CUDA_GROUP:
        return f"it serves up to {_MAX_CUDA_GROUP} query heads per KV head, this model has {case.group}"
    if case.dtype.itemsize != 2:
        return f"it serves bfloat16 and float16, --dtype is {str(case.dtype).removeprefix('torch.')}"
    return None


def _no_triton(device_type: str, capability: tuple[int, int] | None) -> str | None:
    if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device_type == "cpu":
        return "GPU kernels need a CUDA device, this engine runs on the CPU (tests interpret them: TRITON_INTERPRET=1)"
    if capability is None:
        return f"GPU kernels need an NVIDIA device, this engine runs on {device_type}"
    if capability < TRITON_CAPABILITY:
        wanted, found = _dotted(TRITON_CAPABILITY), _dotted(capability)
        return f"GPU kernels need compute capability {wanted} or newer, this device has {found}"
    return None


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))
