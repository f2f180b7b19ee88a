# SPDX-License-Identifier: Apache-2.0
"""A conversation as the tokens that the model's chat template makes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from vllm_kvcompress.episodic.segment import INSTRUCTION_ROLES
from vllm_kvcompress.errors import KVCompressError

Message = Mapping[str, Any]


class ChatTemplate:
    """Tokens of chats under one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        """
        Args:
            tokenizer: of Hugging Face's, with a chat template.
        """
        self._tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text, without special tokens of the tokenizer's own."""
        # Half of a UTF-16 pair, which JSON can carry, is no text: no tokenizer takes it.
        text = text.encode("utf-8", "replace").decode("utf-8")
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def tokens(self, messages: Sequence[Message], *, answer: bool = False) -> list[int]:
        """Token ids of a whole chat.

        Args:
            messages: at least one, each with a `role` and a text as `content`.
            answer: end with the header under which the model answers.

        Raises:
            KVCompressError: the tokenizer has no template, or the template refuses the chat.
        """
        try:
            text = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=answer
            )
        except (TemplateError, ValueError) as error:
            raise KVCompressError(
                f"the model's chat template does not take this conversation ({len(messages)} messages, the last of "
                f"role {messages[-1]['role']!r}): {error}"
            ) from None
        return self.encode(text)

    def instruction_tokens(self, messages: Sequence[Message]) -> int:
        """How many tokens come before the first turn's text: the system prompt, the template's own one if it has any.

        Raises:
            KVCompressError: as `tokens`.
        """
        instructions = []
        for message in messages:
            if message["role"] not in INSTRUCTION_ROLES:
                break
            instructions.append(message)
        if len(instructions) == len(messages):
            return len(self.tokens(messages))
        # Some templates refuse a system prompt alone, so the first turn comes too, but with another text.
        first = dict(messages[len(instructions)])
        return common_tokens(self.tokens(messages), self.tokens([*instructions, first | {"content": ""}]))


def common_tokens(first: Sequence[int], second: Sequence[int]) -> int:
    """Length of the longest common beginning."""
    shorter = min(len(first), len(second))
    return next((index for index in range(shorter) if first[index] != second[index]), shorter)
