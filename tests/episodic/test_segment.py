# SPDX-License-Identifier: Apache-2.0
"""Windows: every word in exactly one, in order, and none changes when the conversation grows."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_kvcompress.episodic.segment import UTTERANCE_CHARACTERS, Utterance, chat_utterances, segment, split_turn
from vllm_kvcompress.errors import KVCompressError

# All of Unicode, halves of UTF-16 pairs too, with many ends of sentences.
texts = st.text(alphabet=st.one_of(st.sampled_from("ab .!?\n。"), st.characters()), max_size=60)
talks = st.lists(st.builds(Utterance, st.sampled_from(["Ann", "Bob"]), texts), max_size=30)


@given(texts, st.integers(1, 20))
def test_pieces_are_the_text(text, limit):
    pieces = split_turn(text, limit)
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= limit for piece in pieces) or pieces == [""]


def test_cuts_between_sentences_then_words_then_anywhere():
    assert split_turn("One two. Three four! Five?", 20) == ["One two. ", "Three four! Five?"]
    assert split_turn('He said "no." Then he left', 20) == ['He said "no." ', "Then he left"]
    assert split_turn("first line\nsecond line", 20) == ["first line\n", "second line"]
    assert split_turn("今日は雨です。明日は晴れです。", 10) == ["今日は雨です。", "明日は晴れです。"]
    assert split_turn("alpha beta gamma", 12) == ["alpha beta ", "gamma"]
    assert split_turn("x" * 25, 10) == ["x" * 10, "x" * 10, "x" * 5]


@given(talks, st.integers(1, 5))
def test_windows_hold_every_utterance_in_order(talk, size):
    windows = segment(talk, size)
    lines = [
        f"{turn.speaker}: {turn.text.strip()}".encode("utf-8", "replace").decode() for turn in talk if turn.text.strip()
    ]
    assert "\n".join(window.text for window in windows) == "\n".join(lines)
    assert all(window.full for window in windows[:-1])
    assert len(windows) == -(-len(lines) // size)
    turns = [(window.first_turn, window.last_turn) for window in windows]
    assert all(first <= last for first, last in turns)
    assert all(a[1] < b[0] for a, b in pairwise(turns))
    for window in windows:
        window.text.encode()


@given(talks, st.data())
def test_full_windows_stay_when_the_talk_grows(talk, data):
    before = segment(talk[: data.draw(st.integers(0, len(talk)))])
    after = segment(talk)
    kept = [window for window in before if window.full]
    assert after[: len(kept)] == kept


def test_ids_are_those_of_the_utterances():
    talk = [Utterance("A", "one", "x"), Utterance("B", " \n", "empty"), Utterance("A", "two"), Utterance("B", "3", "y")]
    first, second = segment(talk, 2)
    assert (first.text, first.ids, first.first_turn, first.last_turn) == ("A: one\nA: two", ("x",), 0, 2)
    assert (second.text, second.ids, second.full) == ("B: 3", ("y",), False)


def test_one_giant_turn(rng):
    text = " ".join(f"Sentence {rng.randrange(1000)} says something." for _ in range(4000))
    windows = segment([Utterance("A", text, "giant")])
    assert all(len(window.text) <= 4 * (UTTERANCE_CHARACTERS + len("A: \n")) for window in windows)
    assert {(window.first_turn, window.last_turn, window.ids) for window in windows} == {(0, 0, ("giant",))}
    assert " ".join(line.removeprefix("A: ") for window in windows for line in window.text.split("\n")) == text
    # Whole sentences: every line ends where one does.
    assert all(line.endswith(".") for window in windows for line in window.text.split("\n"))


def test_ten_thousand_tiny_turns():
    windows = segment([Utterance("A", "ok") for _ in range(10_001)])
    assert len(windows) == 2501
    assert [window.full for window in windows[-2:]] == [True, False]
    assert windows[-1].first_turn == 10_000


def test_nothing_said():
    assert segment([]) == []
    assert segment([Utterance("A", ""), Utterance("B", "  ")]) == []
    with pytest.raises(KVCompressError, match="window_utterances=0"):
        segment([], 0)


def test_chat_messages():
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]},
        {"role": "user", "content": [{"type": "text", "text": "Two"}, "parts"]},
    ]
    utterances = chat_utterances(messages)
    assert [(turn.speaker, turn.text) for turn in utterances] == [
        ("system", ""),
        ("user", "Hello"),
        ("assistant", ""),
        ("user", "Two\nparts"),
    ]
    assert len({turn.rest for turn in utterances}) == 4  # all of a message, also of those without text


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        ("hello", r'message 1 must be an object with a "role", got \'hello\''),
        ({"content": "x"}, 'with a "role"'),
        ({"role": "user", "content": 7}, "content of message 1 must be a string or a list of text parts, got 7"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "text only: message 1 .*image_url"),
        ({"role": "user", "content": "x", "extra": {1, 2}}, "message 1 is not JSON"),
    ],
)
def test_other_messages_are_refused(message, problem):
    with pytest.raises(KVCompressError, match=problem):
        chat_utterances([{"role": "user", "content": "Hello"}, message])
