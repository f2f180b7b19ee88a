# SPDX-License-Identifier: Apache-2.0
"""The passes in order: text -> moments -> rotations -> clips -> sensitivity -> a rotation set."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from tqdm import tqdm

from vllm_kvcompress.calibration import sensitivity
from vllm_kvcompress.calibration.clips import ClipErrors, Windows
from vllm_kvcompress.calibration.model import check_head_dim
from vllm_kvcompress.calibration.statistics import Moments, rotation_of
from vllm_kvcompress.calibration.tap import Listener, full_attention, listening
from vllm_kvcompress.errors import KVCompressError, UnsupportedModelError
from vllm_kvcompress.rotations import LayerRotation, RotationMetadata, RotationSet

WINDOWS = Windows(sinks=32, recent=128)
HELD_BACK = 0.25
"""Share of the sequences kept from the statistics to choose clips on."""


@dataclass
class Calibration:
    """The rotation set and what a report shows of how it came about."""

    rotation: RotationSet
    moments: Moments
    errors: ClipErrors


def calibrate(
    model: Any,
    sequences: Sequence[torch.Tensor],
    *,
    name: str,
    fingerprint: str,
    data: str,
    seed: int,
) -> Calibration:
    """Measure a model.

    Args:
        model: causal LM loaded with the tapped attention (`model.load`).
        sequences: [T] int64 token ids; at least one. With only one, it serves both passes.
        name, fingerprint, data, seed: recorded in the metadata.

    Raises:
        UnsupportedModelError: the attention is not seen, differs in shape between layers, or has an odd head size.
        KVCompressError: the model computes values that are not finite.
    """
    if not sequences:
        raise KVCompressError("there is no text to calibrate on")
    held = max(1, round(len(sequences) * HELD_BACK)) if len(sequences) > 1 else 0
    # Every fourth sequence is held back, so that both parts come from all over the text.
    held_ids = {int((i + 0.5) * len(sequences) / held) for i in range(held)}
    fitted = [ids for i, ids in enumerate(sequences) if i not in held_ids]
    judged = [ids for i, ids in enumerate(sequences) if i in held_ids] or list(sequences)

    moments = Moments()
    _stream(model, fitted, moments, "covariances")
    if not moments.layers:
        raise UnsupportedModelError(
            f"{name} ({type(model).__name__}) does not send its attention through transformers' AttentionInterface, "
            "so it cannot be calibrated"
        )
    num_kv_heads, head_dim = _geometry(moments, name)
    rotations = {}
    for layer_id, layer in sorted(moments.layers.items()):
        if not (torch.isfinite(layer.query).all() and torch.isfinite(layer.value).all()):
            raise KVCompressError(
                f"layer {layer_id} of {name} computes values that are not finite; try --dtype float32 or bfloat16"
            )
        ones = torch.ones(num_kv_heads)
        rotations[layer_id] = LayerRotation(
            k_rotation=rotation_of(layer.query),
            v_rotation=rotation_of(layer.value),
            k_mean=layer.key_mean.float(),
            k_clip=ones,
            v_clip=ones,
        )
    errors = ClipErrors(rotations, WINDOWS)
    _stream(model, judged, errors, "clips")
    for layer_id, (k_clip, v_clip) in errors.best().items():
        rotations[layer_id] = replace(rotations[layer_id], k_clip=k_clip, v_clip=v_clip)
    measured = sensitivity.measure(model, sequences)
    channels = {layer_id: layer.channels_by_energy() for layer_id, layer in moments.layers.items()}
    config = model.config.get_text_config()
    metadata = RotationMetadata(
        model=name,
        fingerprint=fingerprint,
        model_type=config.model_type,
        layer_ids=list(rotations),
        num_kv_heads=num_kv_heads,
        num_query_heads=next(iter(moments.num_query_heads.values())),
        head_dim=head_dim,
        data=data,
        tokens=sum(map(len, sequences)),
        seed=seed,
        versions=_versions(),
        recipe={
            "keys": "query covariance, eigenvectors x Hadamard x bit-reversal, centred",
            "values": "score-weighted covariance, eigenvectors x Hadamard x bit-reversal",
            "clips": "least attention-output error per layer and KV head",
            "sinks": WINDOWS.sinks,
            "recent": WINDOWS.recent,
            "sequence_length": max(map(len, sequences)),
            "held_back_sequences": held,
        },
        source="calibrate",
        sensitivity=[measured[layer_id] for layer_id in rotations],
        k_channels=[channels[layer_id][0] for layer_id in rotations],
        v_channels=[channels[layer_id][1] for layer_id in rotations],
    )
    return Calibration(RotationSet(metadata, rotations), moments, errors)


def _stream(model: Any, sequences: Sequence[torch.Tensor], listener: Listener, title: str) -> None:
    """One forward pass a sequence, without the output head; the listener sees the layers with full attention."""
    device = next(model.parameters()).device
    with (
        torch.inference_mode(),
        listening(full_attention(listener)),
        tqdm(total=sum(map(len, sequences)), desc=title, unit="tok") as bar,
    ):
        for ids in sequences:
            model.base_model(input_ids=ids.unsqueeze(0).to(device), use_cache=False)
            bar.update(len(ids))


def _geometry(moments: Moments, name: str) -> tuple[int, int]:
    shapes = {layer_id: tuple(layer.key_sum.shape) for layer_id, layer in moments.layers.items()}
    if len(set(shapes.values())) > 1 or len(set(moments.num_query_heads.values())) > 1:
        raise UnsupportedModelError(
            f"{name} has attention layers of different shapes (KV heads, head size): {sorted(set(shapes.values()))}; "
            "one shape for all layers is supported"
        )
    num_kv_heads, head_dim = next(iter(shapes.values()))
    check_head_dim(head_dim, name)
    return num_kv_heads, head_dim


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("vllm-kvcompress", "torch", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
