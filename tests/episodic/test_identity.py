# SPDX-License-Identifier: Apache-2.0
"""Digests are the same exactly as far as histories are."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_kvcompress.episodic.identity import digest, turn_digests
from vllm_kvcompress.episodic.segment import Utterance

turns = st.builds(Utterance, st.text(max_size=3), st.text(st.characters(), max_size=5), rest=st.text(max_size=3))


@given(st.lists(turns, max_size=8), st.lists(turns, max_size=8))
def test_same_up_to_the_first_difference(one, other):
    common = 0
    while common < min(len(one), len(other)) and one[common] == other[common]:
        common += 1
    a, b = turn_digests(one, "root"), turn_digests(other, "root")
    assert (len(a), len(b)) == (len(one), len(other))
    assert a[:common] == b[:common]
    assert not set(a[common:]) & set(b[common:])


def test_boundaries_matter():
    assert digest("ab", "c") != digest("a", "bc") != digest("abc")
    assert digest("\ud800") != digest("?")


@pytest.mark.parametrize("change", [{"speaker": "B"}, {"text": "hi "}, {"rest": "tool"}])
def test_every_part_of_a_turn_counts(change):
    talk = [Utterance("A", "hi"), Utterance("A", "")]
    changed = [replace(talk[0], **change), talk[1]]
    assert not set(turn_digests(talk, "root")) & set(turn_digests(changed, "root"))


def test_empty_turns_and_the_root_count():
    talk = [Utterance("A", "hi")]
    assert turn_digests([*talk, Utterance("A", "")], "root")[1] != turn_digests(talk, "root")[0]
    assert turn_digests(talk, "root") != turn_digests(talk, "other")
    # A caller's names are no part of what is said.
    assert turn_digests([replace(talk[0], id="x")], "root") == turn_digests(talk, "root")
