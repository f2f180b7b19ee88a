# SPDX-License-Identifier: Apache-2.0
"""Histories whose compacted pages are kept after the request that read them, for the questions to come.

An entry is found by its name and holds only for the very tokens it was made of, the same arguments of eviction and the
same `cache_salt`: a name alone never decides. Entries own their pages through vLLM's reference counts. They give way,
least recently used first, when a request needs room; a question about a lost one reads the history again.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock

from vllm_kvcompress.episodic.request import Eviction


@dataclass(frozen=True)
class Kept:
    """The first `num_tokens` tokens of a finished request, a whole number of pages."""

    digest: str
    num_tokens: int
    eviction: Eviction
    tables: dict[int, list[KVCacheBlock]]
    """KV cache group -> its blocks, null where evicted"""
    end: int
    """Pages [eviction.budget_pages, end) are null; 0: nothing was evicted"""

    @property
    def blocks(self) -> list[KVCacheBlock]:
        return [block for table in self.tables.values() for block in table if not block.is_null]


def digest(tokens: Sequence[int], salt: str | None) -> str:
    """Of a history's tokens and its tenant."""
    found = hashlib.sha256(repr(salt).encode() + b"\0")
    found.update(array("q", tokens).tobytes())
    return found.hexdigest()


class EpisodeStore:
    def __init__(self, pool: BlockPool) -> None:
        self._pool = pool
        self._entries: OrderedDict[str, Kept] = OrderedDict()
        self._offered: set[str] = set()

    def __len__(self) -> int:
        return len(self._entries)

    def keep(self, name: str, entry: Kept) -> None:
        """Own the entry's blocks too; an older one of the name is let go."""
        self._pool.touch(entry.blocks)
        self._drop(name)
        self._entries[name] = entry

    def find(self, name: str, tokens: Sequence[int], salt: str | None, eviction: Eviction) -> Kept | None:
        """The entry of that name if it is of the beginning of `tokens`, and leaves at least one to compute."""
        entry = self._entries.get(name)
        if entry is None or entry.eviction != eviction or entry.num_tokens >= len(tokens):
            return None
        if digest(tokens[: entry.num_tokens], salt) != entry.digest:
            return None
        self._entries.move_to_end(name)
        self._offered.add(name)
        return entry

    def settle(self) -> None:
        """The scheduling step is over: what was found in it has been taken over, or not."""
        self._offered.clear()

    def make_room(self, blocks: int) -> None:
        """Let go of entries until so many blocks are free, if that is possible."""
        for name in list(self._entries):
            if self._pool.get_num_free_blocks() >= blocks:
                return
            if name not in self._offered:
                self._drop(name)

    def clear(self) -> None:
        for name in list(self._entries):
            self._drop(name)

    def _drop(self, name: str) -> None:
        entry = self._entries.pop(name, None)
        if entry is not None:
            self._pool.free_blocks(reversed(entry.blocks))
