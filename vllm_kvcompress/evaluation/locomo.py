# SPDX-License-Identifier: Apache-2.0
"""LoCoMo: long conversations of two people over many sessions, with questions about them and their scores.

Maharana et al., "Evaluating very long-term conversational memory of LLM agents" (arXiv 2402.17753). A file holds one
conversation: `{"conversation": {"speaker_a", "speaker_b", "session_1", "session_1_date_time", ...}, "qa": [...]}`. The
data (CC BY-NC 4.0) is not part of this project.
"""

from __future__ import annotations

import json
import re
import string
from collections import Counter
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationError

from vllm_kvcompress.episodic.segment import Utterance
from vllm_kvcompress.errors import KVCompressError

_SESSION = re.compile(r"session_(\d+)")
_DIALOGUE_ID = re.compile(r"D(\d+):(\d+)")
_REFUSALS = ("no information available", "not mentioned")


class Category(IntEnum):
    """What a question asks for, with the numbers of the files."""

    MULTI_HOP = 1
    TEMPORAL = 2
    OPEN_DOMAIN = 3
    SINGLE_HOP = 4
    ADVERSARIAL = 5
    """The conversation does not say."""


@dataclass(frozen=True)
class Session:
    """One meeting of the two speakers."""

    number: int
    date: str
    """As the file has it, such as `1:56 pm on 8 May, 2023`."""
    utterances: tuple[Utterance, ...]
    """Each with its dialogue id, such as `D1:3`; a picture is told by its caption."""


@dataclass(frozen=True)
class Question:
    """One question about the conversation."""

    text: str
    answer: str | None
    """None for most adversarial questions."""
    evidence: tuple[str, ...]
    """Dialogue ids of the utterances that hold the answer."""
    category: Category


@dataclass(frozen=True)
class Conversation:
    """One file."""

    name: str
    speakers: tuple[str, str]
    sessions: tuple[Session, ...]
    questions: tuple[Question, ...]

    @property
    def utterances(self) -> list[Utterance]:
        """Of all sessions, in order."""
        return [utterance for session in self.sessions for utterance in session.utterances]


class _Turn(BaseModel):
    speaker: str
    text: str
    dia_id: Annotated[str, AfterValidator(lambda value: _dialogue_id(value))]
    blip_caption: str | None = None


def _dialogue_id(value: str) -> str:
    if not (match := _DIALOGUE_ID.fullmatch(value)):
        raise ValueError("should look like D1:3")
    return _id(match)


def _id(match: re.Match[str]) -> str:
    # The files write D30:05 for D30:5 in one place.
    return f"D{int(match[1])}:{int(match[2])}"


def _as_text(value: Any) -> Any:
    return str(value) if isinstance(value, int | float) else value


class _QA(BaseModel):
    question: str
    answer: Annotated[str | None, BeforeValidator(_as_text)] = None
    evidence: list[str]
    category: Category


class _File(BaseModel):
    conversation: dict[str, Any]
    qa: list[_QA]


class _Sessions(BaseModel):
    model_config = ConfigDict(extra="ignore")

    speaker_a: str
    speaker_b: str
    sessions: dict[int, list[_Turn]]
    dates: dict[int, str]


