# SPDX-License-Identifier: Apache-2.0
"""What requests may ask of eviction, and that what they may not is refused by name and value."""

from dataclasses import replace

import pytest

from vllm_kvcompress.episodic.policies import POLICIES
from vllm_kvcompress.episodic.request import Defaults, Eviction, parse
from vllm_kvcompress.errors import KVCompressError

PAGE, VOCABULARY, BLOCK = 128, 1000, 512
DEFAULTS = Defaults(
    policy="streaming",
    block_tokens=BLOCK,
    page_tokens=PAGE,
    sink_tokens=32,
    recent_tokens=200,
    vocabulary=VOCABULARY,
    max_model_len=4096,
)


def evicts(arguments, defaults=DEFAULTS):
    wanted = parse(arguments, defaults)
    return None if wanted is None else wanted.eviction


@pytest.mark.parametrize("arguments", [None, {}, {"top_n": 3}, {"kv_transfer_params": {"kvcompress_budget": 1}}])
def test_who_asks_for_nothing_keeps_everything(arguments):
    assert parse(arguments, DEFAULTS) is None


@pytest.mark.parametrize(
    ("budget", "pages"), [(256, 2), (257, 3), (384, 3), (385, 4), (512, 4), (100_000, 782), (10**12, 7_812_500_000)]
)
def test_budgets_are_whole_pages_rounded_up(budget, pages):
    found = evicts({"kvcompress_budget": budget, "other": object()}, DEFAULTS)
    assert found == Eviction(pages, "streaming", (), 32, 200, BLOCK)
    assert found.budget_pages * PAGE >= budget > (found.budget_pages - 1) * PAGE
    # Four pages of the block, two that the recent window lies in, two that are begun.
    assert found.peak_pages(PAGE) == pages + 4 + 2 + 2


@pytest.mark.parametrize("policy", POLICIES)
def test_policies(policy):
    arguments = {"kvcompress_budget": 1024, "kvcompress_policy": policy}
    guided = POLICIES[policy].queries == "guide"
    if guided:
        arguments["kvcompress_guide"] = [5, 0, VOCABULARY - 1, 5]
    found = evicts(arguments, DEFAULTS)
    assert found is not None
    assert (found.policy, found.guide) == (policy, (5, 0, 999, 5) if guided else ())


@pytest.mark.parametrize("length", [1, BLOCK])
def test_guides_are_no_longer_than_a_step(length):
    arguments = {"kvcompress_budget": 256, "kvcompress_policy": "epicache", "kvcompress_guide": [7] * length}
    found = evicts(arguments, DEFAULTS)
    assert found is not None and found.guide == (7,) * length
    with pytest.raises(KVCompressError, match=f"kvcompress_guide has {BLOCK + 1} tokens.*{BLOCK}"):
        parse({**arguments, "kvcompress_guide": [7] * (BLOCK + 1)}, DEFAULTS)


@pytest.mark.parametrize(
    ("protect", "kept", "least"), [(0, 32, 256), (31, 32, 256), (128, 128, 256), (129, 129, 384), (1000, 1000, 1152)]
)
def test_sinks_are_always_protected_and_a_page_is_left_to_choose(protect, kept, least):
    found = evicts({"kvcompress_budget": least, "kvcompress_protect": protect}, DEFAULTS)
    assert found is not None
    assert found.protected_tokens == kept
    assert found.budget_pages * PAGE >= kept + PAGE
    with pytest.raises(KVCompressError, match=f"kvcompress_budget={least - 1} .*{least} or more"):
        parse({"kvcompress_budget": least - 1, "kvcompress_protect": protect}, DEFAULTS)


def test_without_sinks_a_page_is_enough():
    none = Defaults("keydiff", BLOCK, PAGE, sink_tokens=0, recent_tokens=0, vocabulary=VOCABULARY, max_model_len=512)
    assert evicts({"kvcompress_budget": 128}, none) == Eviction(1, "keydiff", (), 0, 0, BLOCK)


