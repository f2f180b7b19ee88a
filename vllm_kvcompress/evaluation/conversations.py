# SPDX-License-Identifier: Apache-2.0
"""`kvcompress eval-conversations`, what is fed: LoCoMo conversations cut to a length, and questions about them.

**Whole blocks of history.** An engine evicts between its steps, and a step's own tokens see each other in full. So that
answers are scored after an eviction and not beside the latest, still complete part of the history, a history here has a
whole number of blocks: the question begins a step of its own, and everything before it has been through the eviction
that every longer history goes through. Beside its budget every policy still has what the engine never evicts before
it has aged: the format's recent window, in whole pages, and one page more (at least two).

**As a chat.** One speaker is the user and the other the assistant, by turns; each message names its speaker and begins
a session with its date. The oldest message is cut where the history would exceed its blocks. Questions of the user's
ask for an answer in few words, as the data's own answers are.
"""

from __future__ import annotations

import bisect
import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_kvcompress.episodic.template import ChatTemplate, Message
from vllm_kvcompress.errors import KVCompressError
from vllm_kvcompress.evaluation.locomo import Category, Conversation, Question, Session

_INSTRUCTIONS = (
    "You remember every conversation you have had. Answer questions about them with a short phrase, in the words of "
    "the conversation where you can."
)
_QUESTION = "Answer with a short phrase, from our conversations. {}"


@dataclass(frozen=True)
class History:
    """The part of a conversation that an engine is fed before the question."""

    conversation: Conversation
    """Only what is in `tokens`: utterances, and questions with all their evidence among them"""
    messages: list[Message]
    """As fed, but for the cut in the oldest one"""
    tokens: list[int]
    """A whole number of blocks"""
    protected_tokens: int
    """First ones, the system prompt"""


@dataclass(frozen=True)
class AskedQuestion:
    """One question, in tokens that follow those of its history."""

    history: int
    """Index of its history"""
    question: Question
    suffix: list[int]
    """The question's turn and the header of the answer's"""
    gold: list[int]
    """The gold answer"""


def cut_history(conversation: Conversation, template: ChatTemplate, *, limit: int, block: int) -> History:
    """The first `limit` tokens of a conversation in whole blocks, or fewer if it has fewer.

    Args:
        limit, block: tokens.

    Raises:
        KVCompressError: less than a block, or a template that changes earlier turns when later ones come.
    """
    speakers = [utterance.speaker for utterance in conversation.utterances]
    # Templates want turns to alternate: the history ends with the assistant's, for the question is the user's.
    ends = [count for count, speaker in enumerate(speakers, start=1) if speaker != speakers[0]]

    def tokens(count: int) -> list[int]:
        return template.tokens(_messages(conversation, count))

    total = len(tokens(ends[-1])) if ends else 0
    wanted = min(limit, total) // block * block
    if not wanted:
        raise KVCompressError(
            f"{conversation.name}: a history of {min(limit, total)} tokens is shorter than a block of {block}; raise "
            "--max-history or lower --block-tokens"
        )
    count = ends[bisect.bisect_left(ends, wanted, key=lambda end: len(tokens(end)))]
    whole = tokens(count)
    protected = template.instruction_tokens(_messages(conversation, count))
    cut = protected + len(whole) - wanted
    # What the cut reaches into is not known any more.
    lost = next(first for first in range(count) if len(tokens(first)) >= cut) if len(whole) > wanted else 0
    return History(
        conversation=_part(conversation, lost, count),
        messages=_messages(conversation, count),
        tokens=whole[:protected] + whole[cut:],
        protected_tokens=protected,
    )


def _messages(conversation: Conversation, count: int) -> list[Message]:
    """The first `count` utterances as a chat."""
    messages: list[dict[str, str]] = [{"role": "system", "content": _INSTRUCTIONS}]
    first = conversation.utterances[0].speaker
    for session in conversation.sessions:
        for number, utterance in enumerate(session.utterances[:count]):
            role = "user" if utterance.speaker == first else "assistant"
            line = f"{utterance.speaker}: {utterance.text}"
            if number == 0:
                line = f"[{session.date}]\n{line}"
            if messages[-1]["role"] == role:
                messages[-1]["content"] += f"\n{line}"
            else:
                messages.append({"role": role, "content": line})
        count -= min(count, len(session.utterances))
    return list(messages)


def _part(conversation: Conversation, first: int, stop: int) -> Conversation:
    """Utterances [first, stop), and the questions whose evidence is all among them."""
    known = {utterance.id for utterance in conversation.utterances[first:stop]}
    sessions = []
    start = 0
    for session in conversation.sessions:
        kept = session.utterances[max(0, first - start) : max(0, stop - start)]
        start += len(session.utterances)
        if kept:
            sessions.append(Session(session.number, session.date, kept))
    questions = [one for one in conversation.questions if one.evidence and known.issuperset(one.evidence)]
    return dataclasses.replace(conversation, sessions=tuple(sessions), questions=tuple(questions))


def answerable(conversation: Conversation) -> list[Question]:
    """Questions with a gold answer. Adversarial ones have none, as the conversation does not say."""
    return [one for one in conversation.questions if one.category is not Category.ADVERSARIAL and one.answer]


def ask_questions(
    histories: Sequence[History], template: ChatTemplate, *, per_history: int, block: int, seed: int
) -> list[AskedQuestion]:
    """Up to `per_history` questions about each history, drawn at random, in the order of the file.

    Raises:
        KVCompressError: none about any, a question that does not fit a step with its answer, or a template that
            changes the history when the question comes.
    """
    asked = []
    for index, history in enumerate(histories):
        known = answerable(history.conversation)
        chosen = random.Random(seed).sample(range(len(known)), min(per_history, len(known)))
        read = template.tokens(history.messages)
        for question in (known[number] for number in sorted(chosen)):
            message = {"role": "user", "content": _QUESTION.format(question.text)}
            whole = template.tokens([*history.messages, message], answer=True)
            if whole[: len(read)] != read:
                raise KVCompressError(
                    "the model's chat template changes earlier turns when a question follows, so histories cannot be "
                    "read before their questions; use another model"
                )
            suffix, gold = whole[len(read) :], template.encode(question.answer or "")
            if len(suffix) + len(gold) > block:
                raise KVCompressError(
                    f"a question of {len(suffix)} tokens and its answer of {len(gold)} are longer than --block-tokens "
                    f"{block}: {question.text!r}"
                )
            asked.append(AskedQuestion(index, question, suffix, gold))
    if not asked:
        raise KVCompressError(
            f"no questions with all their evidence in histories of {max(len(one.tokens) for one in histories)} tokens; "
            "raise --max-history or --conversations"
        )
    return asked
