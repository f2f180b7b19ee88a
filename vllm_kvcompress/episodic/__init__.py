# SPDX-License-Identifier: Apache-2.0
"""Episodes of long conversations: what a history is about, and which part of it a question is about.

After EpiCache (arXiv 2509.17396). Modules, in the order in which a history passes them: `segment` cuts it into windows,
`embed` makes vectors of them, `cluster` episodes, `router` keeps these as the history grows and routes questions;
`identity` tells histories apart, `settings` is what a user may set. None of these knows of the engine.

`policies` says which tokens a layer keeps, and how many, in plain torch.
"""

from vllm_kvcompress.episodic.embed import (
    Embedder,
    SentenceTransformerEmbedder,
    TokenEmbedder,
    make_embedder,
    token_embeddings,
)
from vllm_kvcompress.episodic.router import Episode, EpisodeMap, EpisodeRouter, Route
from vllm_kvcompress.episodic.segment import Utterance, Window, chat_utterances, segment
from vllm_kvcompress.episodic.settings import EpisodicSettings

__all__ = [
    "Embedder",
    "Episode",
    "EpisodeMap",
    "EpisodeRouter",
    "EpisodicSettings",
    "Route",
    "SentenceTransformerEmbedder",
    "TokenEmbedder",
    "Utterance",
    "Window",
    "chat_utterances",
    "make_embedder",
    "segment",
    "token_embeddings",
]
