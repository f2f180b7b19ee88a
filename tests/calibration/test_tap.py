# SPDX-License-Identifier: Apache-2.0
"""The tapped attention computes what transformers' own does, and sees queries, keys and values after RoPE."""

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from vllm_kvcompress.calibration import tap
from vllm_kvcompress.calibration.model import load
from vllm_kvcompress.errors import UnsupportedModelError


def outputs(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=ids.unsqueeze(0)).logits[0].double()


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3"])
@pytest.mark.parametrize("replace", [False, True])
def test_logits_are_those_of_the_untouched_model(model_folders, sequences, name, replace):
    tapped, _ = load(model_folders[name], name, torch.device("cpu"))
    plain = AutoModelForCausalLM.from_pretrained(model_folders[name], dtype=torch.float32, attn_implementation="eager")
    seen = []

    def listen(heads: tap.Heads) -> torch.Tensor | None:
        seen.append(heads.layer_id)
        return tap.attend(heads) if replace else None

    with tap.listening(listen):
        found = outputs(tapped, sequences[0])
    assert seen == [0, 1, 2]
    expected = outputs(plain.eval(), sequences[0])
    # Same mathematics, other order of float32 sums, over three layers: 1e-4 of the largest logit is 2^10 roundings.
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_keys_are_taken_after_rope(model_folders):
    model, _ = load(model_folders["llama"], "llama", torch.device("cpu"))
    keys: dict[int, torch.Tensor] = {}

    def listen(heads: tap.Heads) -> None:
        keys[heads.layer_id] = heads.key.clone()

    with torch.inference_mode(), tap.listening(listen):
        model.base_model(input_ids=torch.full((1, 8), 7), use_cache=False)
    # The same token everywhere: before RoPE all keys of layer 0 are equal, after it they turn and keep their length.
    first = keys[0][:, :1]
    assert not torch.allclose(keys[0][:, 1:], first.expand_as(keys[0][:, 1:]), atol=1e-2)
    assert torch.allclose(keys[0].norm(dim=-1), first.norm(dim=-1).expand(-1, 8), rtol=1e-4)


def test_listeners_nest_and_end():
    assert tap._listener is None
    with tap.listening(lambda heads: None):
        outer = tap._listener
        with pytest.raises(RuntimeError), tap.listening(lambda heads: None):
            raise RuntimeError
        assert tap._listener is outer
    assert tap._listener is None


def call(module: object, key_dim: int = 64, value_dim: int = 64, **kwargs: object) -> None:
    query, key, value = torch.randn(1, 4, 5, key_dim), torch.randn(1, 2, 5, key_dim), torch.randn(1, 2, 5, value_dim)
    with tap.listening(lambda heads: None):
        tap._attention(module, query, key, value, None, **kwargs)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("module", "arguments", "words"),
    [
        (SimpleNamespace(layer_idx=0, is_causal=False), {}, "not causal"),
        (SimpleNamespace(layer_idx=0), {"is_causal": False}, "not causal"),
        (SimpleNamespace(layer_idx=0), {"key_dim": 192, "value_dim": 128}, "keys of size 192 and values of size 128"),
        (SimpleNamespace(layer_idx=0), {"s_aux": torch.zeros(4)}, "learned attention sinks"),
        (SimpleNamespace(), {}, "which layer it is"),
    ],
)
def test_refusals(module, arguments, words):
    with pytest.raises(UnsupportedModelError, match=words):
        call(module, **arguments)


def test_softcap_and_window_reach_the_reference():
    heads = tap.Heads(0, torch.randn(4, 6, 64), torch.randn(2, 6, 64), torch.randn(2, 6, 64), 0.5, 2.0, 3)
    found = tap.attend(heads).double()
    for head in range(4):
        q, k, v = (t.double() for t in (heads.query[head], heads.key[head // 2], heads.value[head // 2]))
        scores = torch.tanh(q @ k.mT * 0.5 / 2.0) * 2.0
        for i in range(6):
            seen = slice(max(0, i - 2), i + 1)
            expected = scores[i, seen].softmax(-1) @ v[seen]
            # float32 against float64 over 64 products of size ~8: 64 * 8 * 2^-24 = 3e-5.
            assert (found[head, i] - expected).abs().max() <= 1e-4
