# SPDX-License-Identifier: Apache-2.0
"""Which channels of a layer are outliers: by the calibration file, else by the first tokens stored."""

from types import SimpleNamespace

import pytest
import torch

from vllm_kvcompress.attention import impl
from vllm_kvcompress.formats import get_format
from vllm_kvcompress.formats.base import write_tokens

HEADS, DIM = 2, 64


@pytest.fixture
def layer(monkeypatch):
    """A layer of turboquant-2.5 (16 of 64 channels are outliers) as it is before its weights are processed."""
    made = object.__new__(impl.KVCompressImpl)
    made.head_size, made.num_kv_heads, made.kv_cache_dtype = DIM, HEADS, "turboquant-2.5"
    made._resolved = SimpleNamespace(page_format=get_format("turboquant-2.5"), rotation=None)
    made._vllm_config = SimpleNamespace(device_config=SimpleNamespace(device=torch.device("cpu")))
    made._k_rotation = made._v_rotation = made._k_mean = made._gpu = None
    made._clip_k = made._clip_v = 1.0
    made._chooses_outliers = False
    monkeypatch.setattr(impl, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(impl, "get_tensor_model_parallel_world_size", lambda: 1)
    return made


def outliers(rotation: torch.Tensor) -> list[set[int]]:
    """Of each head: the channels that reach the first 16 of cache space, and nothing else does."""
    first, rest = rotation[..., :16].abs().amax(-1) > 1e-6, rotation[..., 16:].abs().amax(-1) > 1e-6
    assert torch.equal(first, ~rest)
    return [set(head.nonzero().flatten().tolist()) for head in first]


def loud(tokens: int) -> tuple[torch.Tensor, list[set[int]]]:
    x, found = torch.randn(tokens, HEADS, DIM), []
    for head in range(HEADS):
        channels = torch.randperm(DIM)[:16]
        x[:, head, channels] *= 20
        found.append(set(channels.tolist()))
    return x, found


def test_first_tokens_decide(layer):
    layer._load_rotation(0)
    assert layer._chooses_outliers
    key, k_outliers = loud(100)
    value, v_outliers = loud(100)
    key += 1000 * torch.randn(HEADS, DIM)  # a bias is no outlier: pages are centred
    layer._choose_outliers(key, value)
    assert outliers(layer._k_rotation) == k_outliers and outliers(layer._v_rotation) == v_outliers
    assert not layer._chooses_outliers
    decided = layer._k_rotation
    layer._load_rotation(0)  # weights are loaded once more: pages hold what was rotated by it
    assert layer._k_rotation is decided and not layer._chooses_outliers


def test_calibration_file_decides(layer, monkeypatch):
    orders = [[torch.randperm(DIM).tolist() for _ in range(HEADS)] for _ in range(2)]
    metadata = SimpleNamespace(layer_ids=[3, 5], num_kv_heads=HEADS, k_channels=[None, orders[0]])
    metadata.v_channels = [None, orders[1]]
    monkeypatch.setattr(impl, "_read_rotation", lambda path, config: SimpleNamespace(metadata=metadata))
    layer._resolved.rotation = "file"
    layer._load_rotation(5)
    assert not layer._chooses_outliers
    assert outliers(layer._k_rotation) == [set(order[:16]) for order in orders[0]]
    assert outliers(layer._v_rotation) == [set(order[:16]) for order in orders[1]]


def test_a_file_that_does_not_say_leaves_it_to_the_first_prompt(layer, monkeypatch):
    metadata = SimpleNamespace(layer_ids=[0], num_kv_heads=HEADS, k_channels=[], v_channels=[])
    monkeypatch.setattr(impl, "_read_rotation", lambda path, config: SimpleNamespace(metadata=metadata))
    layer._resolved.rotation = "file"
    layer._load_rotation(0)
    assert layer._chooses_outliers


class Prefill:
    """A step's prefills on the GPU path: `real` tokens after two of padding, over pages that nobody has written."""

    def __init__(self, layer, real: int) -> None:
        self.layer, self.settled = layer, []
        layer._load_rotation(0)
        layer._gpu = SimpleNamespace(constants=SimpleNamespace(update=self.settled.append))
        self.layout = layer._resolved.page_format.layout(DIM, 128)
        self.pages = torch.zeros(4, HEADS, self.layout.head_bytes, dtype=torch.uint8)
        slots = torch.cat((torch.tensor([-1, 5]), 128 + torch.arange(real)))
        self.part = SimpleNamespace(slot_mapping=slots, tokens=slice(3, 3 + len(slots)))  # decodes come first

    def step(self, key: torch.Tensor, value: torch.Tensor) -> None:
        rest = torch.full((5, HEADS, DIM), torch.nan)
        key, value = torch.cat((rest, key)), torch.cat((rest, value))
        self.layer._choose_outliers_on_gpu(key, value, self.part, self.pages, self.layout)


def test_first_prefill_decides_on_a_gpu(layer):
    prefill = Prefill(layer, real=100)
    (key, k_outliers), (value, v_outliers) = loud(100), loud(100)
    prefill.step(key, value)
    (constants,) = prefill.settled
    assert outliers(constants.k_rotation.float()) == k_outliers
    assert outliers(constants.v_unrotation.float().mT) == v_outliers
    assert constants.sketch is None and not layer._chooses_outliers
    layer._load_rotation(0)  # weights are loaded once more
    assert layer._k_rotation is None and not layer._chooses_outliers


def test_padding_decides_nothing_on_a_gpu(layer):
    """As in vLLM's dry runs and captures: slots of -1 or in the null page."""
    prefill = Prefill(layer, real=0)
    prefill.step(*torch.randn(2, 0, HEADS, DIM))
    assert layer._chooses_outliers and not prefill.settled


def test_tokens_stored_before_any_prefill_stay_readable(layer):
    """A first prompt of one token is a decode: what it stored must not be read with other rotations."""
    prefill = Prefill(layer, real=100)
    write_tokens(prefill.pages, prefill.layout, torch.tensor([300]), *torch.randn(2, 1, HEADS, DIM), None, None)
    prefill.step(*torch.randn(2, 100, HEADS, DIM))
    assert not layer._chooses_outliers and not prefill.settled
