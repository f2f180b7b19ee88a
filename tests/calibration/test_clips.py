# SPDX-License-Identifier: Apache-2.0
"""Clips are those with the least error of the attention output."""

import torch

from vllm_kvcompress.calibration.clips import GRID, ClipErrors, Windows
from vllm_kvcompress.calibration.tap import Heads
from vllm_kvcompress.quantizers import affine
from vllm_kvcompress.rotations import LayerRotation


def rotation(dim: int = 64) -> LayerRotation:
    turn = torch.linalg.qr(torch.randn(2, 2, dim, dim, dtype=torch.float64))[0].float()
    return LayerRotation(turn[0], turn[1], torch.zeros(2, dim), torch.ones(2), torch.ones(2))


def heads(length: int = 200) -> Heads:
    return Heads(0, torch.randn(4, length, 64), torch.randn(2, length, 64), torch.randn(2, length, 64), 0.2, None, None)


def test_errors_against_a_plain_loop():
    layer, sample = rotation(), heads()
    errors = ClipErrors({0: layer}, Windows(8, 50), grid=(1.0, 0.8))
    errors(sample)
    found_k, found_v = errors.mean(0)
    length, windows = 200, Windows(8, 50)
    positions = torch.linspace(58, length - 1, 96).long().tolist()
    for index, clip in enumerate((1.0, 0.8)):
        for head in range(2):
            key, value = (sample.key[head] @ layer.k_rotation[head]), (sample.value[head] @ layer.v_rotation[head])
            mean = torch.cat(
                [key[i : i + 128].mean(0, keepdim=True).expand(len(key[i : i + 128]), -1) for i in (0, 128)]
            )
            mean = mean.half().float()
            read_k = affine.dequantize(*affine.quantize((key - mean).unsqueeze(1), clip)).squeeze(1) + mean
            read_v = affine.dequantize(*affine.quantize(value.unsqueeze(1), clip)).squeeze(1)
            lost_k = lost_v = norm = 0.0
            for query_head in (2 * head, 2 * head + 1):
                for i in positions:
                    query = sample.query[query_head, i] @ layer.k_rotation[head]
                    tokens = torch.arange(i + 1)
                    far = (tokens >= windows.sinks) & (tokens <= i - windows.recent)
                    exact = (key[: i + 1] @ query) * 0.2
                    rough = torch.where(far, (read_k[: i + 1] @ query) * 0.2, exact)
                    out = exact.softmax(-1) @ value[: i + 1]
                    norm += float(out.double().square().sum())
                    lost_k += float((rough.softmax(-1) @ value[: i + 1] - out).double().square().sum())
                    difference = (exact.softmax(-1) * far) @ (read_v - value)[: i + 1]
                    lost_v += float(difference.double().square().sum())
            # Differences of float32 outputs that agree to 2^-20 or so, of errors near a tenth of them; a code at a
            # threshold may fall either way and changes one token of 200.
            assert abs(float(found_k[index, head]) - lost_k / norm) <= 0.02 * lost_k / norm
            assert abs(float(found_v[index, head]) - lost_v / norm) <= 0.02 * lost_v / norm


def test_short_sequences_still_quantise():
    errors = ClipErrors({0: rotation()}, Windows(32, 128))
    errors(heads(20))
    for error in errors.mean(0):
        assert (error > 0).all() and torch.isfinite(error).all()


def test_each_head_gets_its_own_clip():
    layer = rotation()
    errors = ClipErrors({0: layer}, Windows(8, 50))
    for _ in range(3):
        errors(heads())
    # A head whose errors are least at 0.65 by far, and one for which min-max is: neither follows the other.
    errors.keys[0][:] = 1.0
    errors.keys[0][GRID.index(0.65), 0] = 1e-4
    errors.keys[0][GRID.index(1.0), 1] = 1e-4
    k_clip, v_clip = errors.best()[0]
    assert torch.allclose(k_clip, torch.tensor([0.65, 1.0]))
    assert k_clip.dtype == v_clip.dtype == torch.float32
    assert ((v_clip > 0) & (v_clip <= 1)).all()


def test_a_head_without_signal_follows_the_model():
    errors = ClipErrors({0: rotation(), 1: rotation()}, Windows(8, 50))
    for layer_id in (0, 1):
        errors(Heads(layer_id, *(getattr(heads(), name) for name in ("query", "key", "value")), 0.2, None, None))
        errors.keys[layer_id][:] = 1.0
    errors.keys[1][GRID.index(0.8)] = 0.5
    assert torch.allclose(errors.best()[0][0], torch.tensor([0.8, 0.8]))
