# SPDX-License-Identifier: Apache-2.0
"""An episode's guide prompt in tokens, no longer than an engine's step."""

from __future__ import annotations

from collections.abc import Callable

from vllm_kvcompress.episodic.cluster import guide_prompt
from vllm_kvcompress.episodic.router import EpisodeMap


def guide_tokens(
    episodes: EpisodeMap, episode: int, encode: Callable[[str], list[int]], limit: int
) -> tuple[list[int], int]:
    """The guide of an episode in at most `limit` tokens, and how many of its windows it quotes.

    A guide that is too long loses whole windows, the longest first, which leaves most of them. If not even the shortest
    one fits, that one's end is cut.

    Args:
        episodes: of the history.
        episode: index into `episodes.episodes`.
        encode: text to token ids, without special tokens.
        limit: at least 1.
    """
    texts = [episodes.windows[index].text for index in episodes.episodes[episode].medoids]
    while len(tokens := encode(guide_prompt(texts))) > limit and len(texts) > 1:
        texts.remove(max(texts, key=lambda text: len(encode(text))))
    return tokens[:limit], len(texts)
