# SPDX-License-Identifier: Apache-2.0
"""Minutes of mixed load on one server, with looks at it whenever it is at rest (`episodic_soak.py --minutes`)."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import openai
from _common import environment, environment_line, figure, table
from _soak_common import (
    BUDGET,
    MAX_LEN,
    NEW_TOKENS,
    TOPICS,
    Answer,
    Client,
    Messages,
    difference,
    make_turns,
    resources,
)
from tqdm import tqdm

from vllm_kvcompress.episodic.policies import POLICIES
from vllm_kvcompress.episodic.request import BUDGET as BUDGET_ARGUMENT
from vllm_kvcompress.episodic.request import POLICY as POLICY_ARGUMENT

KINDS = {"short": 3, "long": 3, "policy": 2, "many": 2, "aborted": 4, "too long": 1}
"""Request -> how often"""
LOOKS, LONGEST_SECONDS, SHORTEST_SECONDS = 20, 60, 8
"""Looks in a run, but so many seconds of load at most and at least before each"""
REST_SECONDS = 60
ENOUGH_FOR_A_TREND = 300
MEMORY_SLACK = 64 << 20
"""Of a run's second half's highest look over that of its first, which fills the arenas of threads. The API server still
grows by histories that it remembers, up to a limit: by 7 MiB in the second half of ten minutes with 676 requests."""
MANY_ERRORS = 10


@dataclass(frozen=True)
class Look:
    """A server at rest."""

    seconds: float
    memory: dict[str, int]
    """Process -> resident bytes"""
    descriptors: int
    pages: int
    """In use: those of kept episodes"""
    kept: int
    """Episodes"""
    distances: list[float]
    """Of the fixed questions' answers to what they were at first"""


