# SPDX-License-Identifier: Apache-2.0
"""Random conversations over HTTP, many at once, against the same questions asked alone: whether it holds, not how fast.

    python benchmarks/episodic_soak.py [--conversations 200] [--concurrency 6] [--model DIR] [--random-weights]

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
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import re
import statistics
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from openai import APIConnectionError, AsyncOpenAI
from tqdm import tqdm

from vllm_kvcompress.demo.server import Server
from vllm_kvcompress.serving.middleware import HEADER

BUDGET, BLOCK, PAGE = 512, 256, 128
SETTINGS = {
    "sink_tokens": 32,
    "recent_tokens": 64,
    "episodic": {"budget": BUDGET, "block_tokens": BLOCK, "episodes": 2},
}
MAX_LEN, NEW_TOKENS = 3072, 8
PEAK_BLOCKS = 24
"""Of an evicting request: budget, block, window and two pages; sinks and two windows of at least 32 tokens a block."""
KINDS = {"short": 0.2, "long": 0.35, "growing": 0.25, "aborted": 0.2}
ATTEMPTS = 5
START_SECONDS, REQUEST_SECONDS = 600, 900
MEMORY_SLACK, ENOUGH_FOR_A_TREND = 64 << 20, 50

Messages = list[dict[str, str]]

TOPICS = (
    "my tomatoes", "the violin", "my brother's boat", "the night shift", "our old dog", "the choir", "a leaking roof",
    "the train to Porto", "bees", "my thesis", "a lost passport", "the bakery", "chess", "our neighbours", "skis",
)  # fmt: skip
SAID = (
    "Something new about {topic}: number {number} came on a {day} and I did not expect it.",
    "I spent {number} minutes on {topic} this {day}, and tomorrow I will spend more.",
    "Do you remember {topic}? On {day} it was {number} again, just like last year.",
    "They asked me {number} questions about {topic}; I had no answer until {day}.",
)
REPLIES = ("That is quite something about {topic}, please go on.", "{number}? I would like to hear more of {topic}.")
DAYS = ("Monday", "Tuesday", "Thursday", "Saturday", "Sunday")


# --- conversations ----------------------------------------------------------------------------------------------------


@dataclass
class Question:
    """What is asked, and what came back."""

    messages: Messages
    first: Messages | None = None
    """The same question about the history as it was when it was asked before, if it has grown since"""
    answer: Answer | None = None


@dataclass(frozen=True)
class Answer:
    tokens: tuple[str, ...]
    logprobs: tuple[float, ...]
    tops: tuple[dict[str, float], ...]
    """The most likely tokens of each place"""
    episode: str | None
    """What the header says: which one of how many; None: nothing was evicted"""
    cached: int
    """Tokens from the prefix cache or a kept episode"""


@dataclass
class Conversation:
    kind: str
    salt: str | None
    questions: list[Question] = field(default_factory=list)
    history: Messages = field(default_factory=list)


def make_turns(rng: random.Random, turns: int) -> Messages:
    topics = rng.sample(TOPICS, 2)
    found: Messages = []
    for turn in range(turns):
        words = {"topic": topics[turn // 5 % 2], "number": rng.randrange(1000, 9999), "day": rng.choice(DAYS)}
        for role, texts in (("user", SAID), ("assistant", REPLIES)):
            found.append({"role": role, "content": rng.choice(texts).format(**words)})
    return found


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


class Client:
    def __init__(self, url: str, model: str) -> None:
        self._url, self._model = url, model
        self._openai = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=REQUEST_SECONDS, max_retries=0)

    async def ask(self, messages: Messages, salt: str | None) -> Answer:
        """An answer from kept pages, if its history is long; asked again where the pages went before they were used."""
        for _ in range(ATTEMPTS):
            answer = await self._ask_once(messages, salt)
            if answer.episode is None or answer.cached:
                break
        return answer

    async def _ask_once(self, messages: Messages, salt: str | None) -> Answer:
        raw = await self._openai.chat.completions.with_raw_response.create(
            **self._arguments(messages, salt), logprobs=True, top_logprobs=5
        )
        header, response = raw.headers.get(HEADER.decode()), raw.parse()
        content = response.choices[0].logprobs.content
        details = response.usage.prompt_tokens_details
        report = (response.model_extra or {}).get("kv_transfer_params") or {}
        cached = report["kvcompress"]["reused_tokens"] if report else (details.cached_tokens or 0 if details else 0)
        return Answer(
            tuple(entry.token for entry in content),
            tuple(entry.logprob for entry in content),
            tuple({top.token: top.logprob for top in entry.top_logprobs} for entry in content),
            None if header is None else header.split(";")[0],
            cached,
        )

    def _arguments(self, messages: Messages, salt: str | None) -> dict[str, Any]:
        extra: dict[str, Any] = {"ignore_eos": True} | ({} if salt is None else {"cache_salt": salt})
        return {
            "model": self._model, "messages": messages, "max_tokens": NEW_TOKENS, "temperature": 0, "extra_body": extra
        }  # fmt: skip

    async def go_away(self, messages: Messages, salt: str | None, seconds: float, events: int) -> None:
        """Begin to stream and leave: after so many seconds or events, whichever comes first."""

        async def stream() -> None:
            answer = await self._openai.chat.completions.create(**self._arguments(messages, salt), stream=True)
            async with answer:
                seen = 0
                async for _ in answer:
                    seen += 1
                    if seen == events:
                        return

        try:
            await asyncio.wait_for(stream(), seconds)
        except (TimeoutError, APIConnectionError):
            return

    def reset(self) -> bool:
        """Forget kept episodes and the prefix cache; whether nothing holds a block any more."""
        done = False
        for _ in range(2):  # the first lets go of what the second finds free
            request = urllib.request.Request(f"{self._url}/reset_prefix_cache?reset_external=true", method="POST")
            with urllib.request.urlopen(request, timeout=REQUEST_SECONDS) as response:
                done = bool(json.load(response)["success"])
        return done

    def metric(self, name: str) -> float:
        with urllib.request.urlopen(f"{self._url}/metrics", timeout=REQUEST_SECONDS) as response:
            found = re.findall(rf"^vllm:{name}\{{.*\}} (\S+)$", response.read().decode(), re.MULTILINE)
        return sum(map(float, found))


def memory() -> int:
    """Resident bytes of all processes that this one started: the server's."""
    total = 0
    for process in psutil.Process().children(recursive=True):
        try:
            total += process.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


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
            found.append(memory())
            bar.update()

        await asyncio.gather(*map(talk, order))
    return found


