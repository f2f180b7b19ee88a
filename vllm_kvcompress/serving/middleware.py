# SPDX-License-Identifier: Apache-2.0
"""Chat requests with a long history are answered from an episode of it; clients change nothing.

    client ── POST /v1/chat/completions ──▶ history over the threshold? ── no ──▶ vLLM, the very same bytes
                                                      │ yes
             episodes of the history, the question's one (threads) ──▶ not kept, or grown by a block?
                                                      │                       │ POST /v1/completions: read and keep it
                                                      ▼                       ▼
                        vLLM, with `vllm_xargs` that name the episode ◀───────┘

Prompts are rendered by the server itself (`/tokenize`), and what is kept holds for its very tokens (`store`), so a
history that changes, or a rendering that differs, costs time and never takes a wrong cache.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import re
from array import array
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from vllm_kvcompress import rotations
from vllm_kvcompress.checks import eviction_defaults
from vllm_kvcompress.config import load_settings
from vllm_kvcompress.episodic import request as arguments
from vllm_kvcompress.episodic.embed import served_embedder
from vllm_kvcompress.episodic.guide import guide_tokens
from vllm_kvcompress.episodic.identity import digest
from vllm_kvcompress.episodic.policies import POLICIES
from vllm_kvcompress.episodic.router import EpisodeMap, EpisodeRouter
from vllm_kvcompress.episodic.segment import INSTRUCTION_ROLES, chat_utterances
from vllm_kvcompress.episodic.settings import EpisodicSettings
from vllm_kvcompress.episodic.template import ChatTemplate, common_tokens
from vllm_kvcompress.errors import KVCompressError
from vllm_kvcompress.serving.loopback import (
    App,
    ClientGone,
    Message,
    Receive,
    Scope,
    Send,
    answer,
    post,
    read_body,
    with_body,
)

logger = logging.getLogger("vllm.kvcompress")

CHAT = "/v1/chat/completions"
HEADER = b"x-kvcompress-episode"
# What decides how messages become tokens, as `/tokenize` takes it.
_RENDERING = ("model", "tools", "chat_template", "chat_template_kwargs", "add_special_tokens")
_OVERRIDES = (arguments.BUDGET, arguments.POLICY)
_OWN = (arguments.GUIDE, arguments.KEEP, arguments.EPISODE, arguments.PROTECT)
_REUSED = re.compile(rb'"reused_tokens":\s*(\d+)')
_REMEMBERED = 4096
"""Episodes whose state is remembered here; of others the engine is asked to read the history again."""
_MAX_BYTES = 64 << 20
"""Of a body that is looked into. A history of a million tokens has a tenth of it; images may make any body larger."""


class _PassedOn(Exception):
    """The request goes to vLLM as it is, but for overrides of episodes that it has no use for; why, if unexpected."""

    def __init__(self, reason: str = "", body: bytes | None = None) -> None:
        super().__init__(reason)
        self.reason, self.body = reason, body


class _Refused(Exception):
    """An error of the request or its reading, as vLLM answered it: (status, content)."""


@dataclass
class _Kept:
    """What is known of an episode's pages in the engine."""

    lock: asyncio.Lock
    tokens: int = 0
    digest: str = ""
    """Of these tokens: histories that begin alike have an episode of one name until they are clustered anew"""


@dataclass(frozen=True)
class _Plan:
    body: bytes
    name: str
    header: bytes


