# SPDX-License-Identifier: Apache-2.0
"""Small random rotation sets."""

from collections.abc import Callable

import pytest
import torch

from vllm_kvcompress.rotations import LayerRotation, RotationMetadata, RotationSet

HEADS, DIM, LAYERS = 2, 8, (0, 3)


def orthogonal(*shape: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(*shape, dtype=torch.float64))[0].float()


def channel_order() -> list[list[list[int]]]:
    return [[torch.randperm(DIM).tolist() for _ in range(HEADS)] for _ in LAYERS]


@pytest.fixture
def make_set() -> Callable[..., RotationSet]:
    def make(**changes) -> RotationSet:
        metadata = RotationMetadata(
            **{
                "model": "tiny",
                "fingerprint": "ab" * 16,
                "layer_ids": list(LAYERS),
                "num_kv_heads": HEADS,
                "num_query_heads": 2 * HEADS,
                "head_dim": DIM,
                "source": "calibrate",
                "sensitivity": [0.25, 0.5],
                "k_channels": channel_order(),
                "v_channels": channel_order(),
                **changes,
            }
        )
        layers = {
            layer_id: LayerRotation(
                k_rotation=orthogonal(HEADS, DIM, DIM),
                v_rotation=orthogonal(HEADS, DIM, DIM),
                k_mean=torch.randn(HEADS, DIM),
                k_clip=torch.rand(HEADS) * 0.5 + 0.5,
                v_clip=torch.rand(HEADS) * 0.5 + 0.5,
            )
            for layer_id in metadata.layer_ids
        }
        return RotationSet(metadata, layers)

    return make
