# SPDX-License-Identifier: Apache-2.0
"""Where a model's rotation file lies, and what tells one model's weights from another's."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from pathlib import Path
from typing import Any

from vllm_kvcompress.errors import KVCompressError, RotationError
from vllm_kvcompress.weight_files import SINGLE_FILE, read_index

ROTATION_BESIDE_MODEL = "kvcompress/rotation.safetensors"
"""In a sub-folder of the model: vLLM loads every *.safetensors lying directly in the model folder as weights."""

_GEOMETRY_KEYS = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
)
_SAMPLES_PER_FILE = 256
_SAMPLE_BYTES = 512
_MAX_HEADER_BYTES = 256 << 20


def _geometry(folder: Path) -> dict[str, Any]:
    """The fields of config.json that shape attention, its nested text_config included."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it is not a table")
    except FileNotFoundError:
        return {}  # a lone GGUF file carries its geometry in its own header
    except (OSError, ValueError, RecursionError) as error:
        raise RotationError(f"{folder / 'config.json'} cannot be read: {error}") from None
    found = {key: config[key] for key in _GEOMETRY_KEYS if key in config}
    inner = config.get("text_config")
    if isinstance(inner, dict):
        found |= {f"text_config.{key}": inner[key] for key in _GEOMETRY_KEYS if key in inner}
    return found


def _weight_files(folder: Path) -> list[Path]:
    """The weight files: of safetensors those the index names, so that spare copies of the weights change nothing."""
    try:
        index = read_index(folder)
    except KVCompressError as error:
        raise RotationError(str(error)) from None
    if index is not None and (found := [path for path in index.files if os.path.isfile(path)]):
        return found
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    for pattern in ("*.safetensors", "*.bin", "*.gguf"):
        if found := [path for path in folder.glob(pattern) if path.is_file()]:
            return found
    return []


def _sample_offsets(path: Path, size: int, head: bytes) -> list[int]:
    """Where to sample: in the middle of tensors where the header tells where they lie, else evenly spaced."""
    if path.suffix == ".safetensors" and len(head) == 8:
        length = struct.unpack("<Q", head)[0]
        if length <= min(_MAX_HEADER_BYTES, size):
            try:
                with path.open("rb") as file:
                    file.seek(8)
                    header = json.loads(file.read(length))
                spans = sorted(tensor["data_offsets"] for name, tensor in header.items() if name != "__metadata__")
                # A fine-tune may touch few tensors, so tensors are sampled rather than places in the file.
                stride = -(-len(spans) // _SAMPLES_PER_FILE) or 1
                found = [8 + length + (begin + end) // 2 for begin, end in spans[::stride]]
                if all(isinstance(offset, int) and 0 <= offset < size for offset in found):
                    return found
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                pass  # not a safetensors header after all: sample evenly
    return [size * i // _SAMPLES_PER_FILE for i in range(_SAMPLES_PER_FILE)]


def _file_digest(path: Path) -> bytes:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb", buffering=0) as file:
        head = file.read(8)
        digest.update(head)
        digest.update(file.read(1 << 16))
        for offset in _sample_offsets(path, size, head):
            file.seek(offset)
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.digest()


def model_fingerprint(folder: Path) -> str:
    """32 hex digits that differ between models and between fine-tunes of one model, without reading whole weights.

    sha256 over the geometry in config.json and, of each weight file, its size, the start of its header and some
    samples of its tensors. File names do not enter, nor do files that are not weights.

    Raises:
        RotationError: no weights in the folder, or unreadable ones, or an unreadable config.json.
    """
    folder = Path(folder)
    files = _weight_files(folder)
    if not files:
        raise RotationError(f"{folder} holds no weights (*.safetensors, *.bin or *.gguf)")
    digest = hashlib.sha256(json.dumps(_geometry(folder), sort_keys=True).encode())
    try:
        parts = sorted(_file_digest(path) for path in files)
    except OSError as error:
        raise RotationError(f"the weights in {folder} cannot be read: {error}") from None
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:32]


def model_folder(model: str, revision: str | None = None, download_dir: str | None = None) -> Path | None:
    """The model's local folder; a hub id is looked up in the local cache only. None when it is not on this machine.

    Args:
        model: folder, GGUF file, or hub id.
        download_dir: the hub cache's folder where it is not the default one (vLLM's --download-dir).
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        return path.parent
    from huggingface_hub import snapshot_download

    # Many exception types, among them network ones in offline mode, all say the same: it is not here.
    try:
        return Path(snapshot_download(model, revision=revision, cache_dir=download_dir, local_files_only=True))
    except Exception:
        return None


def user_cache_path(fingerprint: str) -> Path:
    """The user's rotation file for these weights: $VLLM_KVCOMPRESS_CACHE, else the XDG cache folder."""
    own = os.environ.get("VLLM_KVCOMPRESS_CACHE")
    if own:
        base = Path(own).expanduser()
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "vllm-kvcompress"
    return base / f"{fingerprint}.safetensors"


def find_rotation(model: str, folder: Path | None, explicit: str | Path | None) -> Path:
    """The rotation file to serve with: the explicit setting, then beside the model, then the user cache.

    Raises:
        RotationError: none there; the message says where it was looked for and how to make one.
    """
    if explicit is not None:
        path = Path(explicit).expanduser()
        if not path.is_file():
            raise RotationError(
                f"the rotation file that was asked for does not exist: {path}. "
                f"Make it with: kvcompress calibrate {model} --out {path}"
            )
        return path
    looked: list[str] = []
    if folder is not None:
        beside = folder / ROTATION_BESIDE_MODEL
        if beside.is_file():
            return beside
        looked.append(str(beside))
        try:
            cached = user_cache_path(model_fingerprint(folder))
        except RotationError as error:
            looked.append(f"the user cache ({error})")
        else:
            if cached.is_file():
                return cached
            looked.append(str(cached))
    else:
        looked.append(f"the local copy of {model} (not downloaded yet)")
    raise RotationError(
        f"{model} has no rotation file; looked for {', '.join(looked)}. Make one with: kvcompress calibrate {model}"
    )


def find_optional_rotation(model: str, folder: Path | None, explicit: str | Path | None) -> Path | None:
    """As `find_rotation`, but None where no file was asked for and none is there.

    Raises:
        RotationError: the file that was asked for does not exist.
    """
    try:
        return find_rotation(model, folder, explicit)
    except RotationError:
        if explicit is not None:
            raise
        return None


def default_output(model: str, folder: Path) -> Path:
    """Where calibration writes: beside a writable local model folder, else the user cache."""
    is_local = Path(model).expanduser().exists()
    if is_local and os.access(folder, os.W_OK):
        return folder / ROTATION_BESIDE_MODEL
    return user_cache_path(model_fingerprint(folder))
