# SPDX-License-Identifier: Apache-2.0
"""Merging of two partial attentions against float64."""

import math

import pytest
import torch

from vllm_kvcompress.formats.base import SUPPORTED_HEAD_DIMS
from vllm_kvcompress.triton_kernels.merge import merge_states

INF = math.inf


def rotations(heads, dim):
    """[H, D, D] float16, nearly orthogonal."""
    return torch.linalg.qr(torch.randn(heads, dim, dim))[0].half().contiguous()


def expected(exact_out, exact_lse, history_out, history_lse, unrotation):
    """[T, Hq, D] float64; infinite LSEs count as nothing."""
    history = history_out.double()
    if unrotation is not None:
        group = history.shape[1] // unrotation.shape[0]
        matrices = unrotation.double().repeat_interleave(group, dim=0)
        history = torch.einsum("thd,hde->the", history, matrices)
    lse = torch.stack((exact_lse, history_lse)).double()
    lse = lse.masked_fill(lse.isinf(), -INF)
    weights = lse.softmax(dim=0).nan_to_num(0).transpose(1, 2).unsqueeze(-1)
    parts = torch.stack((exact_out.double(), history)) * weights
    return parts.masked_fill(weights == 0, 0).sum(dim=0)


def check(device, states, unrotation, dtype, out=None):
    want = expected(*states, unrotation)
    moved = [x.to(device) for x in states]
    out = torch.full(states[0].shape, torch.nan, dtype=dtype, device=device) if out is None else moved[0]
    merge_states(out, *moved, None if unrotation is None else unrotation.to(device))
    error = (out.cpu().double() - want).abs()
    # Of D products, each at most 4 * 4 here, the float32 sum is off by 2^-23 each at worst (a tensor core truncates);
    # weights by 2^-18, for they are exponentials of differences up to 2^5 in float32; and the output is rounded, which
    # Triton's interpreter does by truncation where it is bfloat16.
    rounding = torch.finfo(dtype).eps / (1 if dtype == torch.bfloat16 and device.type == "cpu" else 2)
    bound = want.abs() * (rounding + 2**-18) + 2**-18 + 16 * out.shape[2] * 2.0**-23
    assert (error <= bound).all(), (error - bound).max()


def random_states(tokens, heads, dim, dtype):
    exact, history = torch.randn(2, tokens, heads, dim)
    exact_lse, history_lse = torch.randn(2, heads, tokens) * 4
    return [exact.to(dtype), exact_lse, history.half(), history_lse]


@pytest.mark.parametrize("dim", SUPPORTED_HEAD_DIMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_matches_reference(device, dtype, dim):
    check(device, random_states(70, 2, dim, dtype), rotations(1, dim), dtype)


@pytest.mark.parametrize("group", [1, 2, 3, 4, 6, 7, 8, 9, 16])
def test_groups(device, group):
    check(device, random_states(5, 2 * group, 64, torch.bfloat16), rotations(2, 64), torch.bfloat16)


@pytest.mark.parametrize("dim", [64, 96])
def test_without_rotation(device, dim):
    check(device, random_states(65, 3, dim, torch.float32), None, torch.float32)


@pytest.mark.parametrize("rotated", [False, True])
def test_empty_sides(device, rotated):
    """Whatever an empty side left in its output, NaN here, is not read."""
    states = random_states(9, 2, 64, torch.float32)
    exact, exact_lse, history, history_lse = states
    for token, (a, b) in enumerate([(INF, 0), (-INF, 0), (0, INF), (0, -INF), (INF, INF), (-INF, -INF), (INF, -INF)]):
        exact_lse[:, token] += a
        history_lse[:, token] += b
        if a:
            exact[token] = torch.nan
        if b:
            history[token] = torch.nan
    unrotation = rotations(2, 64) if rotated else None
    want = expected(*states, unrotation)
    assert torch.isfinite(want).all() and (want[4:7] == 0).all()
    check(device, states, unrotation, torch.float32)


def test_far_apart(device):
    """One side outweighs the other beyond float32."""
    states = random_states(6, 2, 64, torch.float32)
    states[1][:, :3] += 1e4
    states[3][:, 3:] += 1e4
    check(device, states, rotations(1, 64), torch.float32)


def test_in_place_and_strided(device):
    """out may be exact_out; LSEs as slices of larger ones."""
    states = random_states(20, 4, 64, torch.bfloat16)
    for i in (1, 3):
        states[i] = torch.cat((states[i], torch.full((4, 7), torch.nan)), dim=1)[:, :20]
    check(device, states, rotations(2, 64), torch.bfloat16, out="in place")


def test_nan_stays_visible(device):
    states = [x.to(device) for x in random_states(4, 1, 64, torch.float32)]
    states[1][0, 0] = torch.nan
    states[3][0, 1] = torch.nan
    states[0][2, 0, 5] = torch.nan
    states[2][3, 0, 7] = torch.nan
    out = torch.zeros(4, 1, 64, device=device)
    merge_states(out, *states, rotations(1, 64).to(device))
    assert out[[0, 1, 3]].isnan().all()
    assert out[2].isnan().sum() == 1


def test_refusals(device):
    states = random_states(4, 4, 64, torch.float32)
    out = torch.empty(4, 4, 64)
    with pytest.raises(ValueError, match="rotations are contiguous float16"):
        merge_states(out, *states, rotations(2, 64).float())
    with pytest.raises(ValueError, match="with contiguous heads"):
        merge_states(out, *states, rotations(3, 64))
    with pytest.raises(ValueError, match="LSEs must be float32"):
        merge_states(out, states[0], states[1][:, 1:], *states[2:], rotations(2, 64))
    with pytest.raises(ValueError, match="history_out must be float16"):
        merge_states(out, *states[:2], states[2].float(), states[3], rotations(2, 64))
