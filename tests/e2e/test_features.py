# SPDX-License-Identifier: Apache-2.0
"""Features of vLLM on 2-bit pages: every token an engine gives is scored anew by the model itself, without an engine.

Windows hold every token, so that the engine differs by the rounding of keys and values to 16 bits alone (test_engine.py
has the arithmetic of the bound): another request's page, adapter, draft or branch of a search moves log-probabilities
by more than 1.
"""

import pytest
import torch
from transformers import AutoTokenizer

from .features_model import EVERYTHING, Oracle, make_adapter, make_model, prompts, run

WINDOWS_IN_16_BITS = 0.1
GREEDY = {"temperature": 0, "max_tokens": 24, "ignore_eos": True, "logprobs": 0}
REGEX = r"[0-9]{3}-[0-9]{4}"
FORCED = "0123456789" * 12
NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 1, "prompt_lookup_max": 3}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("features") / "model")


@pytest.fixture(scope="module")
def oracle(model):
    return Oracle(model)


@pytest.fixture(scope="module")
def adapter(model):
    return make_adapter(model.with_name("adapter"))


@pytest.fixture(scope="module")
def asked():
    """Two prompts, one of less than a page more than the other's; both leave a page begun."""
    return prompts(300, 130)


@pytest.fixture(scope="module")
def answered(model, adapter, asked):
    """Rounds of one engine by name: the same prompts throughout, so that all but the first find their pages."""
    rounds = {
        "greedy": {"sampling": GREEDY},
        "several": {"sampling": {**GREEDY, "n": 3, "temperature": 1, "seed": 5, "max_tokens": 40}},
        "beams": {"beam": {"beam_width": 3, "max_tokens": 20, "ignore_eos": True}},
        "top": {"sampling": {**GREEDY, "logprobs": 5}},
        "structured": {"sampling": {**GREEDY, "ignore_eos": False, "structured_outputs": {"regex": REGEX}}},
        "adapter": {"sampling": GREEDY, "lora": str(adapter)},
        "adapter again": {"sampling": GREEDY, "lora": str(adapter)},
    }
    job = [{"prompts": asked, **round_} for round_ in rounds.values()]
    report = run(model, "hadamard-int2", job, windows=EVERYTHING, enable_lora=True, max_lora_rank=8)
    return dict(zip(rounds, report["rounds"], strict=True))


def encode(model, text):
    return AutoTokenizer.from_pretrained(model)(text)["input_ids"]


def difference(oracle, prompt, answer):
    """Largest |difference| of the log-probabilities an answer reports; NaN counts as infinite."""
    expected = oracle.score(prompt, answer["tokens"])
    found = [
        abs(logprob - float(expected[place, int(token)]))
        for place, entry in enumerate(answer["logprobs"])
        for token, logprob in entry.items()
    ]
    assert len(found) >= len(answer["tokens"])
    largest = max(x if x >= 0 else float("inf") for x in found)
    print(f"{len(found)} log-probabilities, the largest difference {largest:.2g}")
    return largest


def check_greedy(oracle, prompt, answer, bound=WINDOWS_IN_16_BITS):
    """Reported right, and nothing likelier was there but for what rounding may do to either of two."""
    assert difference(oracle, prompt, answer) < bound
    scores = oracle.score(prompt, answer["tokens"])
    given = scores.gather(1, scores.new_tensor(answer["tokens"]).long()[:, None])[:, 0]
    assert float((scores.amax(1) - given).max()) < 2 * bound


def test_greedy(answered, asked, oracle):
    for prompt, (answer,) in zip(asked, answered["greedy"], strict=True):
        assert answer["cached"] == 0 and len(answer["tokens"]) == 24
        check_greedy(oracle, prompt, answer)


