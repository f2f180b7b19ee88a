# SPDX-License-Identifier: Apache-2.0
"""RotationZoo .pt files (OSCAR's published rotations), v1 shared per layer and v2 per KV head, to a RotationSet.

    {"format_version": 1 | 2, "objective": str, "source_grouping": str,
     "layers": {layer id (int or str): {"layer_id": int, "rotation": [D, D] or [H, D, D], "k_mean": [D] or [H, D]}}}

The version number does not say the shape reliably, so `rotation.dim()` decides. Files are pickles: they are opened with
`weights_only=True` and nothing else.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vllm_kvcompress.errors import RotationError, printable
from vllm_kvcompress.rotations.file import check_values
from vllm_kvcompress.rotations.schema import LayerRotation, RotationMetadata, RotationSet

_HELP = "Download the file again, or make rotations of your own with: kvcompress calibrate MODEL"
_NON_ORTHOGONAL = {"q_rotation": "key", "o_rotation": "value"}
PUBLISHED_CLIP_K = 0.96
PUBLISHED_CLIP_V = 0.92
_MAX_BYTES = 4 << 30
"""Of a file, unpacked; 128 layers of 16 heads of 512 x 512 in float32 are 2 GiB."""
_MAX_LAYERS = 4096


def _load(path: Path) -> dict[str, Any]:
    if path.exists() and not path.is_file():  # opening a pipe would wait for a writer
        raise RotationError(f"{path} is not a file. {_HELP}")
    try:
        size = path.stat().st_size
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                size = sum(entry.file_size for entry in archive.infolist())
        if size > _MAX_BYTES:
            raise RotationError(f"{path} holds {size} bytes, at most {_MAX_BYTES} are read. {_HELP}")
        found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise RotationError(f"there is no file {path}") from None
    except pickle.UnpicklingError:
        raise RotationError(
            f"{path} was not opened: it is damaged, or holds objects other than tensors, which could run code. {_HELP}"
        ) from None
    except RotationError:
        raise
    except Exception as error:  # unpickling damaged bytes raises almost anything
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise RotationError(f"{path} is not a readable .pt file: {reason}. {_HELP}") from None
    if not isinstance(found, Mapping) or not isinstance(found.get("layers"), Mapping) or not found["layers"]:
        raise RotationError(f"{path} is not a RotationZoo file: it has no table 'layers'. {_HELP}")
    return dict(found)


def _version(content: dict[str, Any], path: Path) -> int:
    version = content.get("format_version", 1)
    if not isinstance(version, int) or version not in (1, 2):
        raise RotationError(f"{path} has format_version {_shown(version)}; versions 1 and 2 are known")
    return int(version)


def _shown(value: Any) -> str:
    """A number or text for a message; of anything else, or longer ones, the type."""
    if isinstance(value, int) and abs(value) < 1 << 64:
        return str(value)
    return repr(value) if isinstance(value, str) and len(value) <= 80 else f"a {type(value).__name__}"


def _layer_number(key: Any) -> int | None:
    """A layer's key as a number, None where it is none."""
    if isinstance(key, str) and key.isascii() and key.isdecimal() and len(key) <= len(str(_MAX_LAYERS)):
        key = int(key)
    return int(key) if isinstance(key, int) and 0 <= key < _MAX_LAYERS else None


def _layers(content: dict[str, Any], path: Path) -> dict[int, Mapping[str, Any]]:
    found: dict[int, Mapping[str, Any]] = {}
    for key, entry in content["layers"].items():
        layer_id = _layer_number(key)
        if layer_id is None:
            raise RotationError(
                f"{path}: layer key {_shown(key)} is not a layer number (0 to {_MAX_LAYERS - 1}). {_HELP}"
            )
        if not isinstance(entry, Mapping) or not isinstance(entry.get("rotation"), torch.Tensor):
            raise RotationError(f"{path}: layer {layer_id} has no tensor 'rotation'. {_HELP}")
        if layer_id in found:
            raise RotationError(f"{path}: layer {layer_id} appears twice. {_HELP}")
        for name, tensor in _NON_ORTHOGONAL.items():
            if entry.get(name) is not None:
                raise RotationError(
                    f"{path}: layer {layer_id} has a '{name}', so its {tensor} basis is not orthogonal. Such bases are "
                    "not supported: their quantisation error grows with the context. Use the file without it, "
                    "or: kvcompress calibrate MODEL"
                )
        found[layer_id] = entry
    return found


