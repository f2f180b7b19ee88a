# SPDX-License-Identifier: Apache-2.0
"""What both kinds of `episodic_soak.py` share: the server, made-up talk, a client, how far two answers are apart."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import random
import re
import urllib.request
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from openai import APIConnectionError, AsyncOpenAI

from vllm_kvcompress.demo.server import Server
from vllm_kvcompress.serving.middleware import HEADER

BUDGET, BLOCK, PAGE = 512, 256, 128
SETTINGS = {
    "sink_tokens": 32,
    "recent_tokens": 64,
    "episodic": {"budget": BUDGET, "block_tokens": BLOCK, "episodes": 2},
}
MAX_LEN, NEW_TOKENS = 3072, 8
ATTEMPTS = 5
REQUEST_SECONDS = 900

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


def make_turns(rng: random.Random, turns: int) -> Messages:
    topics = rng.sample(TOPICS, 2)
    found: Messages = []
    for turn in range(turns):
        words = {"topic": topics[turn // 5 % 2], "number": rng.randrange(1000, 9999), "day": rng.choice(DAYS)}
        for role, texts in (("user", SAID), ("assistant", REPLIES)):
            found.append({"role": role, "content": rng.choice(texts).format(**words)})
    return found


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


class Client:
    def __init__(self, url: str, model: str) -> None:
        self._url, self._model = url, model
        self._openai = AsyncOpenAI(base_url=f"{url}/v1", api_key="none", timeout=REQUEST_SECONDS, max_retries=0)

    async def ask(self, messages: Messages, salt: str | None, xargs: Mapping[str, Any] | None = None) -> Answer:
        """An answer from kept pages, if its history is long; asked again where the pages went before they were used."""
        for _ in range(ATTEMPTS):
            answer = await self._ask_once(messages, salt, xargs or {})
            if answer.episode is None or answer.cached:
                break
        return answer

    async def _ask_once(self, messages: Messages, salt: str | None, xargs: Mapping[str, Any]) -> Answer:
        raw = await self._openai.chat.completions.with_raw_response.create(
            **self._arguments(messages, salt, xargs), logprobs=True, top_logprobs=5
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

    async def complete(self, messages: Messages, salt: str | None, **changes: Any) -> Any:
        return await self._openai.chat.completions.create(**self._arguments(messages, salt) | changes)

    def _arguments(
        self, messages: Messages, salt: str | None, xargs: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        extra: dict[str, Any] = {"ignore_eos": True} | ({} if salt is None else {"cache_salt": salt})
        extra |= {"vllm_xargs": dict(xargs)} if xargs else {}
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


def resources() -> tuple[dict[str, int], int]:
    """Resident bytes by process name, and open descriptors, of all processes that this one started: the server's."""
    resident, descriptors = Counter[str](), 0
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            resident[process.name().removeprefix("VLLM::")] += process.memory_info().rss
            descriptors += process.num_fds()
    return dict(resident), descriptors


def log_errors(log: str, refused: int = 0) -> list[str]:
    """The first lines that tell of errors; those of so many refused requests aside, which vLLM answers with 400."""
    errors = [line for line in log.splitlines() if re.search(r"\b(ERROR|CRITICAL)\b|^Traceback", line)]
    of_requests = [line for line in errors if "] Exception caught. Request id" in line]
    errors = [line for line in errors if line not in of_requests[:refused]]
    return [f"the log says: {line}" for line in errors[:5]]


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
