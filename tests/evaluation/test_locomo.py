# SPDX-License-Identifier: Apache-2.0
"""LoCoMo files that are made here, the published ones where they are, and scores by hand."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_kvcompress.episodic.segment import Utterance
from vllm_kvcompress.errors import KVCompressError
from vllm_kvcompress.evaluation.locomo import (
    Category,
    Question,
    normalized_tokens,
    read_conversation,
    read_folder,
    score,
    token_f1,
)


def content():
    return {
        "conversation": {
            "speaker_a": "Ann",
            "speaker_b": "Bob",
            "session_10": [{"speaker": "Bob", "dia_id": "D10:1", "text": "Bye."}],
            "session_10_date_time": "2:00 pm on 2 June, 2023",
            "session_2": [
                {"speaker": "Ann", "dia_id": "D2:1", "text": "Look!", "blip_caption": "a red bike", "img_url": ["x"]},
                {"speaker": "Bob", "dia_id": "D2:2", "text": "Nice."},
            ],
            "session_2_date_time": "1:00 pm on 1 May, 2023",
            "session_11_date_time": "no such session",
        },
        "qa": [
            {"question": "When?", "answer": 2023, "evidence": ["D2:1; D10:01", "D2:1"], "category": 2},
            {"question": "What?", "answer": "a bike", "evidence": ["D2:02", "D9:9", "D"], "category": 4},
            {"question": "Who?", "adversarial_answer": "Cy", "evidence": [], "category": 5},
        ],
    }


@pytest.fixture
def write(tmp_path):
    def written(data):
        path = tmp_path / "talk.json"
        path.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
        return path

    return written


def test_a_file(write):
    talk = read_conversation(write(content()))
    assert (talk.name, talk.speakers) == ("talk", ("Ann", "Bob"))
    assert [(session.number, session.date) for session in talk.sessions] == [
        (2, "1:00 pm on 1 May, 2023"),
        (10, "2:00 pm on 2 June, 2023"),
    ]
    assert talk.utterances == [
        Utterance("Ann", "Look! (shares a red bike)", "D2:1"),
        Utterance("Bob", "Nice.", "D2:2"),
        Utterance("Bob", "Bye.", "D10:1"),
    ]
    assert talk.questions == (
        Question("When?", "2023", ("D2:1", "D10:1"), Category.TEMPORAL),
        Question("What?", "a bike", ("D2:2",), Category.SINGLE_HOP),
        Question("Who?", None, (), Category.ADVERSARIAL),
    )


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda c: c.pop("qa"), "qa: Field required"),
        (lambda c: c["conversation"].pop("speaker_b"), "speaker_b: Input should be a valid string"),
        (lambda c: c["conversation"].pop("session_2_date_time"), "dates.2: Input should be a valid string"),
        (lambda c: c["conversation"].update(session_2="hello"), "sessions.2: Input should be a valid list"),
        (lambda c: c["conversation"]["session_2"][1].pop("text"), r"sessions.2.1.text: Field required"),
        (lambda c: c["conversation"]["session_2"][1].update(dia_id="x"), "dia_id: Value error, should look like D1:3"),
        (lambda c: c["conversation"]["session_2"][1].update(dia_id="D2:01"), "several utterances are called D2:1"),
        (lambda c: c.update(conversation={"speaker_a": "A", "speaker_b": "B"}), "it has no utterances"),
        (lambda c: c["qa"][1].pop("answer"), r"no answer to the question 'What\?' of category 4"),
        (lambda c: c["qa"][1].update(category=6), "qa.1.category: Input should be 1, 2, 3, 4 or 5"),
        (lambda c: c["qa"][1].update(evidence="D2:1"), "qa.1.evidence: Input should be a valid list"),
    ],
)
def test_bad_files_say_what_is_wrong(write, change, problem):
    data = content()
    change(data)
    path = write(data)
    with pytest.raises(KVCompressError, match=f"{path}.*{problem}"):
        read_conversation(path)


def test_other_files(write, tmp_path):
    with pytest.raises(KVCompressError, match=r"no \*.json files"):
        read_folder(tmp_path)
    with pytest.raises(KVCompressError, match="no such file"):
        read_conversation(tmp_path / "absent.json")
    for text, problem in (("{", "cannot be read as JSON"), ("[]", "is no LoCoMo conversation: the file: ")):
        with pytest.raises(KVCompressError, match=problem):
            read_folder(write(text).parent)


def test_the_published_files():
    folder = Path(os.environ.get("KVCOMPRESS_LOCOMO", Path(__file__).parents[3] / "shared" / "data" / "locomo"))
    if not folder.is_dir():
        pytest.skip(f"LoCoMo is not at {folder} (KVCOMPRESS_LOCOMO)")
    talks = read_folder(folder)
    assert len(talks) == 10
    assert sum(len(talk.sessions) for talk in talks) == 272
    assert sum(len(talk.utterances) for talk in talks) == 5882
    questions = [question for talk in talks for question in talk.questions]
    assert len(questions) == 1986
    assert sum(question.category is Category.ADVERSARIAL for question in questions) == 446
    assert sum(not question.evidence for question in questions) == 4
    assert all({turn.speaker for turn in talk.utterances} == set(talk.speakers) for talk in talks)


def test_normalised():
    assert normalized_tokens("The cat, a DOG -- and an owl's") == ["cat", "dog", "owls"]
    assert normalized_tokens("1,000 Andes") == ["1000", "andes"]


@pytest.mark.parametrize(
    ("prediction", "answer", "expected"),
    [
        ("The red bike", "a red bike!", 1),
        ("blue bike", "red bike", 0.5),
        ("it is red", "red", 2 * (1 / 3) / (1 / 3 + 1)),
        ("red red", "red", 2 * 0.5 / 1.5),  # words count with multiplicity
        ("", "red", 0),
        ("the", "a", 0),
    ],
)
def test_f1_by_hand(prediction, answer, expected):
    assert token_f1(prediction, answer) == pytest.approx(expected)


@given(st.text("ab ,.", max_size=12), st.text("ab ,.", max_size=12))
def test_f1_is_symmetric_and_one_for_the_same_words(one, other):
    f1 = token_f1(one, other)
    assert f1 == token_f1(other, one)
    assert 0 <= f1 <= 1
    assert (f1 == 1) == (sorted(normalized_tokens(one)) == sorted(normalized_tokens(other)) != [])


@pytest.mark.parametrize(
    ("category", "prediction", "answer", "expected"),
    [
        (Category.SINGLE_HOP, "red, blue", "red, blue", 1),
        (Category.TEMPORAL, "May 2023", "7 May 2023", 0.8),
        (Category.MULTI_HOP, "blue, red", "red, green", 0.5),
        (Category.MULTI_HOP, "red blue", "red, blue", 2 / 3),
        (Category.OPEN_DOMAIN, "yes", "Yes; she likes red", 1),
        (Category.ADVERSARIAL, "That is Not Mentioned.", None, 1),
        (Category.ADVERSARIAL, "red", None, 0),
    ],
)
def test_scores_by_category(category, prediction, answer, expected):
    assert score(prediction, Question("?", answer, (), category)) == pytest.approx(expected)
