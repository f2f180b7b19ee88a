# SPDX-License-Identifier: Apache-2.0
"""The reference computes what the untouched model does where nothing is evicted, and what a mask does where it is."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from vllm_kvcompress.calibration.tap import NAME
from vllm_kvcompress.episodic.policies import POLICIES, EpiCache, Layer, SnapKV, Streaming
from vllm_kvcompress.errors import UnsupportedModelError
from vllm_kvcompress.evaluation import epicache_reference as reference

VOCABULARY = 256
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 96,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 2048,
}
LAYERS, HEADS = 3, 2


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The same random weights twice: with the tapped attention, and plain in float64."""
    torch.manual_seed(torch.seed() % 2**31)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                parameter.mul_(8)  # scores of a random model are all alike otherwise
    folder: Path = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    tapped = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=NAME)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    return tapped.eval(), plain.eval()


def random_ids(count: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (count,))


def plain_logits(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=ids.unsqueeze(0)).logits[0]


def assert_same_logits(found: torch.Tensor, expected: torch.Tensor) -> None:
    # float32 against float64 over three layers: 1e-4 of the largest logit is 2^10 roundings.
    assert (found.double() - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("block", [13, 50, 500])
def test_nothing_evicted_is_the_plain_model(models, name, block):
    tapped, plain = models
    ids, question = random_ids(121), random_ids(9)
    guide = reference.guide_every_block(tapped, random_ids(20))
    cache = reference.prefill(tapped, ids, POLICIES[name], [121] * LAYERS, block=block, protected=4, guide=guide)
    assert cache.length == 121 and cache.slots() == [121] * LAYERS
    hidden, _ = reference.forward(tapped, question, cache.branch())
    expected = plain_logits(plain, torch.cat([ids, question]))
    assert_same_logits(tapped.lm_head(hidden), expected[-9:])
    logprobs = reference.answer_logprobs(tapped, cache, question[:4], question[4:])
    wanted = expected.log_softmax(-1)[-6:-1].gather(-1, question[4:].unsqueeze(-1)).squeeze(-1)
    assert logprobs.shape == (5,) and (logprobs - wanted).abs().max() <= 1e-3
    assert cache.length == 121 and cache.slots() == [121] * LAYERS


def test_greedy_answer_is_the_plain_models(models):
    tapped, plain = models
    ids = random_ids(60)
    cache = reference.prefill(tapped, ids[:50], Streaming(), [50] * LAYERS, block=16)
    expected = ids
    for _ in range(6):
        expected = torch.cat([expected, plain_logits(plain, expected)[-1].argmax().view(1)])
    answer = expected[60:].tolist()
    assert reference.greedy_answer(tapped, cache, ids[50:], tokens=6, stop=None) == answer
    stop = answer[3]
    assert reference.greedy_answer(tapped, cache, ids[50:], tokens=6, stop=stop) == answer[: answer.index(stop)]
    assert cache.length == 50


def test_what_is_evicted_is_as_if_masked(models):
    """Streaming with sinks, two blocks: every layer and head keeps the same tokens, so one mask says it all."""
    tapped, plain = models
    ids = random_ids(70)
    cache = reference.prefill(tapped, ids[:60], Streaming(), [20] * LAYERS, block=30, protected=4)
    kept = [*range(4), *range(44, 60)]
    for layer in cache.layers.values():
        assert layer.position.tolist() == [kept] * HEADS
    hidden, _ = reference.forward(tapped, ids[60:], cache)
    visible = torch.ones(70, 70, dtype=torch.bool).tril()
    visible[30:60, 4:14] = False  # after the first block: 0-3 and 14-29
    visible[60:, 4:44] = False
    mask = torch.zeros(1, 1, 70, 70, dtype=torch.float64).masked_fill(~visible, -torch.inf)
    with torch.inference_mode():
        expected = plain(input_ids=ids.unsqueeze(0), attention_mask=mask).logits[0]
    assert_same_logits(tapped.lm_head(hidden), expected[-10:])


def test_each_layer_and_head_keeps_its_own(models):
    """The exact procedure of the paper, step by step, against one done by hand with the model's own layers."""
    tapped, _ = models
    ids, guide_ids = random_ids(60), random_ids(15)
    budgets = [12, 25, 18]
    cache = reference.prefill(
        tapped,
        ids,
        EpiCache(),
        budgets,
        block=30,
        protected=3,
        guide=reference.guide_every_block(tapped, guide_ids),
    )
    assert cache.length == 60 and cache.slots() == budgets
    by_hand = reference.Cache()
    for part in (ids[:30], ids[30:]):
        reference.forward(tapped, part, by_hand)
        copy = by_hand.branch()
        before = {index: layer.key for index, layer in by_hand.layers.items()}
        _, queries = reference.forward(tapped, guide_ids, copy)
        for (index, layer), budget in zip(by_hand.layers.items(), budgets, strict=True):
            assert layer.key is before[index]  # the guide left nothing
            scores = EpiCache().score(Layer(layer.key.transpose(0, 1), queries[index]))
            scores[:, :3] = torch.inf
            layer.keep(scores.topk(budget).indices.sort(-1).values)
    for index, layer in cache.layers.items():
        other = by_hand.layers[index]
        assert torch.equal(layer.position, other.position) and torch.equal(layer.key, other.key)
        assert torch.equal(layer.value, other.value)
        assert (layer.position[:, :3] == torch.arange(3)).all() and (layer.position.diff(dim=-1) > 0).all()
    heads = cache.layers[0].position
    assert not torch.equal(heads[0], heads[1])


def test_survivors_are_the_rows_of_the_full_cache(models):
    """In the first layer keys depend on their own token alone: survivors keep the phase of their position."""
    tapped, _ = models
    ids = random_ids(64)
    full = reference.Cache()
    reference.forward(tapped, ids, full)
    guide = reference.guide_every_block(tapped, random_ids(10))
    for name, policy in POLICIES.items():
        cache = reference.prefill(tapped, ids, policy, [16] * LAYERS, block=20, protected=2, guide=guide)
        layer = cache.layers[0]
        rows = layer.position.unsqueeze(-1).expand(-1, -1, 64)
        torch.testing.assert_close(layer.key, full.layers[0].key.gather(1, rows), rtol=1e-4, atol=1e-5, msg=name)
        torch.testing.assert_close(layer.value, full.layers[0].value.gather(1, rows), rtol=1e-4, atol=1e-5)


def test_turned_queries_are_those_of_the_other_position(models):
    """First layer: its queries depend on token and position only."""
    tapped, _ = models
    guide_ids = random_ids(12)
    start = reference.Cache()
    reference.forward(tapped, random_ids(50), start)
    at_start = reference.forward(tapped, guide_ids, start)[1]
    history = reference.Cache()
    reference.forward(tapped, random_ids(700), history)
    expected = reference.guide_every_block(tapped, guide_ids)(history)[0]
    found = reference.guide_captured(tapped, at_start, 50)(history)[0]
    # RoPE's angles in float32 are off by 700 * 2^-24.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3 * float(expected.abs().max()))
    fixed = reference.guide_captured(tapped, at_start, 50, rephase=False)(history)[0]
    assert torch.equal(fixed, at_start[0]) and not torch.allclose(fixed, expected, atol=0.1)


def test_accumulated_scores_follow_their_tokens(models):
    tapped, _ = models
    cache = reference.prefill(tapped, random_ids(90), POLICIES["h2o"], [20] * LAYERS, block=30, protected=1)
    for layer in cache.layers.values():
        assert layer.accumulated is not None and layer.accumulated.shape == (HEADS, 20)
        # The first token is seen by all 90 queries of 3 heads, the last by its own.
        assert (layer.accumulated[:, 0] > 0).all() and (layer.accumulated[:, -1] <= 3).all()
        assert (layer.accumulated.sum(-1) <= 90 * 3 + 1e-3).all()


def test_going_on_from_a_cache_is_one_prefill(models):
    tapped, _ = models
    ids, policy = random_ids(80), SnapKV(window=8)
    whole = reference.prefill(tapped, ids, policy, [24] * LAYERS, block=20, protected=2)
    half = reference.prefill(tapped, ids[:40], policy, [24] * LAYERS, block=20, protected=2)
    both = reference.prefill(tapped, ids[40:], policy, [24] * LAYERS, block=20, protected=2, cache=half)
    assert half.length == 40 and both.length == 80
    for index, layer in whole.layers.items():
        assert torch.equal(layer.position, both.layers[index].position)
        assert torch.equal(layer.key, both.layers[index].key)


def test_refusals(models):
    tapped, _ = models
    with pytest.raises(ValueError, match="needs a guide prompt"):
        reference.prefill(tapped, random_ids(30), EpiCache(), [10] * LAYERS, block=10)
    with pytest.raises(ValueError, match="below the 12 that are always kept"):
        reference.prefill(tapped, random_ids(30), Streaming(), [10] * LAYERS, block=10, protected=12)
    sliding = Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=16, max_window_layers=1)
    model = AutoModelForCausalLM.from_config(sliding, attn_implementation=NAME).eval()
    with pytest.raises(UnsupportedModelError, match="full attention"):
        reference.forward(model, random_ids(5), reference.Cache())