class Load:
    def __init__(self, client: Client, concurrency: int, blocks: int, seed: int) -> None:
        self._client, self._concurrency, self._blocks = client, concurrency, blocks
        self._rng = random.Random(seed)
        self._fixed = self._make_fixed()
        self._expected: list[Answer] = []
        self.asked: Counter[str] = Counter()
        self.looks: list[Look] = []
        self.errors: list[str] = []

    def _make_fixed(self) -> list[tuple[Messages, dict[str, Any]]]:
        """A question without eviction, and one with each of three policies."""
        history, question = make_turns(self._rng, 26), self._question()
        arguments = [{}, *({POLICY_ARGUMENT: policy} for policy in ("keydiff", "snapkv"))]
        return [([*history[:6], question], {}), *(([*history, question], extra) for extra in arguments)]

    def _question(self) -> dict[str, str]:
        return {"role": "user", "content": f"What did I tell you about {self._rng.choice(TOPICS)}?"}

    async def run(self, seconds: float) -> None:
        """Load and rest in turns until the time is over."""
        length = min(LONGEST_SECONDS, max(SHORTEST_SECONDS, seconds / LOOKS))
        begin = time.monotonic()
        with tqdm(total=round(seconds), desc="load", unit="s") as bar:
            await self._look(begin)
            while time.monotonic() - begin < seconds and len(self.errors) < MANY_ERRORS:
                end = time.monotonic() + length
                await asyncio.gather(*(self._ask_until(end) for _ in range(self._concurrency)))
                await self._look(begin)
                bar.set_postfix_str(f"{self.asked.total()} requests, {sum(self.looks[-1].memory.values()) >> 20} MiB")
                bar.update(min(bar.total, round(self.looks[-1].seconds)) - bar.n)
        await self._let_go()

    async def _ask_until(self, end: float) -> None:
        while time.monotonic() < end and len(self.errors) < MANY_ERRORS:
            kind = self._rng.choices(list(KINDS), list(KINDS.values()))[0]
            try:
                await self._ask(kind)
            except Exception as error:  # whatever it is, it is what the run is for
                self.errors.append(f"a request ({kind}) failed: {type(error).__name__}: {error}")
            self.asked[kind] += 1

    async def _ask(self, kind: str) -> None:
        rng, client = self._rng, self._client
        history = make_turns(rng, rng.randrange(2, 6) if kind == "short" else rng.randrange(24, 36))
        salt = f"tenant {rng.randrange(5)}" if rng.random() < 0.3 else None
        messages = [*history, self._question()]
        if kind == "too long":
            try:
                await client.complete([*make_turns(rng, MAX_LEN // 10), *messages], salt)
            except openai.BadRequestError:
                return
            raise AssertionError("it was answered")
        if kind == "many":
            choices = rng.randrange(2, 4)
            messages = messages[-rng.choice((5, len(messages))) :]
            answer = await client.complete(messages, salt, n=choices, temperature=1.0)
            assert [choice.finish_reason for choice in answer.choices] == choices * ["length"], answer
        elif kind == "aborted":
            await client.go_away(messages, salt, rng.uniform(0.05, 4), rng.randrange(1, NEW_TOKENS))
        elif kind == "policy":
            budget = rng.choice((BUDGET // 2, BUDGET))
            await client.ask(messages, salt, {POLICY_ARGUMENT: rng.choice(list(POLICIES)), BUDGET_ARGUMENT: budget})
        else:
            for question in [self._question() for _ in range(1 + (kind == "long"))]:
                await client.ask([*history, question], salt)

    async def _look(self, begin: float) -> None:
        end = time.monotonic() + REST_SECONDS
        while (running := self._requests()) and time.monotonic() < end:
            await asyncio.sleep(0.2)  # the server has yet to hear that the client of an aborted one has gone
        if running:
            self.errors.append(f"{running} requests still run {REST_SECONDS} s after their clients have gone")
        # A tenant that nobody has been: nothing of it is found from before.
        salt = f"look {len(self.looks)}"
        answers = [await self._client.ask(messages, salt, arguments) for messages, arguments in self._fixed]
        self._expected = self._expected or answers
        distances = [
            difference(found, expected) if found.episode == expected.episode else math.inf
            for found, expected in zip(answers, self._expected, strict=True)
        ]
        pages, kept = self._pages(), round(self._client.metric("kvcompress_kept_episodes"))
        self.looks.append(Look(time.monotonic() - begin, *resources(), pages, kept, distances))

    def _requests(self) -> int:
        return round(sum(self._client.metric(f"num_requests_{state}") for state in ("running", "waiting")))

    def _pages(self) -> int:
        return round(self._client.metric("kv_cache_usage_perc") * (self._blocks - 1))  # one is the null block

    async def _let_go(self) -> None:
        """Forget all that is kept: no page is in use then. An answer's numbers show it, as a reset sends none."""
        if not self._client.reset():
            self.errors.append("pages are in use after kept episodes were let go")
        await self._client.ask([self._question()], None)
        pages, kept = self._pages(), self._client.metric("kvcompress_kept_episodes")
        if pages or kept:
            self.errors.append(f"{pages} pages are in use and {kept:.0f} episodes kept after the last request")

    def failures(self, bound: float) -> list[str]:
        found = list(self.errors)
        for look in self.looks:
            if not max(look.distances) <= bound:
                found.append(
                    f"after {look.seconds:.0f} s the fixed answers are {look.distances} nat off, {bound} allowed"
                )
            if look.pages > 0 and not look.kept:
                found.append(f"after {look.seconds:.0f} s {look.pages} pages are in use, but no episode is kept")
        half = self.looks[-1].seconds / 2
        first, second = ([look for look in self.looks if (look.seconds > half) == later] for later in (False, True))
        # A connection is a descriptor, and clients leave theirs open for a while.
        grown = max(look.descriptors for look in second) - max(look.descriptors for look in first)
        if grown > self._concurrency:
            found.append(f"{grown} descriptors more are open in the second half than in the first")
        more = max(map(total, second)) - max(map(total, first))
        if self.looks[-1].seconds >= ENOUGH_FOR_A_TREND and more > MEMORY_SLACK:
            found.append(f"the server's memory grew by {more >> 20} MiB from the first half to the second")
        return found

    def report(self) -> dict[str, Any]:
        return {
            "asked": dict(self.asked),
            "largest_distance": max(max(look.distances) for look in self.looks),
            "memory_mib": {
                name: [look.memory.get(name, 0) >> 20 for look in self.looks] for name in self.looks[0].memory
            },
            "looks": [asdict(look) for look in self.looks],
        }

    def table(self) -> str:
        names = list(self.looks[0].memory)
        shown = self.looks[:: max(1, len(self.looks) // 12)]
        if shown[-1] is not self.looks[-1]:
            shown.append(self.looks[-1])
        rows = [
            [
                f"{look.seconds / 60:.1f}", *(str(look.memory.get(name, 0) >> 20) for name in names),
                str(look.descriptors), str(look.pages), str(look.kept), f"{max(look.distances):.1e}",
            ]
            for look in shown
        ]  # fmt: skip
        heads = ["minute", *(f"{name}, MiB" for name in names), "files", "pages in use", "kept episodes", "nat off"]
        return table(heads, rows)

    def plot(self, path: Path) -> None:
        drawn, (left, right) = figure(
            f"mixed load: {self.asked.total()} requests", environment_line(environment()), False, panels=2
        )
        minutes = [look.seconds / 60 for look in self.looks]
        for name in self.looks[0].memory:
            left.plot(minutes, [look.memory.get(name, 0) / 2**20 for look in self.looks], marker=".", label=name)
        left.plot(minutes, [total(look) / 2**20 for look in self.looks], color="black", label="all")
        left.set(xlabel="minutes", ylabel="resident MiB")
        for name in ("pages", "kept", "descriptors"):
            right.plot(minutes, [getattr(look, name) for look in self.looks], marker=".", label=name)
        right.axhline(self._blocks - 1, color="gray", linestyle=":", label="all pages")
        right.set(xlabel="minutes", ylabel="count, at rest")
        for ax in (left, right):
            ax.set_ylim(bottom=0)
            ax.grid(alpha=0.3)
            ax.legend(fontsize=7)
        drawn.savefig(path, dpi=120)


def total(look: Look) -> int:
    return sum(look.memory.values())