class EpisodicMiddleware:
    """ASGI middleware, added where the settings say `episodic`."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._engine: _Engine | None = None
        self._starting = asyncio.Lock()
        self._kept: OrderedDict[str, _Kept] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"].removesuffix("/") != CHAT:
            await self._app(scope, receive, send)
            return
        body = await read_body(receive)
        if body is None:
            return
        try:
            plan = await self._plan(scope, receive, body)
        except ClientGone:
            return
        except _Refused as refusal:
            await answer(send, *refusal.args)
            return
        except RecursionError:  # nested deeper than JSON is read: vLLM says so
            await self._app(*with_body(scope, receive, body), send)
            return
        except _PassedOn as passed:
            if passed.reason:
                logger.warning("a long history is answered as it is, in full: %s", passed.reason)
            await self._app(*with_body(scope, receive, passed.body or body), send)
            return

        async def send_with_header(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (HEADER, plan.header)]
            elif (found := _REUSED.search(message.get("body", b""))) and found[1] == b"0":
                # The engine needed the room. The next question has the history read again.
                self._kept.pop(plan.name, None)
            await send(message)

        await self._app(*with_body(scope, receive, plan.body), send_with_header)

    async def _plan(self, scope: Scope, receive: Receive, body: bytes) -> _Plan:
        engine = await self._find_engine(scope)
        # A token has at least a byte.
        if len(body) <= engine.settings.threshold and arguments.PREFIX.encode() not in body:
            raise _PassedOn
        if len(body) > _MAX_BYTES:
            raise _PassedOn(f"its body of {len(body)} bytes is larger than {_MAX_BYTES}")
        try:
            request = json.loads(body)
        except ValueError:
            raise _PassedOn from None
        given = request.get("vllm_xargs") if isinstance(request, dict) else None
        messages = request.get("messages") if isinstance(request, dict) else None
        salt = request.get("cache_salt") if isinstance(request, dict) else None
        if (
            not isinstance(messages, list)
            or not isinstance(salt, str | None)  # names of another kind could look like another tenant's
            or not all(isinstance(message, dict) for message in messages)
            or (given is not None and (not isinstance(given, dict) or any(name in given for name in _OWN)))
        ):
            raise _PassedOn
        untouched = None
        if given and any(name in given for name in _OVERRIDES):
            try:
                engine.check(given)
            except KVCompressError as error:
                raise _Refused(
                    400, {"error": {"message": str(error), "type": "BadRequestError", "code": 400}}
                ) from None
            rest = {name: value for name, value in given.items() if name not in _OVERRIDES}
            untouched = json.dumps({**request, "vllm_xargs": rest}).encode()
        if len(messages) < 2 or messages[-1].get("role") != "user" or len(body) <= engine.settings.threshold:
            raise _PassedOn(body=untouched)
        tokens = await self._render(scope, receive, request, messages, True)
        if len(tokens) <= engine.settings.threshold:
            raise _PassedOn(body=untouched)
        *history, question = messages
        try:
            utterances, asked = chat_utterances(history), chat_utterances([question])[0].text
            episodes, index = await asyncio.to_thread(engine.route, utterances, asked, salt)
            episode = episodes.episodes[index]
        except KVCompressError as error:
            raise _PassedOn(str(error), untouched) from None
        past = common_tokens(tokens, await self._render(scope, receive, request, history, False))
        system = list(takewhile(lambda message: message.get("role") in INSTRUCTION_ROLES, history))
        protected = common_tokens(tokens, await self._render(scope, receive, request, system, False)) if system else 0
        xargs = await asyncio.to_thread(engine.arguments, episodes, index, protected, given or {})
        # The key stands for the server's settings; a client's own are another episode.
        name = digest(episode.key, str(xargs[arguments.BUDGET]), str(xargs[arguments.POLICY]))
        built = await self._build(scope, receive, request, tokens[:past], name, xargs, engine.block_tokens)
        changed = {**request, "vllm_xargs": {**(given or {}), **xargs, arguments.EPISODE: name}}
        header = f"{index + 1}/{len(episodes.episodes)}; {'built' if built else 'reused'}"
        return _Plan(json.dumps(changed).encode(), name, header.encode())

    async def _render(
        self, scope: Scope, receive: Receive, request: Mapping[str, Any], messages: Sequence[Any], ends: bool
    ) -> list[int]:
        content = {name: request[name] for name in _RENDERING if request.get(name) is not None}
        content |= {"messages": list(messages), "add_generation_prompt": ends}
        status, found = await post(self._app, scope, receive, "/tokenize", content)
        if status != 200:
            raise _PassedOn  # vLLM will say what is wrong with it
        return found["tokens"]

    async def _build(
        self,
        scope: Scope,
        receive: Receive,
        request: Mapping[str, Any],
        tokens: list[int],
        name: str,
        xargs: Mapping[str, Any],
        block_tokens: int,
    ) -> bool:
        """Have the history read and kept, unless all but a block of it is; whether that was necessary."""
        kept = self._kept.setdefault(name, _Kept(asyncio.Lock()))
        self._kept.move_to_end(name)
        while len(self._kept) > _REMEMBERED:
            self._kept.popitem(last=False)
        async with kept.lock:  # one of several questions at once has it read
            if (
                kept.tokens
                and len(tokens) - kept.tokens <= block_tokens
                and kept.digest == _digest(tokens, kept.tokens)
            ):
                return False
            content = {
                "model": request.get("model"),
                "prompt": tokens,
                # The second token has the last block of the prompt compacted.
                "max_tokens": 2,
                "temperature": 0,
                "ignore_eos": True,
                "vllm_xargs": {**xargs, arguments.KEEP: name, arguments.EPISODE: name},
                **{key: request[key] for key in ("cache_salt", "priority") if request.get(key) is not None},
            }
            status, found = await post(self._app, scope, receive, "/v1/completions", content)
            if status != 200:
                # The engine's error is the client's answer: what failed in blocks would not fare better in full.
                raise _Refused(status, found)
            report = (found.get("kv_transfer_params") or {}).get("kvcompress") or {}
            kept.tokens = report.get("kept_tokens", 0)
            kept.digest = _digest(tokens, kept.tokens)
            return True

    async def _find_engine(self, scope: Scope) -> _Engine:
        async with self._starting:
            if self._engine is None:
                self._engine = await asyncio.to_thread(_Engine, scope["app"].state.engine_client.vllm_config)
        return self._engine


def _digest(tokens: Sequence[int], count: int) -> str:
    return hashlib.sha256(array("q", tokens[:count]).tobytes()).hexdigest()


class _Engine:
    """What the middleware knows of the served model."""

    def __init__(self, vllm_config: Any) -> None:
        from transformers import AutoTokenizer

        settings = load_settings(vllm_config.additional_config).episodic
        assert settings is not None
        self.settings: EpisodicSettings = settings
        self._defaults = eviction_defaults(vllm_config)
        self.block_tokens = self._defaults.block_tokens
        model = vllm_config.model_config
        folder = rotations.model_folder(model.model, model.revision, vllm_config.load_config.download_dir)
        if folder is None:
            raise KVCompressError(f"episodes need the folder of {model.model}, which is not on this machine")
        tokenizer = AutoTokenizer.from_pretrained(model.tokenizer, revision=model.tokenizer_revision)
        self._encode = ChatTemplate(tokenizer).encode
        self._router = EpisodeRouter(settings, served_embedder(settings.embedder, folder, self._encode))

    def route(self, history: list[Any], question: str, salt: str | None) -> tuple[EpisodeMap, int]:
        """The history's episodes and the index of the question's."""
        found = self._router.episodes(history, salt=salt)
        return found, found.route(question).episode

    def check(self, given: Mapping[str, Any]) -> None:
        """Refuse a client's overrides that no episode could be read with.

        Raises:
            KVCompressError: with the argument and its value.
        """
        policy = given.get(arguments.POLICY, self.settings.policy)
        full = {arguments.BUDGET: self.settings.budget, **given, arguments.POLICY: policy}
        if isinstance(policy, str) and policy in POLICIES and POLICIES[policy].queries == "guide":
            full[arguments.GUIDE] = [0]
        arguments.parse(full, self._defaults)

    def arguments(self, episodes: EpisodeMap, index: int, protected: int, given: Mapping[str, Any]) -> dict[str, Any]:
        """The `vllm_xargs` that decide what is kept of an episode; the client's own budget and policy win."""
        policy = given.get(arguments.POLICY, self.settings.policy)
        found = {
            arguments.BUDGET: given.get(arguments.BUDGET, self.settings.budget),
            arguments.POLICY: policy,
            arguments.PROTECT: protected,
        }
        if POLICIES[policy].queries == "guide":
            limit = min(self.block_tokens, self._defaults.max_model_len // 2)
            found[arguments.GUIDE], _ = guide_tokens(episodes, index, self._encode, limit)
        return found
