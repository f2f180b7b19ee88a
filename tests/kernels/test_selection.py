# SPDX-License-Identifier: Apache-2.0
"""Which kernels serve on which device and model, and what is refused with which reason."""

import dataclasses

import pytest
import torch

from vllm_kvcompress.errors import UnsupportedModelError
from vllm_kvcompress.formats import get_format
from vllm_kvcompress.kernels import cuda_ops
from vllm_kvcompress.kernels.selection import Case, choose_decode, choose_path, expected_decode

CASE = Case(head_dim=128, page_tokens=128, group=4, dtype=torch.bfloat16, page_format=get_format("oscar-int2"))
BUILT, UNBUILT = (lambda: None), (lambda: "it is not compiled; install from source")
HOPPER, AMPERE, TURING = (9, 0), (8, 0), (7, 5)


@pytest.fixture(autouse=True)
def not_interpreted(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize(
    "setting,device,capability,path",
    [
        ("auto", "cpu", None, "torch"),
        ("auto", "cuda", HOPPER, "gpu"),
        ("auto", "cuda", AMPERE, "gpu"),
        ("auto", "cuda", TURING, "torch"),
        ("auto", "cuda", None, "torch"),  # ROCm calls its devices cuda
        ("torch", "cuda", HOPPER, "torch"),
        ("triton", "cuda", AMPERE, "gpu"),
        ("cuda", "cuda", HOPPER, "gpu"),
    ],
)
def test_path(monkeypatch, setting, device, capability, path):
    monkeypatch.setattr(cuda_ops, "load", BUILT)
    chosen, reason = choose_path(setting, device, capability, CASE)
    assert chosen == path and reason


def test_interpreted_kernels_run_on_the_cpu_only_when_asked(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose_path("auto", "cpu", None, CASE)[0] == "torch"
    assert choose_path("triton", "cpu", None, CASE)[0] == "gpu"


@pytest.mark.parametrize(
    "setting,device,capability,load,changes,word",
    [
        ("triton", "cpu", None, BUILT, {}, "CUDA device"),
        ("cuda", "cpu", None, BUILT, {}, "CUDA device"),
        ("triton", "xpu", None, BUILT, {}, "xpu"),
        ("triton", "cuda", TURING, BUILT, {}, "7.5"),
        ("cuda", "cuda", AMPERE, BUILT, {}, "8.0"),
        ("cuda", "cuda", HOPPER, UNBUILT, {}, "install from source"),
        ("cuda", "cuda", HOPPER, BUILT, {"head_dim": 96}, "96"),
        ("cuda", "cuda", HOPPER, BUILT, {"page_tokens": 256}, "256"),
        ("cuda", "cuda", HOPPER, BUILT, {"group": 17}, "17"),
        (
            "cuda",
            "cuda",
            HOPPER,
            BUILT,
            {"head_dim": 64, "page_format": get_format("turboquant-2.5")},
            "turboquant-2.5",
        ),
        ("cuda", "cuda", HOPPER, BUILT, {"dtype": torch.float32}, "float32"),
    ],
)
def test_refused_with_the_reason(monkeypatch, setting, device, capability, load, changes, word):
    monkeypatch.setattr(cuda_ops, "load", load)
    with pytest.raises(UnsupportedModelError) as caught:
        choose_path(setting, device, capability, dataclasses.replace(CASE, **changes))
    assert f"kernels={setting}" in str(caught.value) and word in str(caught.value)


def test_decode_kernel(monkeypatch):
    device = torch.device("cuda")
    monkeypatch.setattr(cuda_ops, "is_available", lambda _: (True, "built with CUDA 13.0"))
    assert choose_decode("auto", device, CASE) == ("cuda", "built with CUDA 13.0")
    assert choose_decode("triton", device, CASE)[0] == "triton"
    kernel, reason = choose_decode("auto", device, dataclasses.replace(CASE, head_dim=96))
    assert kernel == "triton" and "96" in reason
    monkeypatch.setattr(cuda_ops, "is_available", lambda _: (False, "the driver is old"))
    assert choose_decode("auto", device, CASE) == ("triton", "no CUDA kernel: the driver is old")
    with pytest.raises(UnsupportedModelError, match="the driver is old"):
        choose_decode("cuda", device, CASE)


@pytest.mark.parametrize(
    "setting,capability,load,changes,kernel",
    [
        ("auto", HOPPER, BUILT, {}, "cuda"),
        ("cuda", HOPPER, BUILT, {}, "cuda"),
        ("triton", HOPPER, BUILT, {}, "triton"),
        ("auto", AMPERE, BUILT, {}, "triton"),
        ("auto", HOPPER, UNBUILT, {}, "triton"),
        ("auto", HOPPER, BUILT, {"group": 17}, "triton"),
    ],
)
def test_what_other_processes_expect_of_the_worker(monkeypatch, setting, capability, load, changes, kernel):
    case, device = dataclasses.replace(CASE, **changes), torch.device("cuda")
    monkeypatch.setattr(cuda_ops, "load", load)
    monkeypatch.setattr(torch.ops.vllm_kvcompress, "cuda_versions", lambda: (13000, 13000), raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(cuda_ops, "is_available", cuda_ops.is_available.__wrapped__)
    assert expected_decode(setting, capability, case) == kernel == choose_decode(setting, device, case)[0]
