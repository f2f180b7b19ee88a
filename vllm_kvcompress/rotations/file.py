# SPDX-License-Identifier: Apache-2.0
"""Rotation files on disk: one safetensors file, read with suspicion and written atomically.

Five float32 tensors whose first dimension runs over `metadata.layer_ids`:
    k_rotation, v_rotation [L, H, D, D]    k_mean [L, H, D]    k_clip, v_clip [L, H]
The header's string map holds `format` (the magic word), `metadata` (JSON of RotationMetadata) and `sha256`, over that
JSON and the tensors' bytes in the order above. A flipped bit would otherwise be a silent loss of accuracy.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import stat
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save

from vllm_kvcompress.errors import RotationError
from vllm_kvcompress.rotations.schema import SCHEMA_VERSION, LayerRotation, RotationMetadata, RotationSet

MAGIC = "kvcompress-rotation"
_TENSORS = ("k_rotation", "v_rotation", "k_mean", "k_clip", "v_clip")
_MAX_HEADER_BYTES = 16 << 20
"""The channels' order of 100 layers of 16 heads of 512 takes 8 MiB."""
_MAX_TENSOR_BYTES = 4 << 30
"""128 layers of 16 heads of 512 x 512, keys and values; a header that asks for more is not one of ours."""
ORTHOGONALITY_TOLERANCE = 1e-3


def _advice(model: str = "MODEL") -> str:
    return f"Make a new one with: kvcompress calibrate {model or 'MODEL'}"


def _shapes(metadata: RotationMetadata) -> dict[str, tuple[int, ...]]:
    layers, heads, dim = len(metadata.layer_ids), metadata.num_kv_heads, metadata.head_dim
    return {
        "k_rotation": (layers, heads, dim, dim),
        "v_rotation": (layers, heads, dim, dim),
        "k_mean": (layers, heads, dim),
        "k_clip": (layers, heads),
        "v_clip": (layers, heads),
    }


