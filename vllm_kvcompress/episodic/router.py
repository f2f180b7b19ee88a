# SPDX-License-Identifier: Apache-2.0
"""The episodes of a conversation as it grows, and the episode that a question is about.

**A function of the history.** A request carries its whole history and says nothing of earlier ones. So which windows
are clustered together is a function of the history alone: k-means sees the first s windows, for the largest s of a
fixed series that grows by a factor (1, 2, 3, 5, 8, 12, 18, ... for 1.5), and each later window joins the episode of the
nearest centroid, which then moves. Whatever the requests were that led to a history, and in whichever process, its
episodes are the same; what is remembered here saves time and nothing else. Over a conversation's life a window is
embedded factor / (factor - 1) times on average, 3 times for 1.5.

**Keys.** An episode's key is a hash of the history that was clustered, of its guide, the salt and the settings. It
stays while the conversation grows, until the next clustering, so pages built under it can be extended. How far they
have been built is the caller's to know: pages built when the history had t turns serve another history only if both
have the same `digests[t - 1]`.

**Changed histories.** Each turn's digest covers all turns before it (`identity.py`), so a history that was changed in
the middle has nothing in common with the old one from there on: it is embedded, and if need be clustered, anew.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from vllm_kvcompress.episodic.cluster import centroid_sums, cluster_windows, guide_prompt, medoids
from vllm_kvcompress.episodic.embed import Embedder, unit_rows
from vllm_kvcompress.episodic.identity import digest, turn_digests
from vllm_kvcompress.episodic.segment import Utterance, Window, segment
from vllm_kvcompress.episodic.settings import EpisodicSettings
from vllm_kvcompress.errors import KVCompressError

_KEY_VERSION = "1"
"""Changes with the meaning of keys and guides, so that pages kept by an older version are not taken."""


@dataclass(frozen=True)
class Episode:
    """One episode of a conversation at some length."""

    key: str
    """32 hex digits; what pages built for it are kept under."""
    guide: str
    """The prompt whose queries score the tokens to keep."""
    medoids: tuple[int, ...]
    """The windows that the guide quotes, in time order."""
    windows: tuple[int, ...]
    """Its windows, in time order; a new window joins without changing the key."""


@dataclass(frozen=True)
class Route:
    """Where a question belongs."""

    episode: int
    """Index into `EpisodeMap.episodes`."""
    similarity: tuple[float, ...]
    """To each episode, -1 to 1."""


@dataclass(frozen=True)
class _Clustering:
    """The full windows of a conversation in their episodes. Arrays are never written to."""

    embedder: Embedder
    vectors: np.ndarray  # [n, d] float32
    labels: np.ndarray  # [n] int64
    sums: np.ndarray  # [k, d] float32, of the vectors of each episode
    medoids: tuple[tuple[int, ...], ...]
    guides: tuple[str, ...]
    digest: str  # of the history that was clustered

    def extended(self, texts: Sequence[str]) -> _Clustering:
        """With further windows, each in the episode of the centroid nearest to it, which then moves."""
        if not texts:
            return self
        vectors = self.embedder.embed(texts)
        sums = self.sums.copy()
        labels = []
        for vector in vectors:
            labels.append(int(np.argmax(unit_rows(sums) @ vector)))
            sums[labels[-1]] += vector
        return replace(
            self,
            vectors=np.concatenate([self.vectors, vectors]),
            labels=np.concatenate([self.labels, labels]),
            sums=sums,
        )


@dataclass(frozen=True)
class EpisodeMap:
    """The episodes of one history."""

    windows: tuple[Window, ...]
    digests: tuple[str, ...]
    """One a turn, of the history up to and including it."""
    episodes: tuple[Episode, ...]
    """In the order in which they first occur; every window is in one."""
    clustered: int
    """How many windows the clustering saw; the others joined by centroid."""
    embedded: int
    """How many windows had to be embedded for this map; the others were remembered."""
    _clustering: _Clustering
    _routing: str

    def route(self, question: str) -> Route:
        """The episode a question is about; of one that has nothing in common with any, the latest window's."""
        clustering = self._clustering
        vector = clustering.embedder.embed([question])[0]
        if self._routing == "centroid":
            similarity = unit_rows(clustering.sums) @ vector
        else:
            nearness = clustering.vectors @ vector
            similarity = np.array([nearness[list(episode.windows)].max() for episode in self.episodes])
        best = int(similarity.argmax()) if vector.any() else int(clustering.labels[-1])
        return Route(best, tuple(similarity.tolist()))


