# SPDX-License-Identifier: Apache-2.0
"""A conversation cut into windows of a few utterances, the units that are clustered into episodes.

EpiCache (arXiv 2509.17396), section 3: windows of `window_utterances` consecutive utterances that do not overlap. A
long turn counts as several utterances, cut between sentences, so that no window says more than a few hundred words.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vllm_kvcompress.errors import KVCompressError

WINDOW_UTTERANCES = 4
UTTERANCE_CHARACTERS = 500
"""A longer turn is cut, as in the code of EpiCache's authors. A guide of 4 windows then has at most 8000 characters."""

# The end of a sentence, with the space behind it; ideographic full stops have none. A line's end is one too.
_SENTENCE = re.compile(r"(?:(?<=[.!?…])[\"'”’)\]]*\s+|(?<=[。！？])|\n+)")
INSTRUCTION_ROLES = ("system", "developer")


@dataclass(frozen=True)
class Utterance:
    """One turn of a conversation."""

    speaker: str
    text: str
    id: str | None = None
    """The caller's own name for it; windows carry the names of their utterances."""
    rest: str = ""
    """What else the turn holds that a prompt may show; it tells histories apart and is not embedded."""


@dataclass(frozen=True)
class Window:
    """Consecutive utterances."""

    text: str
    """One line an utterance: `speaker: text`."""
    first_turn: int
    """Index of the first turn in it, among all turns given, empty ones included."""
    last_turn: int
    ids: tuple[str, ...]
    """Names of its utterances, of those that have one."""
    full: bool
    """Whether it has all its utterances, so that later turns leave it as it is."""


def chat_utterances(messages: Sequence[Mapping[str, Any]]) -> list[Utterance]:
    """OpenAI chat messages as utterances, one a message.

    System and developer messages have no text here: they are part of no episode, for the engine keeps them always.

    Args:
        messages: each with a `role`, and a `content` that is a string, None or a list of strings and text parts.

    Raises:
        KVCompressError: a message of another form, or with a part that is not text.
    """
    utterances = []
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise KVCompressError(f'message {number} must be an object with a "role", got {_shown(message)}')
        try:
            rest = json.dumps(message, sort_keys=True)
        except (TypeError, ValueError) as error:
            raise KVCompressError(f"message {number} is not JSON: {error}") from None
        text = content_text(message.get("content"), number)
        utterances.append(Utterance(message["role"], "" if message["role"] in INSTRUCTION_ROLES else text, rest=rest))
    return utterances


def content_text(content: Any, number: int) -> str:
    """The text of a chat message's content; parts are joined by line ends.

    Args:
        content: a string, None or a list of strings and text parts.
        number: of the message, for the error.

    Raises:
        KVCompressError: content of another form, or a part that is not text.
    """
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise KVCompressError(
            f"the content of message {number} must be a string or a list of text parts, got {_shown(content)}"
        )
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            raise KVCompressError(
                f"episodes are made of text only: message {number} has the part {_shown(part)}. "
                "Send such conversations without episodes."
            )
        texts.append(text)
    return "\n".join(texts)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def split_turn(text: str, limit: int = UTTERANCE_CHARACTERS) -> list[str]:
    """A turn's text as pieces of at most `limit` characters; joined they are the text.

    Whole sentences where they fit, else cut at a space, else anywhere.
    """
    pieces: list[str] = []
    start = 0
    while len(text) - start > limit:
        window = text[start : start + limit]
        cuts = [match.end() for match in _SENTENCE.finditer(window) if match.end()]
        cut = cuts[-1] if cuts else window.rfind(" ") + 1
        pieces.append(text[start : start + (cut or limit)])
        start += cut or limit
    return [*pieces, text[start:]]


def segment(utterances: Iterable[Utterance], window_utterances: int = WINDOW_UTTERANCES) -> list[Window]:
    """Windows in order; turns without text are in none. Only the last one may be incomplete.

    A window depends on the turns up to its last one alone, so a conversation that grows keeps its full windows.

    Raises:
        KVCompressError: window_utterances below 1.
    """
    if window_utterances < 1:
        raise KVCompressError(f"a window needs at least 1 utterance, got window_utterances={window_utterances}")
    pieces = [
        (turn, utterance, piece.strip())
        for turn, utterance in enumerate(utterances)
        for piece in split_turn(utterance.text)
        if piece.strip()
    ]
    windows = []
    for start in range(0, len(pieces), window_utterances):
        part = pieces[start : start + window_utterances]
        text = "\n".join(f"{utterance.speaker}: {piece}" for _, utterance, piece in part)
        windows.append(
            Window(
                # Half of a UTF-16 pair, which JSON can carry, is no text: no tokenizer takes it.
                text=text.encode("utf-8", "replace").decode("utf-8"),
                first_turn=part[0][0],
                last_turn=part[-1][0],
                ids=tuple(dict.fromkeys(utterance.id for _, utterance, _ in part if utterance.id is not None)),
                full=len(part) == window_utterances,
            )
        )
    return windows
