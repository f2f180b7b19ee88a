# SPDX-License-Identifier: Apache-2.0
"""What is fed and scored at each context length. One engine reads all of it, one context after the other."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_kvcompress.errors import KVCompressError
from vllm_kvcompress.evaluation.prompts import Prompt
from vllm_kvcompress.evaluation.recall import Probe


@dataclass(frozen=True)
class Sizes:
    """How much is measured at one context length."""

    context: int
    """Tokens of every prompt."""
    chunks: int
    recall_depths: int
    recall_sentences: int


def pair_sizes(
    contexts: list[int], *, chunks: list[int], recall_depths: list[int], recall_sentences: list[int]
) -> list[Sizes]:
    """Sizes by ascending context; a list of one number serves every context.

    Raises:
        KVCompressError: a context named twice, or a list of another length than contexts.
    """
    for context in contexts:
        if contexts.count(context) > 1:
            raise KVCompressError(f"--context names {context} more than once")
    columns = {"chunks": chunks, "recall_depths": recall_depths, "recall_sentences": recall_sentences}
    for name, given in columns.items():
        if len(given) not in (1, len(contexts)):
            raise KVCompressError(
                f"--{name.replace('_', '-')} has {len(given)} numbers for the {len(contexts)} of --context: give one, "
                "or one for each"
            )
    sizes = []
    for index, context in enumerate(contexts):
        sizes.append(Sizes(context, **{name: given[index % len(given)] for name, given in columns.items()}))
    return sorted(sizes, key=lambda one: one.context)


@dataclass(frozen=True)
class Plan:
    """Prompts of one context length."""

    context: int
    text: list[Prompt]
    probes: list[Probe]

    @property
    def prompts(self) -> list[Prompt]:
        """In the order they are fed."""
        return [*self.text, *(probe.prompt for probe in self.probes)]