def read_conversation(path: Path) -> Conversation:
    """One file, checked.

    A few of the published evidence ids name several utterances in one string, or none that exists: the former are
    taken apart and the latter dropped. Dates of sessions that are not there are ignored.

    Raises:
        KVCompressError: no such file, not JSON, fields missing or of another type, a session without a date, two
            utterances of one id, an answer missing.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise KVCompressError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise KVCompressError(f"{path} cannot be read as JSON: {error}") from None
    try:
        file = _File.model_validate(content)
        talk = file.conversation
        numbers = {key: int(match[1]) for key in talk if (match := _SESSION.fullmatch(key))}
        parts = _Sessions(
            speaker_a=talk.get("speaker_a"),  # type: ignore[arg-type]
            speaker_b=talk.get("speaker_b"),  # type: ignore[arg-type]
            sessions={number: talk[key] for key, number in numbers.items()},
            dates={number: talk.get(f"{key}_date_time") for key, number in numbers.items()},  # type: ignore[misc]
        )
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, e['loc'])) or 'the file'}: {e['msg']}" for e in error.errors()[:5]]
        raise KVCompressError(f"{path} is no LoCoMo conversation: {'; '.join(problems)}") from None
    sessions = [_session(number, parts.dates[number], turns) for number, turns in sorted(parts.sessions.items())]
    ids = Counter(utterance.id for session in sessions for utterance in session.utterances)
    if not ids:
        raise KVCompressError(f"{path} is no LoCoMo conversation: it has no utterances")
    if twice := [str(name) for name, count in ids.items() if count > 1]:
        raise KVCompressError(f"{path}: several utterances are called {', '.join(twice)}")
    questions = []
    for qa in file.qa:
        if qa.answer is None and qa.category is not Category.ADVERSARIAL:
            raise KVCompressError(f"{path}: no answer to the question {qa.question!r} of category {qa.category}")
        named = [_id(match) for text in qa.evidence for match in _DIALOGUE_ID.finditer(text)]
        evidence = tuple(dict.fromkeys(name for name in named if name in ids))
        questions.append(Question(qa.question, qa.answer, evidence, qa.category))
    return Conversation(path.stem, (parts.speaker_a, parts.speaker_b), tuple(sessions), tuple(questions))


def _session(number: int, date: str, turns: list[_Turn]) -> Session:
    utterances = []
    for turn in turns:
        picture = f" (shares {turn.blip_caption})" if turn.blip_caption else ""
        utterances.append(Utterance(turn.speaker, f"{turn.text}{picture}".strip(), turn.dia_id))
    return Session(number, date, tuple(utterances))


def read_folder(folder: Path) -> list[Conversation]:
    """Every *.json file of a folder, sorted by name.

    Raises:
        KVCompressError: none there; as `read_conversation`.
    """
    files = sorted(folder.glob("*.json"))
    if not files:
        raise KVCompressError(f"{folder} holds no *.json files; LoCoMo is at https://github.com/snap-research/locomo")
    return [read_conversation(path) for path in files]


def normalized_tokens(text: str) -> list[str]:
    """Words in lower case without ASCII punctuation and without a, an, the, and (SQuAD's rule and LoCoMo's `and`)."""
    plain = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the|and)\b", " ", plain).split()


def token_f1(prediction: str, answer: str) -> float:
    """Harmonic mean of precision and recall of the answer's words, counted with multiplicity; 0 to 1.

    As SQuAD (arXiv 1606.05250) and EpiCache score it. LoCoMo's own script stems the words first, which scores
    `painted` for `painting` as right; figures are a little lower here.
    """
    said, wanted = Counter(normalized_tokens(prediction)), Counter(normalized_tokens(answer))
    common = (said & wanted).total()
    return 2 * common / (said.total() + wanted.total()) if common else 0.0


def score(prediction: str, question: Question) -> float:
    """0 to 1, by the question's category as LoCoMo defines it.

    Multi-hop: the mean over the answer's parts, which commas separate, of the best F1 among the prediction's. Open
    domain: F1 to what stands before a semicolon; the reason follows it. Adversarial: whether the prediction says that
    there is no such information. Others: F1.
    """
    if question.category is Category.ADVERSARIAL:
        return float(any(refusal in prediction.lower() for refusal in _REFUSALS))
    assert question.answer is not None
    if question.category is Category.MULTI_HOP:
        parts = [max(token_f1(said, part) for said in prediction.split(",")) for part in question.answer.split(",")]
        return sum(parts) / len(parts)
    if question.category is Category.OPEN_DOMAIN:
        return token_f1(prediction, question.answer.split(";")[0])
    return token_f1(prediction, question.answer)
