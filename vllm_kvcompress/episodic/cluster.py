# SPDX-License-Identifier: Apache-2.0
"""Windows clustered into episodes, and the guide prompt that stands for an episode when its tokens are scored.

EpiCache (arXiv 2509.17396), section 3: k-means over the windows' vectors; an episode's guide is an instruction followed
by its medoids, the windows nearest to its centroid.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sklearn.cluster import KMeans

from vllm_kvcompress.episodic.embed import unit_rows

SEED = 42
RESTARTS = 10
GUIDE_INSTRUCTION = (
    "Here is a part of our conversation. Recall everything in the conversation so far that bears on it: who is "
    "involved, what happened, when and where, what was said, decided or planned, and each detail that a later question "
    "could be about.\n\n"
)


def cluster_windows(vectors: np.ndarray, episodes: int) -> np.ndarray:
    """The episode of each window: [n] int64, numbered from 0 in the order in which episodes first occur.

    Every number up to the largest occurs. There are fewer than `episodes` where there are fewer different vectors.

    Args:
        vectors: [n, d] float32 with n >= 1.
    """
    count = min(episodes, len(np.unique(vectors, axis=0)))
    labels = KMeans(count, n_init=RESTARTS, random_state=SEED).fit(vectors).labels_
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]


def centroid_sums(vectors: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """[k, d] float32: of each episode the sum of its windows' vectors, which points to its centroid.

    Args:
        vectors: [n, d] float32.
        labels: [n] int, 0 to k - 1.
    """
    sums = np.zeros((int(labels.max()) + 1, vectors.shape[1]), dtype=np.float32)
    np.add.at(sums, labels, vectors)
    return sums


def medoids(vectors: np.ndarray, labels: np.ndarray, episode: int, count: int) -> list[int]:
    """The `count` windows of an episode nearest to its centroid by cosine, or all if it has fewer, in time order.

    Args:
        vectors: [n, d] float32.
        labels: [n] int.
    """
    members = np.flatnonzero(labels == episode)
    nearness = vectors[members] @ unit_rows(vectors[members].sum(0))
    return sorted(members[np.argsort(-nearness, kind="stable")[:count]].tolist())


def guide_prompt(texts: Sequence[str]) -> str:
    """The text whose queries score the tokens to keep for an episode with the medoids `texts`."""
    return GUIDE_INSTRUCTION + "\n".join(texts)
