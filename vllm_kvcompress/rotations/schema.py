# SPDX-License-Identifier: Apache-2.0
"""What a rotation file holds, as types.

Cache space of one layer and KV head, rows being tokens:
    K' = (K - k_mean) @ k_rotation    q' = q @ k_rotation    V' = V @ v_rotation    output = output' @ v_rotation^T
K and q are taken after RoPE. Subtracting k_mean shifts every score of a query equally, which softmax does not see.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class LayerRotation:
    """One attention layer; H is its number of KV heads, D its head size. Everything float32 on the CPU."""

    k_rotation: torch.Tensor
    """[H, D, D], orthogonal"""
    v_rotation: torch.Tensor
    """[H, D, D], orthogonal"""
    k_mean: torch.Tensor
    """[H, D], mean of the keys after RoPE, before rotation; zeros where keys are not centred"""
    k_clip: torch.Tensor
    """[H] in (0, 1]: the quantiser's clip of `quantizers.affine.quantize`"""
    v_clip: torch.Tensor
    """[H] in (0, 1]"""


class RotationMetadata(BaseModel):
    """What the rotations were made for and from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int = SCHEMA_VERSION
    model: str
    """Model name as typed when the file was made; for people, nothing is decided by it."""
    fingerprint: str
    """`model_fingerprint` of the weights, or "" for a file that serves any model of its geometry."""
    model_type: str = ""
    layer_ids: list[int] = Field(min_length=1, max_length=4096)
    """Ids of the attention layers, ascending; sparse on hybrid models."""
    num_kv_heads: int = Field(ge=1, le=1024)
    num_query_heads: int = Field(ge=1, le=4096)
    head_dim: int = Field(ge=1, le=1024)
    data: str = ""
    """Calibration text: a file name, or what it was generated from."""
    tokens: int = Field(default=0, ge=0)
    seed: int = 0
    versions: dict[str, str] = Field(default_factory=dict)
    recipe: dict[str, Any] = Field(default_factory=dict)
    """Settings of the calibration, JSON values only."""
    source: str
    """"calibrate", "rotation-zoo v1" or "rotation-zoo v2"."""
    sensitivity: list[FiniteFloat] = Field(default_factory=list)
    """Per layer of `layer_ids`: 1 - mean cosine of its keys with and without distant context; empty if not measured."""
    k_channels: list[list[list[int]]] = Field(default_factory=list)
    """[L][H][D]: channels of the keys, before rotation, by falling energy about their mean; empty if not measured."""
    v_channels: list[list[list[int]]] = Field(default_factory=list)
    """[L][H][D]: channels of the values by falling energy, weighted by the attention they receive"""


@dataclass
class RotationSet:
    """A rotation file in memory."""

    metadata: RotationMetadata
    layers: dict[int, LayerRotation] = field(default_factory=dict)
    """By layer id; the same ids as `metadata.layer_ids`."""
