# SPDX-License-Identifier: Apache-2.0
"""RotationZoo .pt files (OSCAR's published rotations), v1 shared per layer and v2 per KV head, to a RotationSet.

    {"format_version": 1 | 2, "objective": str, "source_grouping": str,
     "layers": {layer id (int or str): {"layer_id": int, "rotation": [D, D] or [H, D, D], "k_mean": [D] or [H, D]}}}

The version number does not say the shape reliably, so `rotation.dim()` decides. Files are pickles: they are opened with
`weights_only=True` and nothing else.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vllm_kvcompress.errors import RotationError
from vllm_kvcompress.rotations.file import check_values
from vllm_kvcompress.rotations.schema import LayerRotation, RotationMetadata, RotationSet

_HELP = "Download the file again, or make rotations of your own with: kvcompress calibrate MODEL"
_NON_ORTHOGONAL = {"q_rotation": "key", "o_rotation": "value"}
PUBLISHED_CLIP_K = 0.96
PUBLISHED_CLIP_V = 0.92


def _load(path: Path) -> dict[str, Any]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise RotationError(f"there is no file {path}") from None
    except pickle.UnpicklingError:
        raise RotationError(
            f"{path} was not opened: it is damaged, or holds objects other than tensors, which could run code. {_HELP}"
        ) from None
    except Exception as error:  # unpickling damaged bytes raises almost anything
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise RotationError(f"{path} is not a readable .pt file: {reason}. {_HELP}") from None
    if not isinstance(found, Mapping) or not isinstance(found.get("layers"), Mapping) or not found["layers"]:
        raise RotationError(f"{path} is not a RotationZoo file: it has no table 'layers'. {_HELP}")
    return dict(found)


def _version(content: dict[str, Any], path: Path) -> int:
    version = content.get("format_version", 1)
    if version not in (1, 2):
        raise RotationError(f"{path} has format_version {version!r}; versions 1 and 2 are known")
    return int(version)


def _layers(content: dict[str, Any], path: Path) -> dict[int, Mapping[str, Any]]:
    found: dict[int, Mapping[str, Any]] = {}
    for key, entry in content["layers"].items():
        try:
            layer_id = int(key)
        except (TypeError, ValueError):
            raise RotationError(f"{path}: layer key {key!r} is not a layer number. {_HELP}") from None
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


def _per_head(tensor: torch.Tensor, dims: int, heads: int, what: str) -> torch.Tensor:
    """[...] shared or [H, ...] per head -> [H, ...] float32, `dims` being the dimensions of one head's share."""
    if not tensor.is_floating_point():
        raise RotationError(f"{what} is {tensor.dtype}, not floating point. {_HELP}")
    if tensor.dim() == dims:
        tensor = tensor.expand(heads, *tensor.shape)
    if tensor.dim() != dims + 1:
        raise RotationError(
            f"{what} has shape {list(tensor.shape)}; one per layer or one per KV head is known. {_HELP}"
        )
    if tensor.shape[0] != heads:
        raise RotationError(f"{what} has {tensor.shape[0]} heads; the model has {heads} KV heads")
    return tensor.float().contiguous()


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
            rotation = _per_head(entry["rotation"], 2, num_kv_heads, what)
            if rotation.shape[-2:] != (head_dim, head_dim):
                raise RotationError(f"{what} is {list(rotation.shape[-2:])}; the model's head size is {head_dim}")
            rotations[name] = rotation
        mean = k_layers[layer_id].get("k_mean")
        k_mean = torch.zeros(num_kv_heads, head_dim)
        if isinstance(mean, torch.Tensor):
            k_mean = _per_head(mean, 1, num_kv_heads, f"{k_path}: layer {layer_id}: k_mean")
            if k_mean.shape[-1] != head_dim:
                raise RotationError(
                    f"{k_path}: layer {layer_id}: k_mean has {k_mean.shape[-1]} channels, not {head_dim}"
                )
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
        data=f"{k_path.name}, {v_path.name}",
        recipe={"keys": str(k_content.get("objective", "")), "values": str(v_content.get("objective", ""))},
        source=f"rotation-zoo v{version}",
    )
    return RotationSet(metadata, layers)
