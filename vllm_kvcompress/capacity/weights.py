# SPDX-License-Identifier: Apache-2.0
"""A model's configuration and the bytes of its weights, without loading or downloading any."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vllm_kvcompress import rotations
from vllm_kvcompress.errors import KVCompressError
from vllm_kvcompress.weight_files import SINGLE_FILE, read_index

_FLOAT_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_MAX_HEADER_BYTES = 256 << 20
_WAY_OUT = "Say how large they are with --weights SIZE"


def find_config(model: str) -> Path:
    """Folder with the model's config.json; of a hub id, its local copy or else its small files, downloaded.

    Raises:
        KVCompressError: no such folder and no such model, or none that can be reached.
    """
    folder = rotations.model_folder(model)
    if folder is not None and (folder / "config.json").is_file():
        return folder
    if Path(model).expanduser().exists():
        raise KVCompressError(f"{model} holds no config.json; give a Hugging Face model folder or name")
    if model.startswith(("/", ".", "~")):
        raise KVCompressError(f"there is no folder {model}; give a Hugging Face model folder or name")
    from huggingface_hub import snapshot_download

    try:
        # The configuration and the index of the weights, in files of a few kilobytes.
        found = snapshot_download(model, allow_patterns=["*.json"], ignore_patterns=["tokenizer*", "vocab*", "*/*"])
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise KVCompressError(
            f"{model} is neither a folder nor a model on this machine, and cannot be downloaded: {reason}"
        ) from None
    if not (Path(found) / "config.json").is_file():
        raise KVCompressError(f"{model} has no config.json; give a Hugging Face model folder or name")
    return Path(found)


def weight_bytes(model: str, folder: Path, itemsize: int | None) -> int:
    """Bytes of all weights once loaded.

    From the headers of the safetensors files; where those are not here, from the index (as stored, whatever the dtype)
    or, of a hub id, from the headers over the network.

    Args:
        folder: `find_config(model)`.
        itemsize: bytes of an element in the dtype in which floats are loaded; None: as stored (quantised weights).

    Raises:
        KVCompressError: a corrupt file, or nowhere to read it from.
    """
    total, files = _listed(folder)
    if files and all(path.is_file() for path in files):
        return sum(_loaded_bytes(_header(path).values(), itemsize) for path in files)
    if total:
        return total
    if Path(model).expanduser().exists():
        raise KVCompressError(f"{model} holds neither safetensors weights nor their index. {_WAY_OUT}")
    from huggingface_hub import get_safetensors_metadata

    try:
        found = get_safetensors_metadata(model).files_metadata.values()
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise KVCompressError(f"the weights of {model} cannot be looked up: {reason}. {_WAY_OUT}") from None
    return sum(_loaded_bytes((vars(tensor) for tensor in file.tensors.values()), itemsize) for file in found)


def _listed(folder: Path) -> tuple[int | None, list[Path]]:
    """(bytes that the index states, files with the weights, there or not)."""
    try:
        index = read_index(folder)
    except KVCompressError as error:
        raise KVCompressError(f"{error}. {_WAY_OUT}") from None
    if index is not None:
        return index.total_size, index.files
    single = folder / SINGLE_FILE
    return None, [single] if single.is_file() else sorted(folder.glob("*.safetensors"))


def _header(path: Path) -> dict[str, dict[str, Any]]:
    """Dtype, shape and data offsets by name of every tensor in a safetensors file."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > _MAX_HEADER_BYTES:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        if not all({"dtype", "data_offsets"} <= tensor.keys() for tensor in header.values()):
            raise ValueError("a tensor without dtype or offsets")
        return header
    except (OSError, struct.error, ValueError, AttributeError, TypeError) as error:
        raise KVCompressError(f"{path} is not a safetensors file: {error}. {_WAY_OUT}") from None


def _loaded_bytes(tensors: Iterable[dict[str, Any]], itemsize: int | None) -> int:
    total = 0
    for tensor in tensors:
        begin, end = tensor["data_offsets"]
        stored = _FLOAT_BYTES.get(tensor["dtype"])
        total += end - begin if stored is None or itemsize is None else (end - begin) // stored * itemsize
    return total
