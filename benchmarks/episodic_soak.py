# SPDX-License-Identifier: Apache-2.0
"""Random conversations over HTTP, many at once, against the same questions asked alone: whether it holds, not how fast.

    python benchmarks/episodic_soak.py [--conversations 200] [--concurrency 6] [--model DIR] [--random-weights]
    python benchmarks/episodic_soak.py --minutes 60 [...] (mixed load, at the end of this text)

One `vllm serve` with `episodic` settings and a pool that is too small for all. Conversations are made of a seed: short
ones, long ones with two questions, ones that grow and are asked again, ones whose client goes away and comes back; some
begin like another one, some have a `cache_salt`, some are another one's words under another salt. Afterwards a server
of the same settings and a roomy pool answers each question again, alone, its cache reset before. Checked:

- Every answer is the lone one: the same tokens, with log-probabilities within --bound; where a token differs, the lone
  server must hold the two for equal within the bound. A history that was read in two parts is compacted at other places
  than one read at once, and which of both happened depends on whether its pages were still there: an answer about a
  history that has grown must be one of the two. A short history that hits the prefix cache is read from pages where it
  was in its own chunk before: those have --hit-bound.
- Afterwards not a block is in use: vLLM resets its prefix cache only then.
- The log has no error, and the server's memory grew no more in the second half than in the first, 64 MiB aside.

Why a bound: a batch adds up floats in another order than a single request, by some 1e-6 of a value. Once in a while
that turns a key's code into the next one, or swaps two tokens of nearly equal score at the edge of the budget. 0.1 nat
is what engine tests allow for it; another conversation's answer mostly has other tokens, which is checked as well.

With --minutes the server gets short and long conversations, policies and budgets of the client's own, several choices
at once, streams that are left and requests that are too long, until the time is over. Now and then it is left to rest
and asked four fixed questions, of a tenant that it does not know. Checked:

- The fixed answers are what they were at first, within --bound; other requests are answered, those too long with 400.
- At rest no page is in use but those of kept episodes, and at the end, once these are let go, none.
- In the second half of the run no more files and connections are open than in the first, and the server's memory is
  at most 64 MiB above that of the first half, in runs of five minutes or more.
- The log has no error but of the requests that are too long.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _soak_common import (
    ATTEMPTS,
    MAX_LEN,
    NEW_TOKENS,
    PAGE,
    TOPICS,
    Answer,
    Client,
    Messages,
    difference,
    log_errors,
    make_turns,
    random_model,
    resources,
    serve,
)
from _soak_load import Load
from tqdm import tqdm

PEAK_BLOCKS = 24
"""Of an evicting request: budget, block, window and two pages; sinks and two windows of at least 32 tokens a block."""
KINDS = {"short": 0.2, "long": 0.35, "growing": 0.25, "aborted": 0.2}
START_SECONDS = 600
MEMORY_SLACK, ENOUGH_FOR_A_TREND = 64 << 20, 50


# --- conversations ----------------------------------------------------------------------------------------------------


@dataclass
class Question:
    """What is asked, and what came back."""

    messages: Messages
    first: Messages | None = None
    """The same question about the history as it was when it was asked before, if it has grown since"""
    answer: Answer | None = None


@dataclass
class Conversation:
    kind: str
    salt: str | None
    questions: list[Question] = field(default_factory=list)
    history: Messages = field(default_factory=list)


def make_conversations(rng: random.Random, count: int) -> list[Conversation]:
    found: list[Conversation] = []

    def ask(history: Messages, topic: str, first: Messages | None = None) -> Question:
        question = {"role": "user", "content": f"What did I tell you about {topic}?"}
        return Question([*history, question], None if first is None else [*first, question])

    for index in range(count):
        # Every kind once, then at random.
        kind = list(KINDS)[index] if index < len(KINDS) else rng.choices(list(KINDS), list(KINDS.values()))[0]
        salt = f"tenant {rng.randrange(5)}" if rng.random() < 0.3 else None
        turns = rng.randrange(2, 6) if kind == "short" else rng.randrange(24, 36)
        history = make_turns(rng, turns)
        if rng.random() < 0.5:
            history = [{"role": "system", "content": "You listen well."}, *history]
        kin = [other for other in found if (other.kind == "short") == (kind == "short")]
        if kin and rng.random() < 0.3:
            other = rng.choice(kin)
            if rng.random() < 0.3:  # the very same words of another tenant
                history, salt = list(other.history), f"twin {index}"
            else:
                shared = rng.randrange(2, len(other.history))
                shared -= other.history[shared]["role"] == "assistant"
                history, salt = other.history[:shared] + make_turns(rng, max(2, turns - shared // 2)), other.salt
        conversation = Conversation(kind, salt, history=history)
        if kind == "growing":
            grown = history + make_turns(rng, rng.randrange(8, 14))
            topic = rng.choice(TOPICS)  # the same question, so that it meets its episode again where that still is one
            conversation.questions = [ask(history, topic), ask(grown, topic, first=history)]
        else:
            topics = rng.sample(TOPICS, 2 if kind == "long" else 1)
            conversation.questions = [ask(history, topic) for topic in topics]
        found.append(conversation)
    return found


# --- the client -------------------------------------------------------------------------------------------------------


async def run_all(client: Client, conversations: list[Conversation], concurrency: int, rng: random.Random) -> list[int]:
    """Ask everything, in random order, so many at once; the server's memory after each conversation."""
    order = rng.sample(conversations, len(conversations))
    patience = {id(one): (rng.uniform(0.05, 4), rng.randrange(1, NEW_TOKENS)) for one in order}
    gate, found = asyncio.Semaphore(concurrency), []
    with tqdm(total=len(order), desc="together", unit="conversation") as bar:

        async def talk(one: Conversation) -> None:
            async with gate:
                for question in one.questions:
                    if one.kind == "aborted":
                        await client.go_away(question.messages, one.salt, *patience[id(one)])
                    question.answer = await client.ask(question.messages, one.salt)
            found.append(sum(resources()[0].values()))
            bar.update()

        await asyncio.gather(*map(talk, order))
    return found


