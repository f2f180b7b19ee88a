# SPDX-License-Identifier: Apache-2.0
"""Loads the CUDA extension (csrc/): `torch.ops.vllm_kvcompress.decode` and what belongs to it.

    decode(q, new_kv, pages, window_cache?, block_table, window_table?, query_start_loc, seq_lens, v_unrotation?,
           out (written), workspace (written), q_signs?, max_query_len, head_dim, code, scale and bend of the levels of
           keys, of the rest of the keys, of values and of the rest of the values, page_means, window_is_bf16,
           sink_tokens, recent_tokens, scale) -> ()
    decode_workspace_elements(num_kv_heads, group, head_dim, max_num_reqs, max_query_len) -> int
    cuda_versions() -> (int, int)

The ops exist once `load` has returned None. csrc/decode.h has shapes and dtypes; the ops check them.
"""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from vllm_kvcompress.formats.base import PageLayout
from vllm_kvcompress.quantizers import lloyd_max

LIBRARY = Path(__file__).resolve().parents[1] / "_C.so"
MIN_TORCH = (2, 11)
CAPABILITY = (9, 0)
HEAD_DIMS = (64, 128, 256)

_loaded = False


# (key bits, value bits) of parts, and whether keys have signs, of csrc/decode.h's codes of Lloyd-Max levels.
_CODES = {
    ((4,), (4,), False): 4,
    ((4, 3), (4, 3), False): 43,
    ((3, 2), (3, 2), False): 32,
    ((3, 2), (4, 3), True): 143,
    ((2, 1), (3, 2), True): 132,
}
_CHUNK = 32
"""Channels of a part are a multiple of it."""


@functools.cache
def code_arguments(layout: PageLayout) -> tuple[int | float, ...] | None:
    """What `decode` takes as `code` (csrc/decode.h) and as levels of its parts; None if it does not read such pages."""
    keys, values = layout.keys, layout.values
    signs = keys.signs is not None
    if keys.quantizer == values.quantizer == "affine":
        return (102 if signs else 2, *[0.0] * 8)
    key_bits, value_bits = (tuple(part.bits for part in row.parts) for row in (keys, values))
    code = _CODES.get((key_bits, value_bits, signs))
    parts = (*keys.parts, *values.parts)
    if code is None or layout.k_mean is None or any(part.channels % _CHUNK for part in parts):
        return None
    levels: list[float] = []
    for row in (keys, values):
        found = [x for part in row.parts for x in lloyd_max.cubic(part.channels, part.bits)]
        levels += [*found, 0.0, 0.0][:4]
    return code, *levels


@functools.cache
def is_available(device: torch.device) -> tuple[bool, str]:
    """Whether the CUDA ops run on a device, and why not, or what they were built with. Initialises CUDA."""
    if device.type != "cuda":
        return False, f"it is written for NVIDIA GPUs, the device is {device.type}"
    if torch.version.cuda is None or not torch.cuda.is_available():
        return False, f"torch {torch.__version__} finds no NVIDIA GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability != CAPABILITY:
        name, wanted, found = torch.cuda.get_device_name(device), _dotted(CAPABILITY), _dotted(capability)
        return False, f"it is written for compute capability {wanted} (H100, H200), {name} has {found}"
    return is_loadable()


def is_loadable() -> tuple[bool, str]:
    """As `is_available`, on the assumption that the device is one it is written for. Does not initialise CUDA."""
    reason = load()
    if reason is not None:
        return False, reason
    runtime, driver = torch.ops.vllm_kvcompress.cuda_versions()
    if driver // 1000 < runtime // 1000:
        return False, (
            f"it was built with CUDA {_cuda(runtime)}, the driver serves CUDA {_cuda(driver)}: "
            "update the driver, or build with an older toolkit (CUDA_HOME)"
        )
    return True, f"built with CUDA {_cuda(runtime)} for compute capability {_dotted(CAPABILITY)}"


def load(library: Path | None = None) -> str | None:
    """Load the extension into torch, once per process, and register what its ops do on fake tensors.

    Args:
        library: the shared library; default: the one of this installation.

    Returns:
        None if its ops can be called, else why they cannot.
    """
    global _loaded
    if _loaded:
        return None
    library = library or LIBRARY
    if tuple(map(int, torch.__version__.split(".")[:2])) < MIN_TORCH:
        return f"it needs torch >= {_dotted(MIN_TORCH)}, this is {torch.__version__}"
    if not library.is_file():
        return (
            "it is not compiled in this installation; install from source with VLLM_KVCOMPRESS_BUILD_CUDA=1, "
            "which says what is missing"
        )
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return f"{library} does not load: {error.__cause__ or error}"
    torch.library.register_fake("vllm_kvcompress::decode", _decode_fake)
    _loaded = True
    return None


def _decode_fake(*args: object) -> None:
    """The op writes `out` and `workspace` and returns nothing, so there is no shape to tell."""


def _dotted(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def _cuda(version: int) -> str:
    """13.0 of 13000."""
    return f"{version // 1000}.{version % 1000 // 10}"