@pytest.mark.feature("n > 1", "works")
def test_several_answers_share_the_prompt_and_nothing_else(answered, asked, oracle):
    for prompt, answers in zip(asked, answered["several"], strict=True):
        assert [answer["cached"] for answer in answers] == [len(prompt) // 128 * 128] * 3
        assert len({tuple(answer["tokens"]) for answer in answers}) == 3
        assert all(difference(oracle, prompt, answer) < WINDOWS_IN_16_BITS for answer in answers)


@pytest.mark.feature("beam search", "works")
def test_beams(answered, asked, oracle):
    for prompt, beams in zip(asked, answered["beams"], strict=True):
        assert len({tuple(beam["tokens"]) for beam in beams}) == 3
        for beam in beams:
            scores = oracle.score(prompt, beam["tokens"])
            expected = sum(float(scores[place, token]) for place, token in enumerate(beam["tokens"]))
            assert abs(beam["sum"] - expected) < 20 * WINDOWS_IN_16_BITS, "the sum of 20 log-probabilities"


@pytest.mark.feature("log-probabilities of answers and prompts", "works")
def test_the_likeliest_tokens(answered, asked, oracle):
    for prompt, (answer,) in zip(asked, answered["top"], strict=True):
        assert all(len(entry) == 5 for entry in answer["logprobs"]), "the greedy token is one of the five"
        assert difference(oracle, prompt, answer) < WINDOWS_IN_16_BITS
        fifth = oracle.score(prompt, answer["tokens"]).topk(5).values[:, -1]
        for least, entry in zip(fifth.tolist(), answer["logprobs"], strict=True):
            assert min(entry.values()) > least - 2 * WINDOWS_IN_16_BITS


@pytest.mark.feature("structured output", "works")
def test_structured_output(answered, asked, oracle, model):
    """Reported among what the grammar allows: the digits, the hyphen, the end."""
    digits = torch.tensor(encode(model, "0123456789"))
    for prompt, (answer,) in zip(asked, answered["structured"], strict=True):
        tokens = answer["tokens"]
        assert tokens[3:4] == encode(model, "-") and tokens[8:] == [1] and len(tokens) == 9
        expected = oracle.score(prompt, tokens)[:, digits].log_softmax(-1)
        for place in (0, 1, 2, 4, 5, 6, 7):
            (choice,) = (digits == tokens[place]).nonzero()[0].tolist()
            assert abs(answer["logprobs"][place][str(tokens[place])] - expected[place, choice]) < WINDOWS_IN_16_BITS
            assert expected[place].max() - expected[place, choice] < 2 * WINDOWS_IN_16_BITS


@pytest.mark.feature("LoRA", "works", "not with eviction")
def test_an_adapter_has_pages_of_its_own(answered, asked, oracle, model, adapter):
    adapted = Oracle(model, adapter)
    for prompt, (first,), (again,) in zip(asked, answered["adapter"], answered["adapter again"], strict=True):
        assert (first["cached"], again["cached"]) == (0, len(prompt) // 128 * 128)
        check_greedy(adapted, prompt, first)
        check_greedy(adapted, prompt, again)
        assert difference(oracle, prompt, first) > 5 * WINDOWS_IN_16_BITS, "the comparison must be able to fail"


@pytest.mark.feature("n-gram speculative decoding", "works", "up to 7 drafts a step, not with eviction")
@pytest.mark.feature("models in bf16, fp16 and fp32", "works")
def test_drafts_from_the_prompt_change_nothing(model, oracle):
    """Free text, in which nearly every draft is rejected, then text that a grammar forces to repeat itself.

    What the accepted drafts of that left in the pages is read by who goes on from there. In fp16.
    """
    forced = encode(model, FORCED)
    asked = [prompts(20)[0] * 12, *prompts(300)]
    follow = [[*prompt, *forced] for prompt in asked]
    grammar = {"structured_outputs": {"regex": FORCED}, "max_tokens": len(forced)}
    rounds = [
        {"prompts": asked, "sampling": {**GREEDY, "max_tokens": 120}},
        {"prompts": asked, "sampling": {**GREEDY, **grammar}},
        {"prompts": follow, "sampling": GREEDY},
    ]
    report = run(
        model, "hadamard-int2", rounds, windows=EVERYTHING, dtype="float16", speculative_config=NGRAM
    )  # fmt: skip
    free, repeated, followed = report["rounds"]
    for prompt, (answer,) in zip([*asked, *follow], [*free, *followed], strict=True):
        check_greedy(oracle, prompt, answer)
    assert [answer["tokens"] for (answer,) in repeated] == [forced] * 2
    assert [answer["cached"] for (answer,) in followed] == [256, 384], "a page of prompt and answer, one of answer"
    drafts, accepted = (report["metrics"][f"vllm:spec_decode_num_{name}_tokens"] for name in ("draft", "accepted"))
    # Of the forced text all but the first 11 tokens could be drafts, four in five of them at most.
    assert len(forced) < accepted < drafts


@pytest.mark.long
@pytest.mark.feature("torch.compile and --enforce-eager", "works", "all tests but one run eagerly on the CPU")
@pytest.mark.feature("log-probabilities of answers and prompts", "works")
def test_compiled(model, oracle):
    """By Inductor, which takes a minute; with the log-probabilities of the prompt."""
    asked, sampling = prompts(300, 130), {**GREEDY, "prompt_logprobs": 0}
    rounds = [{"prompts": asked, "sampling": sampling}]
    report = run(model, "hadamard-int2", rounds, windows=EVERYTHING, enforce_eager=False)
    for prompt, (answer,) in zip(asked, report["rounds"][0], strict=True):
        check_greedy(oracle, prompt, answer)
        read = {"tokens": prompt[1:], "logprobs": answer["prompt_logprobs"][1:]}
        assert difference(oracle, prompt[:1], read) < WINDOWS_IN_16_BITS