def _digest(metadata_json: str, tensors: dict[str, torch.Tensor]) -> str:
    found = hashlib.sha256(metadata_json.encode())
    for name in _TENSORS:
        found.update(tensors[name].contiguous().numpy().data)
    return found.hexdigest()


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The file, opened once for all that is read of it: others may replace it under its name meanwhile."""
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):  # opening a pipe would wait for a writer
            kind = "folder" if stat.S_ISDIR(mode) else "pipe or device"
            raise RotationError(f"{path} is a {kind}, not a rotation file. {_advice()}")
        with path.open("rb") as file:
            yield file
    except FileNotFoundError:
        raise RotationError(f"there is no rotation file at {path}. {_advice()}") from None
    except OSError as error:
        raise RotationError(f"{path} cannot be read: {error.strerror or error}") from None


def _read_header(path: Path, file: BinaryIO) -> dict[str, Any]:
    """The safetensors header, parsed; every fault of a foreign or damaged file is a RotationError."""
    size = os.fstat(file.fileno()).st_size
    prefix = file.read(8)
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
    if not 2 <= length <= min(_MAX_HEADER_BYTES, size - 8):
        raise RotationError(f"{path} is no rotation file ({size} bytes, not safetensors). {_advice()}")
    try:
        header = json.loads(file.read(length).decode("utf-8"))
    except (ValueError, RecursionError):  # json raises a plain ValueError at numbers of thousands of digits
        raise RotationError(f"{path} is damaged: its safetensors header is not JSON. {_advice()}") from None
    if not isinstance(header, dict):
        raise RotationError(f"{path} is damaged: its safetensors header is not a table. {_advice()}")
    return header


def _parse_metadata(path: Path, file: BinaryIO) -> tuple[RotationMetadata, str, str]:
    """Validated metadata, its JSON as stored, and the stored checksum."""
    strings = _read_header(path, file).get("__metadata__")
    if not isinstance(strings, dict) or strings.get("format") != MAGIC:
        raise RotationError(
            f"{path} is a safetensors file but no rotation file of vllm-kvcompress. {_advice()}. "
            "RotationZoo .pt files are read by: kvcompress import-zoo K.pt V.pt --model MODEL"
        )
    text, checksum = strings.get("metadata"), strings.get("sha256")
    if not isinstance(text, str) or not isinstance(checksum, str):
        raise RotationError(f"{path} is damaged: its header lacks the metadata or the checksum. {_advice()}")
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError):
        raise RotationError(f"{path} is damaged: its metadata is not JSON. {_advice()}") from None
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version != SCHEMA_VERSION:
        shown = version if version is None or (isinstance(version, int) and 0 <= version < 1000) else "of another kind"
        raise RotationError(
            f"{path} has schema version {shown}; this release of vllm-kvcompress reads version {SCHEMA_VERSION}. "
            f"Upgrade vllm-kvcompress, or recalibrate. {_advice()}"
        )
    try:
        metadata = RotationMetadata.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise RotationError(f"{path} is damaged: metadata field {where}: {first['msg']}. {_advice()}") from None
    ids = metadata.layer_ids
    if ids != sorted(set(ids)) or ids[0] < 0:
        raise RotationError(f"{path} is damaged: layer ids {ids} are not ascending. {_advice(metadata.model)}")
    if metadata.sensitivity and len(metadata.sensitivity) != len(ids):
        raise RotationError(
            f"{path} is damaged: {len(metadata.sensitivity)} sensitivities for {len(ids)} layers. "
            f"{_advice(metadata.model)}"
        )
    channels = list(range(metadata.head_dim))
    for name in ("k_channels", "v_channels"):
        order = getattr(metadata, name)
        fits = len(order) == len(ids) and all(len(layer) == metadata.num_kv_heads for layer in order)
        if order and not (fits and all(sorted(head) == channels for layer in order for head in layer)):
            raise RotationError(
                f"{path} is damaged: {name} does not order the {len(channels)} channels of {metadata.num_kv_heads} KV "
                f"heads in {len(ids)} layers. {_advice(metadata.model)}"
            )
    return metadata, text, checksum


def read_metadata(path: str | Path) -> RotationMetadata:
    """Metadata alone, without reading the tensors.

    Raises:
        RotationError: missing, foreign or damaged file.
    """
    path = Path(path)
    with _opened(path) as file:
        return _parse_metadata(path, file)[0]


def read_rotation(path: str | Path) -> RotationSet:
    """Read and validate a rotation file.

    Raises:
        RotationError: missing, foreign, truncated or altered file; wrong tensors, shapes or dtypes; values that are not
            finite; matrices that are not orthogonal; clips outside (0, 1].
    """
    path = Path(path)
    with _opened(path) as file:
        metadata, text, checksum = _parse_metadata(path, file)
        shapes = _shapes(metadata)
        needed = sum(4 * torch.Size(shape).numel() for shape in shapes.values())
        size = os.fstat(file.fileno()).st_size
        if size < needed:
            raise RotationError(
                f"{path} is truncated: {size} bytes where its metadata asks for {needed}. {_advice(metadata.model)}"
            )
        if needed > _MAX_TENSOR_BYTES or size - needed > _MAX_HEADER_BYTES + 8:
            raise RotationError(
                f"{path} is no rotation file: {size} bytes, {needed} of them for the tensors of its metadata, at most "
                f"{_MAX_TENSOR_BYTES} and a header are read. {_advice(metadata.model)}"
            )
        file.seek(0)
        # Into memory, not mapped: whoever writes to the file later would change, or end, an engine that serves from it.
        content = file.read()
    try:
        tensors = load(content)
    except (SafetensorError, ValueError, RuntimeError, KeyError) as error:
        raise RotationError(f"{path} is damaged: {error}. {_advice(metadata.model)}") from None
    if tensors.keys() != set(_TENSORS):
        raise RotationError(
            f"{path} is damaged: it holds tensors {sorted(tensors)}, expected {sorted(_TENSORS)}. "
            f"{_advice(metadata.model)}"
        )
    for name, tensor in tensors.items():
        if (tensor.dtype, tuple(tensor.shape)) != (torch.float32, shapes[name]):
            raise RotationError(
                f"{path}: tensor {name} is {tensor.dtype} {list(tensor.shape)}, expected torch.float32 "
                f"{list(shapes[name])} (layers, KV heads, head size). {_advice(metadata.model)}"
            )
    if _digest(text, tensors) != checksum:
        raise RotationError(f"{path} is damaged: its checksum does not match its content. {_advice(metadata.model)}")
    layers = {
        layer_id: LayerRotation(**{name: tensors[name][index] for name in _TENSORS})
        for index, layer_id in enumerate(metadata.layer_ids)
    }
    for layer_id, layer in layers.items():
        check_values(layer, layer_id, str(path), _advice(metadata.model))
    return RotationSet(metadata, layers)


def check_values(layer: LayerRotation, layer_id: int, path: str, advice: str) -> None:
    for name in _TENSORS:
        bad = ~torch.isfinite(getattr(layer, name))
        if bad.any():
            raise RotationError(
                f"{path}: layer {layer_id}: {name} holds {int(bad.sum())} NaN or infinite values. {advice}"
            )
    for name in ("k_rotation", "v_rotation"):
        rotation = getattr(layer, name).double()
        error = (rotation.mT @ rotation - torch.eye(rotation.shape[-1], dtype=torch.float64)).abs().amax(dim=(-2, -1))
        if error.max() > ORTHOGONALITY_TOLERANCE:
            raise RotationError(
                f"{path}: layer {layer_id}, KV head {int(error.argmax())}: {name} is not orthogonal "
                f"(max |R^T R - I| = {float(error.max()):.3g}, allowed {ORTHOGONALITY_TOLERANCE:g}). {advice}"
            )
    for name in ("k_clip", "v_clip"):
        clip = getattr(layer, name)
        if (clip <= 0).any() or (clip > 1).any():
            raise RotationError(f"{path}: layer {layer_id}: {name} {clip.tolist()} is not within (0, 1]. {advice}")


def check_fits(
    rotation: RotationSet,
    *,
    fingerprint: str | None,
    layer_ids: Iterable[int],
    num_kv_heads: int,
    head_dim: int,
    path: str | Path,
) -> None:
    """Refuse a rotation that was made for another model.

    Args:
        fingerprint: of the weights being served; None when unknown (then geometry alone decides).
        layer_ids: attention layers that will read the rotation.
        num_kv_heads: of the whole model, before tensor parallelism divides it.
        path: the file's, for the message.

    Raises:
        RotationError: other weights, other geometry, or layers without a rotation.
    """
    made = rotation.metadata
    if (made.num_kv_heads, made.head_dim) != (num_kv_heads, head_dim):
        raise RotationError(
            f"{path} was made for {made.num_kv_heads} KV heads of size {made.head_dim} ({made.model}); this model has "
            f"{num_kv_heads} of size {head_dim}. {_advice()}"
        )
    missing = sorted(set(layer_ids) - set(rotation.layers))
    if missing:
        raise RotationError(
            f"{path} has no rotation for layer {', '.join(map(str, missing[:8]))}{' ...' if missing[8:] else ''} "
            f"of this model (it has {len(rotation.layers)} layers of {made.model}). {_advice()}"
        )
    if fingerprint is not None and made.fingerprint and made.fingerprint != fingerprint:
        raise RotationError(
            f"{path} was calibrated on other weights ({made.model}, fingerprint {made.fingerprint}; this model's is "
            f"{fingerprint}). A fine-tune needs a calibration of its own. {_advice()}"
        )


def write_rotation(path: str | Path, rotation_set: RotationSet) -> None:
    """Write atomically: a reader sees the old file or the whole new one, of one of the writers. Makes parent folders.

    Raises:
        RotationError: the set would not pass `read_rotation`, the folder cannot be written or the disk is full. What
            was at `path` is there still.
    """
    path = Path(path)
    metadata = rotation_set.metadata
    if sorted(rotation_set.layers) != metadata.layer_ids:
        raise RotationError(f"layers {sorted(rotation_set.layers)} do not match the metadata's {metadata.layer_ids}")
    shapes = _shapes(metadata)
    for layer_id, layer in rotation_set.layers.items():
        for name in _TENSORS:
            if tuple(getattr(layer, name).shape) != shapes[name][1:]:
                raise RotationError(
                    f"layer {layer_id}: {name} is {list(getattr(layer, name).shape)}, expected {list(shapes[name][1:])}"
                )
        check_values(layer, layer_id, str(path), "The rotation was not written.")
    tensors = {
        name: torch.stack(
            [getattr(rotation_set.layers[i], name).float().cpu() for i in metadata.layer_ids]
        ).contiguous()
        for name in _TENSORS
    }
    text = metadata.model_dump_json()
    if len(json.dumps(text)) > _MAX_HEADER_BYTES // 2:
        raise RotationError(f"{path} was not written: its metadata of {len(text)} bytes is too large to be read again")
    strings = {"format": MAGIC, "metadata": text, "sha256": _digest(text, tensors)}
    temporary = None
    try:
        temporary = _temporary(path)
        with temporary.open("wb") as file:
            file.write(save(tensors, metadata=strings))
            file.flush()
            os.fsync(file.fileno())  # or a power cut could leave an empty file under the name
        os.replace(temporary, path)
    except OSError as error:
        raise _unwritable(path, error) from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Refuse before the work is done what `write_rotation` would refuse after it.

    Raises:
        RotationError: no file can be made in the folder.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        _temporary(path).unlink()
    except OSError as error:
        raise _unwritable(path, error) from None


def _temporary(path: Path) -> Path:
    """An empty file beside `path`, whose folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    # Not tempfile's, which are private: the engine may run as another user.
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    return temporary


def _unwritable(path: Path, error: OSError) -> RotationError:
    return RotationError(f"cannot write {path}: {error.strerror or error}. Choose another place with --out")
