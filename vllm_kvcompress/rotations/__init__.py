# SPDX-License-Identifier: Apache-2.0
"""Rotation files: what calibration writes and the engine reads; reader, writer, RotationZoo import."""

from vllm_kvcompress.rotations.file import check_fits, read_metadata, read_rotation, write_rotation
from vllm_kvcompress.rotations.locate import (
    ROTATION_BESIDE_MODEL,
    default_output,
    find_optional_rotation,
    find_rotation,
    model_fingerprint,
    model_folder,
    user_cache_path,
)
from vllm_kvcompress.rotations.schema import LayerRotation, RotationMetadata, RotationSet
from vllm_kvcompress.rotations.zoo import read_zoo

__all__ = [
    "ROTATION_BESIDE_MODEL",
    "LayerRotation",
    "RotationMetadata",
    "RotationSet",
    "check_fits",
    "default_output",
    "find_optional_rotation",
    "find_rotation",
    "model_fingerprint",
    "model_folder",
    "read_metadata",
    "read_rotation",
    "read_zoo",
    "user_cache_path",
    "write_rotation",
]
