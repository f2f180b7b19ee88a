# SPDX-License-Identifier: Apache-2.0
"""Histories whose compacted pages are kept after the request that read them, for the questions to come.

An entry is found by its name and holds only for the very tokens it was made of, the same arguments of eviction and the
same `cache_salt`: a name alone never decides. Entries own their pages through vLLM's reference counts. They give way,
least recently used first, when a request needs room: to slots of host memory (`host`), where there are any, in which
again the least recently used give way. A question about a spilled entry gets new pages, which the worker fills before
the step that reads them; one about a lost entry reads the history again.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock

from vllm_kvcompress.episodic.host import Copy
from vllm_kvcompress.episodic.request import Eviction


@dataclass(frozen=True)
class Kept:
    """The first `num_tokens` tokens of a finished request, a whole number of pages."""

    digest: str
    num_tokens: int
    eviction: Eviction
    tables: dict[int, list[KVCacheBlock]]
    """KV cache group -> its blocks, null where evicted"""
    summed: tuple[str, int] = ("", 0)
    """The request whose scores, where a policy adds them up, are those of the first so many tokens"""

    @property
    def blocks(self) -> list[KVCacheBlock]:
        return [block for table in self.tables.values() for block in table if not block.is_null]


@dataclass(frozen=True)
class _Spilled:
    entry: Kept
    """Its blocks are others' by now, and say only where null ones were"""
    slots: list[int]
    """Of the host memory, in the order of `entry.blocks`"""


def digest(tokens: Sequence[int], salt: str | None) -> str:
    """Of a history's tokens and its tenant."""
    found = hashlib.sha256(repr(salt).encode() + b"\0")
    found.update(array("q", tokens).tobytes())
    return found.hexdigest()


class EpisodeStore:
    def __init__(self, pool: BlockPool, host_slots: int = 0) -> None:
        self._pool = pool
        self._entries: OrderedDict[str, Kept] = OrderedDict()
        self._offered: set[str] = set()
        self._spilled: OrderedDict[str, _Spilled] = OrderedDict()
        """Not in `_entries`"""
        self._arriving: dict[str, _Spilled] = {}
        """In `_entries` too, with new blocks that hold nothing yet"""
        self._free_slots = list(range(host_slots))
        self._stores: list[Copy] = []
        self.num_spilled, self.num_lost = 0, 0
        """Entries so far that gave way to host memory, and for good"""

    def __len__(self) -> int:
        return len(self._entries) + len(self._spilled)

    def scorers(self) -> set[str]:
        """Requests whose scores, as workers have them, entries begin with."""
        entries = [*self._entries.values(), *(spilled.entry for spilled in self._spilled.values())]
        return {entry.summed[0] for entry in entries}

    def block_ids(self, group: int) -> set[int]:
        """Of the pool's blocks that entries own in a KV cache group."""
        tables = (entry.tables[group] for entry in self._entries.values())
        return {block.block_id for table in tables for block in table if not block.is_null}

    def keep(self, name: str, entry: Kept) -> None:
        """Own the entry's blocks too; an older one of the name is let go."""
        self._pool.touch(entry.blocks)
        self._drop(name)
        self._entries[name] = entry

    def find(self, name: str, tokens: Sequence[int], salt: str | None, eviction: Eviction) -> Kept | None:
        """The entry of that name if it is of the beginning of `tokens`, and leaves at least one to compute.

        Of a spilled one, if there is room for its pages: `settle` says what has to be loaded.
        """
        spilled = self._spilled.get(name)
        entry = self._entries.get(name) if spilled is None else spilled.entry
        if entry is None or entry.eviction != eviction or entry.num_tokens >= len(tokens):
            return None
        if digest(tokens[: entry.num_tokens], salt) != entry.digest:
            return None
        if spilled is not None and not self._allocate(name, spilled):
            return None
        self._entries.move_to_end(name)
        self._offered.add(name)
        return self._entries[name]

    def _allocate(self, name: str, spilled: _Spilled) -> bool:
        """Give a spilled entry new blocks, if that many can be had."""
        del self._spilled[name]  # for its slots must not be given to those that make room for it
        self.make_room(len(spilled.slots))
        if self._pool.get_num_free_blocks() < len(spilled.slots):
            self._spilled[name] = spilled
            return False
        fresh = iter(self._pool.get_new_blocks(len(spilled.slots)))
        tables = {
            group: [block if block.is_null else next(fresh) for block in table]
            for group, table in spilled.entry.tables.items()
        }
        self._entries[name] = replace(spilled.entry, tables=tables)
        self._arriving[name] = spilled
        return True

    def is_arriving(self, name: str) -> bool:
        """Whether the entry was found in host memory in the scheduling step under way."""
        return name in self._arriving

    def settle(self) -> tuple[list[Copy], list[Copy]]:
        """The scheduling step is over: what was found in it has been taken over, or not.

        Returns:
            What the worker copies before the step's forward pass: to host memory first of all, from it last of all.
            Blocks that were spilled may be written by a compaction, and those to be loaded freed by another.
        """
        stores, self._stores = self._stores, []
        loads = []
        for name, spilled in self._arriving.items():
            blocks = self._entries[name].blocks
            if any(block.ref_cnt > 1 for block in blocks):
                loads.append(Copy([block.block_id for block in blocks], spilled.slots))
                self._free_slots += spilled.slots
            else:
                # The request was not admitted. It may not be for many steps, each of which would have loaded them.
                del self._entries[name]
                self._pool.free_blocks(reversed(blocks))
                self._spilled[name] = spilled
        self._arriving.clear()
        self._offered.clear()
        return stores, loads

    def make_room(self, blocks: int) -> None:
        """Spill entries, or let them go, until so many blocks are free, if that is possible."""
        for name in list(self._entries):
            if self._pool.get_num_free_blocks() >= blocks:
                return
            if name not in self._offered:
                self._spill(name)

    def clear(self) -> None:
        for name in [*self._entries, *self._spilled]:
            self._drop(name)

    def _spill(self, name: str) -> None:
        entry = self._entries[name]
        blocks = [block.block_id for block in entry.blocks]
        self._drop(name)
        if len(blocks) > len(self._free_slots) + sum(len(other.slots) for other in self._spilled.values()):
            self.num_lost += 1
            return
        while len(blocks) > len(self._free_slots):
            self._drop(next(iter(self._spilled)))
            self.num_lost += 1
        slots, self._free_slots = self._free_slots[: len(blocks)], self._free_slots[len(blocks) :]
        self._spilled[name] = _Spilled(entry, slots)
        self.num_spilled += 1
        self._stores.append(Copy(blocks, slots))

    def _drop(self, name: str) -> None:
        entry = self._entries.pop(name, None)
        if entry is not None:
            self._pool.free_blocks(reversed(entry.blocks))
        spilled = self._spilled.pop(name, None)
        if spilled is not None:
            self._free_slots += spilled.slots
