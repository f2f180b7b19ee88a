# SPDX-License-Identifier: Apache-2.0
"""What of an installation, its device and its rotation files would keep an engine from serving, and what to do.

Works where vLLM is missing or of another version: then that is what it finds. Nothing here initialises CUDA.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from vllm_kvcompress import __version__, compat, rotations
from vllm_kvcompress.config import load_settings
from vllm_kvcompress.errors import KVCompressError, RotationError
from vllm_kvcompress.kernels import cuda_ops
from vllm_kvcompress.kernels.selection import TRITON_CAPABILITY
from vllm_kvcompress.operations import seams

_PLUGINS = "vllm.general_plugins"


@dataclass(frozen=True)
class Finding:
    check: str
    status: Literal["ok", "warning", "error"]
    """A warning: it serves, but not as well as it could; an error: it does not, or not with what the check names"""
    text: str
    fix: str = ""
    """What to do, where the text does not say it"""


def examine(model: str | None = None) -> list[Finding]:
    """
    Args:
        model: folder or hub id whose rotation file is looked at, too.
    """
    found = [_packages(), *_settings(), _vllm(), _plugin()]
    capability = None
    if importlib.util.find_spec("vllm") is not None:
        try:
            capability = compat.device_capability()
            found += [_device(capability), *_seams()]
        except Exception as error:  # whatever importing a damaged or foreign vLLM does
            found.append(Finding("vllm", "error", f"vLLM does not load: {error!r}", "install it anew"))
    found += [_extension(capability), *_rotation_cache()]
    if model is not None:
        found.append(_rotation_of(model))
    return found


def _packages() -> Finding:
    versions = {"vllm-kvcompress": __version__, "Python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "transformers", "safetensors", "prometheus_client"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "none"
    text = ", ".join(f"{name} {version}" for name, version in versions.items())
    return Finding("packages", "ok", f"{text}, {platform.platform()}")


def _settings() -> Iterator[Finding]:
    try:
        load_settings({})
    except KVCompressError as error:
        yield Finding("settings", "error", str(error))


def _vllm() -> Finding:
    try:
        compat.check_version()
    except KVCompressError as error:
        return Finding("vllm", "error", str(error))
    except ImportError as error:
        fix = "pip install 'vllm-kvcompress[cuda]', or 'vllm-kvcompress[cpu]' on a machine without a GPU"
        return Finding("vllm", "error", f"vLLM is not installed: {error}", fix)
    return Finding("vllm", "ok", compat.vllm_version())


def _plugin() -> Finding:
    if not any(point.name == "kvcompress" for point in importlib.metadata.entry_points(group=_PLUGINS)):
        return Finding(
            "plugin",
            "error",
            f"vLLM cannot find this package: no entry point kvcompress in {_PLUGINS}",
            "install it with pip; a folder on PYTHONPATH is not enough",
        )
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "kvcompress" not in allowed.split(","):
        return Finding(
            "plugin",
            "error",
            f"VLLM_PLUGINS={allowed} keeps vLLM from loading kvcompress",
            f"export VLLM_PLUGINS={','.join([*filter(None, [allowed]), 'kvcompress'])}, or unset it",
        )
    return Finding("plugin", "ok", f"vLLM finds it among its {_PLUGINS}")


def _device(capability: tuple[int, int] | None) -> Finding:
    from vllm.platforms import current_platform

    if capability is None:
        kind = current_platform.device_type or "no device that vLLM knows"
        status: Literal["ok", "warning"] = "ok" if kind == "cpu" else "warning"
        return Finding("device", status, f"{kind}: attention over pages in torch, for tests and small models")
    text = f"{current_platform.get_device_name()}, compute capability {capability[0]}.{capability[1]}"
    if capability < TRITON_CAPABILITY:
        return Finding(
            "device", "warning", f"{text}: too old for the GPU kernels, attention runs in torch", "use a newer GPU"
        )
    if importlib.util.find_spec("triton") is None:
        return Finding("device", "error", f"{text}: its kernels need Triton, which is missing", "pip install triton")
    return Finding("device", "ok", text)


def _extension(capability: tuple[int, int] | None) -> Finding:
    loads, reason = cuda_ops.is_loadable()
    if loads:
        return Finding("CUDA extension", "ok", reason)
    if capability != cuda_ops.CAPABILITY:
        return Finding("CUDA extension", "ok", f"not needed: it is for H100 and H200 ({reason})")
    fix = "build and install this package again, with the torch and CUDA of this machine"
    return Finding("CUDA extension", "warning", f"Triton decodes, which is slower: {reason}", fix)


def _seams() -> Iterator[Finding]:
    found = {name: reason for name in seams.SEAMS if (reason := seams.moved(name)) is not None}
    for name, reason in found.items():
        about = (seams.SEAMS[name].__doc__ or "").strip()
        fix = "install a version of vLLM that is served, without local changes"
        yield Finding(f"seam {name}", "error", f"vLLM is not as expected here: {about} {reason}", fix)
    if not found:
        yield Finding("seams", "ok", f"all {len(seams.SEAMS)} places of vLLM that are leant on are as expected")


def _rotation_cache() -> Iterator[Finding]:
    """The user cache. Files beside models are looked at with their models."""
    folder = rotations.user_cache_path("").parent
    files = sorted(folder.glob("*.safetensors"))
    for path in files:
        yield _rotation_file(path, f"delete {path} if the model is not served any more")
    if not files:
        yield Finding("rotation files", "ok", f"none in the user cache, {folder}")


def _rotation_file(path: Path, fix: str = "") -> Finding:
    try:
        made = rotations.read_rotation(path).metadata
    except RotationError as error:
        return Finding("rotation file", "error", str(error), fix)
    return Finding("rotation file", "ok", f"{path}: {made.model}, fingerprint {made.fingerprint or 'of no model'}")


def _rotation_of(model: str) -> Finding:
    """As an engine would find it; formats that need none are served without."""
    from transformers import AutoConfig

    from vllm_kvcompress.capacity.geometry import geometry_of
    from vllm_kvcompress.sliding import full_attention_layers

    folder = rotations.model_folder(model)
    if folder is None:
        return Finding("model", "error", f"{model} is not on this machine", "download it, or give its folder")
    try:
        path = rotations.find_rotation(model, folder, load_settings({}).rotation)
    except RotationError as error:
        return Finding("model", "warning", f"formats that are calibrated cannot be served: {error}")
    except KVCompressError as error:
        return Finding("model", "error", str(error))
    try:
        config = AutoConfig.from_pretrained(folder).get_text_config()
        geometry = geometry_of(config)
        rotations.check_fits(
            rotations.read_rotation(path),
            fingerprint=rotations.model_fingerprint(folder),
            layer_ids=full_attention_layers(config, config.num_hidden_layers),
            num_kv_heads=geometry.num_kv_heads,
            head_dim=geometry.head_dim,
            path=path,
        )
    except RotationError as error:
        return Finding("model", "error", str(error))
    except (OSError, ValueError, AttributeError) as error:
        return Finding("model", "error", f"{folder} holds no configuration that can be read: {error}")
    return Finding("model", "ok", f"{model} is served with {path}")