# --- judging ----------------------------------------------------------------------------------------------------------


def difference(found: Answer, expected: Answer) -> float:
    """Largest difference of log-probabilities up to the first token that differs.

    There: how much likelier the expected one is, to whom expects it; infinite where the other is not among the most
    likely five, or a log-probability is not a number.
    """
    worst = 0.0
    for place, (token, wanted) in enumerate(zip(found.tokens, expected.tokens, strict=True)):
        if token != wanted:
            tops = expected.tops[place]
            return max(worst, tops[wanted] - tops[token]) if token in tops else math.inf
        gap = abs(found.logprobs[place] - expected.logprobs[place])
        worst = max(worst, gap if gap >= 0 else math.inf)
    return worst


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


def serve(model: str, log: Path, concurrency: int, blocks: int) -> Server:
    arguments = ["--kv-cache-dtype", "turboquant-4", "--dtype", "float32", "--enforce-eager"]
    arguments += ["--max-model-len", str(MAX_LEN), "--max-num-seqs", str(concurrency)]
    # Every request gets a whole block in every step, however many run: or compactions would come at other places.
    arguments += ["--max-num-batched-tokens", str(concurrency * BLOCK), "--num-gpu-blocks-override", str(blocks)]
    arguments += ["--kv-cache-memory-bytes", str(1 << 30), "--enable-prompt-tokens-details"]
    arguments += ["--return-tokens-as-token-ids", "--additional-config", json.dumps({"kvcompress": SETTINGS})]
    return Server(model, arguments, log)


def random_model(folder: Path, tokenizer: Path, seed: int) -> Path:
    """A random Llama of two layers, 4 query and 2 KV heads, with the tokenizer of another model."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokens = AutoTokenizer.from_pretrained(tokenizer)
    tokens.save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=-(-len(tokens) // 64) * 64,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=MAX_LEN,
        initializer_range=0.15,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


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
    errors = [line for line in log.splitlines() if re.search(r"\b(ERROR|CRITICAL)\b|^Traceback", line)]
    found += [f"the log says: {line}" for line in errors[:5]]
    first, half, last = report["memory_mib"]
    if args.conversations >= ENOUGH_FOR_A_TREND and last - half > half - first + MEMORY_SLACK / 2**20:
        found.append(
            f"the server's memory grew from {half} to {last} MiB in the second half, from {first} in the first"
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=200)
    parser.add_argument("--concurrency", type=int, default=6, help="conversations at once (default: 6)")
    parser.add_argument("--blocks", type=int, help="of the pool; default: 16 a running request and 40 to keep")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, help="folder (default: the demo model)")
    parser.add_argument("--random-weights", action="store_true", help="a tiny random model with MODEL's tokenizer")
    parser.add_argument("--bound", type=float, default=0.1, help="nat (default: 0.1)")
    parser.add_argument("--hit-bound", type=float, default=2.0, help="of prefix hits (default: 2)")
    parser.add_argument("--json", type=Path, metavar="OUT")
    parser.add_argument("--logs", type=Path, metavar="DIR", help="keep what the servers print")
    args = parser.parse_args()
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"  # for /reset_prefix_cache
    model = args.model
    if model is None:
        from vllm_kvcompress.demo.model import fetch_demo_model

        model = fetch_demo_model(Path(".demo/smollm2-135m"))
    rng = random.Random(args.seed)
    conversations = make_conversations(rng, args.conversations)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if args.random_weights:
            model = random_model(folder / "model", model, args.seed)
        blocks = args.blocks or 16 * args.concurrency + 40
        logs = args.logs or folder
        with serve(str(model), logs / "soak.log", args.concurrency, blocks) as server:
            server.wait_until_ready(START_SECONDS)
            client = Client(server.url, str(model))
            grown = asyncio.run(run_all(client, conversations, args.concurrency, rng))
            preemptions, pool_free, log = client.metric("num_preemptions_total"), client.reset(), server.log_text()
        together = time.perf_counter() - began
        with serve(str(model), logs / "alone.log", 1, 4 * PEAK_BLOCKS + MAX_LEN // PAGE) as server:
            server.wait_until_ready(START_SECONDS)
            judged, lost = asyncio.run(judge(Client(server.url, str(model)), conversations))
    others = [row.other for row in judged[1:]]
    report = {
        "settings": {
            "model": "random weights" if args.random_weights else Path(model).name,
            **{name: getattr(args, name) for name in ("conversations", "concurrency", "seed", "bound", "hit_bound")},
            "blocks": blocks,
        },
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
    print(json.dumps(report, indent=1))
    wrong = failures(report, log, args, judged)
    if args.json:
        args.json.write_text(json.dumps({**report, "failures": wrong}, indent=1) + "\n", encoding="utf-8")
    for line in wrong:
        print(line, file=sys.stderr)
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