# --- judging ----------------------------------------------------------------------------------------------------------


@dataclass
class Judged:
    kind: str
    hit: bool
    """A short history, part of which was in the prefix cache"""
    distance: float
    same_text: bool
    other: float
    """Distance to the answer to another conversation's question"""


async def judge(client: Client, conversations: list[Conversation]) -> tuple[list[Judged], int]:
    """Each question's answer against a lone one; how many lost their pages too often to be compared."""
    judged, lost, previous = [], 0, None
    for one in tqdm(conversations, desc="alone", unit="conversation"):
        for question in one.questions:
            found = question.answer
            assert found is not None
            if found.episode is not None and not found.cached:
                lost += 1
                continue
            client.reset()
            expected = [await client.ask(question.messages, one.salt)]
            if question.first is not None:
                client.reset()
                await client.ask(question.first, one.salt)
                expected.append(await client.ask(question.messages, one.salt))
            best = min(expected, key=lambda answer: difference(found, answer))
            judged.append(
                Judged(
                    one.kind, found.episode is None and found.cached > 0, difference(found, best),
                    found.tokens == best.tokens, math.inf if previous is None else difference(found, previous),
                )
            )  # fmt: skip
            if found.episode != best.episode:
                judged[-1].distance = math.inf
            previous = best
    return judged, lost


def failures(report: dict[str, Any], log: str, args: argparse.Namespace, judged: list[Judged]) -> list[str]:
    found = []
    for row in judged:
        bound = args.hit_bound if row.hit else args.bound
        if not row.distance <= bound:
            found.append(f"an answer of a {row.kind} conversation is {row.distance:.3f} nat off, {bound} allowed")
    if report["other_answers_far"] < report["other_answers"] * 3 / 4:
        found.append("the answers of different conversations are too alike to tell a mistake")
    if report["lost"] > len(judged) // 10:
        found.append(f"{report['lost']} answers lost their pages {ATTEMPTS} times: give the pool more --blocks")
    if not report["pool_free"]:
        found.append("blocks are in use after the last request and after kept episodes were let go")
    found += log_errors(log)
    first, half, last = report["memory_mib"]
    if args.conversations >= ENOUGH_FOR_A_TREND and last - half > half - first + MEMORY_SLACK / 2**20:
        found.append(
            f"the server's memory grew from {half} to {last} MiB in the second half, from {first} in the first"
        )
    return found