def test_names():
    wanted = parse({"kvcompress_budget": 256, "kvcompress_keep": "a", "kvcompress_episode": "b" * 256}, DEFAULTS)
    assert wanted is not None and (wanted.keep, wanted.episode) == ("a", "b" * 256) and wanted.eviction.keeps
    # Whoever keeps and whoever asks about what was kept evict alike.
    assert wanted.eviction == evicts({"kvcompress_budget": 256})


def test_guides_leave_positions_to_the_history():
    few = replace(DEFAULTS, max_model_len=600)
    arguments = {"kvcompress_budget": 256, "kvcompress_policy": "epicache"}
    assert evicts({**arguments, "kvcompress_guide": [7] * 300}, few) is not None
    with pytest.raises(KVCompressError, match=r"kvcompress_guide has 301 tokens.* 300 "):
        parse({**arguments, "kvcompress_guide": [7] * 301}, few)


BUDGET = {"kvcompress_budget": 512}
GUIDED = {**BUDGET, "kvcompress_policy": "epicache"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({**BUDGET, "kvcompress_bugdet": 3}, r"unknown argument kvcompress_bugdet=3; known: kvcompress_budget, "),
        ({"kvcompress_": None}, "unknown argument kvcompress_=None"),
        ({"kvcompress_policy": "snapkv"}, "kvcompress_policy='snapkv' needs kvcompress_budget"),
        ({"kvcompress_guide": [1]}, r"kvcompress_guide=\[1\] needs kvcompress_budget"),
        ({"kvcompress_protect": 0}, "kvcompress_protect=0 needs kvcompress_budget"),
        *(
            ({"kvcompress_budget": value}, f"kvcompress_budget={value!r} must be a whole number")
            for value in (None, "512", 512.0, True, float("nan"), -1, 0, 255)
        ),
        ({"kvcompress_budget": [512]}, r"kvcompress_budget=\[512\] must be"),
        *(
            ({**BUDGET, "kvcompress_protect": value}, f"kvcompress_protect={value!r} must be a whole number")
            for value in (None, "4", 4.0, False, -1)
        ),
        *(
            (
                {**BUDGET, "kvcompress_policy": value},
                f"kvcompress_policy={value!r} must be one of epicache, epicache-keydiff, snapkv, ",
            )
            for value in ("H2O", "", None, 3, {})
        ),
        *(
            ({**BUDGET, argument: value}, rf"{argument}=.* must be a name of 1 to 256 characters")
            for argument in ("kvcompress_keep", "kvcompress_episode")
            for value in ("", "x" * 257, 3, ["a"])
        ),
        (GUIDED, "kvcompress_policy=epicache needs kvcompress_guide"),
        ({**GUIDED, "kvcompress_guide": []}, "kvcompress_policy=epicache needs kvcompress_guide"),
        *(
            ({**GUIDED, "kvcompress_guide": value}, f"kvcompress_guide must be a list of token ids.*, got {value!r}")
            for value in ("a text", None, 5, {1: 2})
        ),
        *(
            ({**GUIDED, "kvcompress_guide": [1, value]}, f"kvcompress_guide holds {value!r}.* token ids below 1000")
            for value in (VOCABULARY, -1, 1.0, True, "1", None)
        ),
        ({**BUDGET, "kvcompress_guide": [1]}, "kvcompress_guide is of no use to kvcompress_policy=streaming"),
    ],
)
def test_refusals(arguments, words):
    with pytest.raises(KVCompressError, match=words):
        parse(arguments, DEFAULTS)


@pytest.mark.parametrize("value", [["snapkv"], {"a": 1}])
def test_policies_that_cannot_be_hashed_are_refused_too(value):
    """Over HTTP anything JSON can say may come."""
    with pytest.raises(KVCompressError, match="kvcompress_policy="):
        parse({**BUDGET, "kvcompress_policy": value}, DEFAULTS)