class EpisodeRouter:
    """Makes `EpisodeMap`s and remembers them. Any number of threads may use one.

    A history of 700 turns that was never seen takes a few tenths of a second of one core, one of 10,000 turns several;
    one that has grown by a window takes a few percent of that. Call it outside of an event loop.
    """

    def __init__(self, settings: EpisodicSettings, embedder: Embedder, memory_bytes: int = 256 << 20) -> None:
        """
        Args:
            settings: of requests that bring none of their own.
            embedder: the one that `settings.embedder` names (`make_embedder`).
            memory_bytes: how much of histories to remember; what was not asked for the longest is forgotten first.
        """
        self._settings = settings
        self._embedder = embedder
        self._free = memory_bytes
        self._remembered: OrderedDict[tuple[str, int], _Clustering] = OrderedDict()
        self._lock = threading.Lock()

    def episodes(
        self, history: Sequence[Utterance], *, salt: str | None = None, settings: EpisodicSettings | None = None
    ) -> EpisodeMap:
        """The episodes of a history.

        Args:
            history: every turn before the question, those without text too.
            salt: the tenant's `cache_salt`; tenants of different salts share neither keys nor what is remembered.
            settings: of this request.

        Raises:
            KVCompressError: a history without any text, or settings with another embedder.
        """
        settings = settings or self._settings
        if settings.embedder != self._settings.embedder:
            raise KVCompressError(
                f"a request cannot change the embedder: it asks for {settings.embedder!r}, "
                f"the server was started with {self._settings.embedder!r}"
            )
        windows = segment(history, settings.window_utterances)
        if not windows:
            raise KVCompressError(f"a history of {len(history)} turns without any text has no episodes")
        salted = "no salt" if salt is None else f"salt {salt}"
        root = digest(_KEY_VERSION, salted, self._embedder.identity, settings.clustering_identity())
        digests = turn_digests(history, root)
        # A window that later turns will fill takes part, but is forgotten again; unless it is all there is.
        full = windows[:-1] if len(windows) > 1 and not windows[-1].full else windows
        clustered = clustered_windows(len(full), settings.growth)
        known, clustering = self._recall(full, digests, clustered)
        if clustering is None:
            clustering = self._cluster(windows[:clustered], digests[windows[clustered - 1].last_turn], settings)
        clustering = clustering.extended([window.text for window in full[max(known, clustered) :]])
        self._remember(full, digests, clustering)
        clustering = clustering.extended([window.text for window in windows[len(full) :]])
        episodes = [
            Episode(
                key=digest(clustering.digest, guide, settings.page_identity()),
                guide=guide,
                medoids=chosen,
                windows=tuple(np.flatnonzero(clustering.labels == index).tolist()),
            )
            for index, (guide, chosen) in enumerate(zip(clustering.guides, clustering.medoids, strict=True))
        ]
        return EpisodeMap(
            windows=tuple(windows),
            digests=tuple(digests),
            episodes=tuple(episodes),
            clustered=clustered,
            embedded=len(windows) - known,
            _clustering=clustering,
            _routing=settings.routing,
        )

    def _cluster(self, windows: Sequence[Window], history: str, settings: EpisodicSettings) -> _Clustering:
        texts = [window.text for window in windows]
        embedder = self._embedder.fitted(texts)
        vectors = embedder.embed(texts)
        labels = cluster_windows(vectors, settings.episodes)
        chosen = [tuple(medoids(vectors, labels, episode, settings.medoids)) for episode in range(labels.max() + 1)]
        return _Clustering(
            embedder=embedder,
            vectors=vectors,
            labels=labels,
            sums=centroid_sums(vectors, labels),
            medoids=tuple(chosen),
            guides=tuple(guide_prompt([texts[index] for index in indices]) for indices in chosen),
            digest=history,
        )

    def _recall(
        self, windows: Sequence[Window], digests: Sequence[str], clustered: int
    ) -> tuple[int, _Clustering | None]:
        """The most windows of this history that are remembered, and their clustering; (0, None) if none are.

        Of fewer than `clustered` windows the clustering is another one.
        """
        with self._lock:
            for count in range(len(windows), clustered - 1, -1):
                key = _memory_key(windows, digests, count)
                if key in self._remembered:
                    self._remembered.move_to_end(key)
                    return count, self._remembered[key]
        return 0, None

    def _remember(self, windows: Sequence[Window], digests: Sequence[str], clustering: _Clustering) -> None:
        key = _memory_key(windows, digests, len(windows))
        with self._lock:
            if key in self._remembered:
                return
            self._remembered[key] = clustering
            self._free -= clustering.vectors.nbytes
            while self._free < 0:
                self._free += self._remembered.popitem(last=False)[1].vectors.nbytes


def _memory_key(windows: Sequence[Window], digests: Sequence[str], count: int) -> tuple[str, int]:
    # A long turn spans several windows, which share its digest.
    return digests[windows[count - 1].last_turn], count


def clustered_windows(count: int, growth: float) -> int:
    """How many of a conversation's `count` >= 1 windows are clustered: the largest member of the series up to it."""
    size = 1
    while (larger := max(size + 1, math.ceil(size * growth))) <= count:
        size = larger
    return size