def compare(args: argparse.Namespace, model: str, blocks: int, logs: Path) -> tuple[dict[str, Any], list[str]]:
    """Conversations at once, then alone: report and failures."""
    rng = random.Random(args.seed)
    conversations = make_conversations(rng, args.conversations)
    began = time.perf_counter()
    with serve(model, logs / "soak.log", args.concurrency, blocks) as server:
        server.wait_until_ready(START_SECONDS)
        client = Client(server.url, model)
        grown = asyncio.run(run_all(client, conversations, args.concurrency, rng))
        preemptions, pool_free, log = client.metric("num_preemptions_total"), client.reset(), server.log_text()
    together = time.perf_counter() - began
    with serve(model, logs / "alone.log", 1, 4 * PEAK_BLOCKS + MAX_LEN // PAGE) as server:
        server.wait_until_ready(START_SECONDS)
        judged, lost = asyncio.run(judge(Client(server.url, model), conversations))
    others = [row.other for row in judged[1:]]
    report = {
        "kinds": {kind: sum(one.kind == kind for one in conversations) for kind in KINDS},
        "salted": sum(one.salt is not None for one in conversations),
        "evicted": sum(q.answer.episode is not None for one in conversations for q in one.questions if q.answer),
        "compared": len(judged),
        "same_text": sum(row.same_text for row in judged),
        "prefix_hits": sum(row.hit for row in judged),
        "largest_distance": max(row.distance for row in judged if not row.hit),
        "median_distance": statistics.median(row.distance for row in judged if not row.hit),
        "largest_distance_of_hits": max((row.distance for row in judged if row.hit), default=None),
        "other_answers": len(others),
        "other_answers_far": sum(row > 10 * args.bound for row in others),
        "lost": lost,
        "preemptions": preemptions,
        "pool_free": pool_free,
        "memory_mib": [round(grown[at] / 2**20) for at in (0, len(grown) // 2, len(grown) - 1)],
        "seconds": [round(together), round(time.perf_counter() - began - together)],
    }
    return report, failures(report, log, args, judged)


def load(args: argparse.Namespace, model: str, blocks: int, logs: Path) -> tuple[dict[str, Any], list[str]]:
    """Minutes of mixed load: report and failures; prints a table and plots beside --json."""
    # oneDNN keeps what it makes for the last 1024 shapes, and nearly every step has its own: a worker grows by 40 MiB
    # in 100 requests of different lengths, but not if they are of one length, nor without that cache.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "1")
    with serve(model, logs / "soak.log", args.concurrency, blocks) as server:
        server.wait_until_ready(START_SECONDS)
        found = Load(Client(server.url, model), args.concurrency, blocks, args.seed)
        asyncio.run(found.run(60 * args.minutes))
        log = server.log_text()
    print(found.table())
    if args.json:
        found.plot(args.json.with_suffix(".png"))
    return found.report(), found.failures(args.bound) + log_errors(log, found.asked["too long"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=200)
    parser.add_argument("--minutes", type=float, help="of mixed load, in place of --conversations")
    parser.add_argument("--concurrency", type=int, default=6, help="conversations at once (default: 6)")
    parser.add_argument("--blocks", type=int, help="of the pool; default: 16 a running request and 40 to keep")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, help="folder (default: the demo model)")
    parser.add_argument("--random-weights", action="store_true", help="a tiny random model with MODEL's tokenizer")
    parser.add_argument("--bound", type=float, default=0.1, help="nat (default: 0.1)")
    parser.add_argument("--hit-bound", type=float, default=2.0, help="of prefix hits (default: 2)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="and OUT's name with .png for a plot of --minutes")
    parser.add_argument("--logs", type=Path, metavar="DIR", help="keep what the servers print")
    args = parser.parse_args()
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"  # for /reset_prefix_cache
    model = args.model
    if model is None:
        from vllm_kvcompress.demo.model import fetch_demo_model

        model = fetch_demo_model(Path(".demo/smollm2-135m"))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if args.random_weights:
            model = random_model(folder / "model", model, args.seed)
        blocks = args.blocks or 16 * args.concurrency + 40
        report, wrong = (load if args.minutes else compare)(args, str(model), blocks, args.logs or folder)
    names = ("minutes",) if args.minutes else ("conversations", "hit_bound")
    settings = {
        "model": "random weights" if args.random_weights else Path(model).name,
        **{name: getattr(args, name) for name in (*names, "concurrency", "seed", "bound")},
        "blocks": blocks,
    }
    report = {"settings": settings, **report}
    print(json.dumps({name: value for name, value in report.items() if name != "looks"}, indent=1))
    if args.json:
        args.json.write_text(json.dumps({**report, "failures": wrong}, indent=1) + "\n", encoding="utf-8")
    for line in wrong:
        print(line, file=sys.stderr)
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