def _per_head(tensor: torch.Tensor, dims: int, heads: int, head_dim: int, what: str) -> torch.Tensor:
    """[...] shared or [H, ...] per head -> [H, ...] float32, `dims` dimensions of `head_dim` being one head's share."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or not tensor.is_floating_point():
        raise RotationError(f"{what} is {tensor.dtype} ({tensor.layout}), not floating point and dense. {_HELP}")
    if tensor.dim() == dims:
        tensor = tensor.expand(heads, *tensor.shape)
    if tensor.dim() != dims + 1:
        raise RotationError(
            f"{what} has shape {list(tensor.shape)}; one per layer or one per KV head is known. {_HELP}"
        )
    if tensor.shape[0] != heads:
        raise RotationError(f"{what} has {tensor.shape[0]} heads; the model has {heads} KV heads")
    # Before it is copied: the file of a tensor with strides of 0 is small whatever its shape.
    if tensor.shape[1:] != (head_dim,) * dims:
        raise RotationError(f"{what} is {list(tensor.shape[1:])}; the model's head size is {head_dim}")
    return tensor.detach().float().contiguous()


def _text(value: Any) -> str:
    """A text that JSON and terminals take, of 512 characters; "" of anything else."""
    return printable(value[:512]) if isinstance(value, str) else ""


def read_zoo(
    k_path: str | Path,
    v_path: str | Path,
    *,
    num_kv_heads: int,
    num_query_heads: int,
    head_dim: int,
    model: str = "",
    model_type: str = "",
    layer_ids: list[int] | None = None,
    clip_k: float = PUBLISHED_CLIP_K,
    clip_v: float = PUBLISHED_CLIP_V,
) -> RotationSet:
    """Read a pair of RotationZoo files.

    Args:
        k_path, v_path: rotations of keys and of values.
        num_kv_heads, num_query_heads, head_dim: the model's; shared rotations are repeated for every KV head.
        layer_ids: attention layers the model has; None takes the file's.
        clip_k, clip_v: clips of every layer and head, as the zoo has none; OSCAR's published ones.

    Returns:
        A set with an empty fingerprint: it serves any model of this geometry. Keys are centred only where the file has
        a k_mean.

    Raises:
        RotationError: unreadable or foreign file, pickled code, missing layers, wrong shapes, a basis that is not
            orthogonal, values that are not finite.
    """
    k_path, v_path = Path(k_path), Path(v_path)
    k_content, v_content = _load(k_path), _load(v_path)
    version = max(_version(k_content, k_path), _version(v_content, v_path))
    k_layers, v_layers = _layers(k_content, k_path), _layers(v_content, v_path)
    if k_layers.keys() != v_layers.keys():
        differing = sorted(k_layers.keys() ^ v_layers.keys())
        raise RotationError(f"{k_path} and {v_path} do not belong together: only one of them has layer {differing}")
    wanted = sorted(k_layers) if layer_ids is None else sorted(layer_ids)
    if missing := [i for i in wanted if i not in k_layers]:
        raise RotationError(f"{k_path} has no rotation for layers {missing} of the model (it has {len(k_layers)})")

    layers = {}
    for layer_id in wanted:
        rotations = {}
        for name, path, entry in (("k", k_path, k_layers[layer_id]), ("v", v_path, v_layers[layer_id])):
            what = f"{path}: layer {layer_id}: rotation"
            rotations[name] = _per_head(entry["rotation"], 2, num_kv_heads, head_dim, what)
        mean = k_layers[layer_id].get("k_mean")
        k_mean = torch.zeros(num_kv_heads, head_dim)
        if isinstance(mean, torch.Tensor):
            k_mean = _per_head(mean, 1, num_kv_heads, head_dim, f"{k_path}: layer {layer_id}: k_mean")
        layer = LayerRotation(
            k_rotation=rotations["k"],
            v_rotation=rotations["v"],
            k_mean=k_mean,
            k_clip=torch.full((num_kv_heads,), clip_k),
            v_clip=torch.full((num_kv_heads,), clip_v),
        )
        check_values(layer, layer_id, f"{k_path}, {v_path}", _HELP)
        layers[layer_id] = layer
    metadata = RotationMetadata(
        model=model,
        fingerprint="",
        model_type=model_type,
        layer_ids=wanted,
        num_kv_heads=num_kv_heads,
        num_query_heads=num_query_heads,
        head_dim=head_dim,
        data=_text(f"{k_path.name}, {v_path.name}"),
        recipe={"keys": _text(k_content.get("objective")), "values": _text(v_content.get("objective"))},
        source=f"rotation-zoo v{version}",
    )
    return RotationSet(metadata, layers)
