# SPDX-License-Identifier: Apache-2.0
"""A conversation of any length with a model in this process: `EpisodicChat(llm)`.

    llm = LLM(MODEL, kv_cache_dtype="oscar-int2", additional_config={"kvcompress": {"episodic": {"budget": 4096}}})
    chat = EpisodicChat(llm)
    chat.append("user", "...")
    print(chat.ask("What did I say about the garden?").text)

A history of up to `settings.threshold` tokens is sent as it is. Of a longer one the engine keeps `settings.budget`
tokens a layer, those that matter to the episode the question is about; the system prompt stays whole. Nothing is
shortened in the text: tokens keep their positions, so the history must fit `max_model_len`.

The history is read once for an episode, in steps of at most `settings.block_tokens` with an eviction after each, and
kept by the engine; each question begins with what was kept. Up to a block of the latest history is read with the
question, in full; when it has grown by more, the new part is read and evicted over what was kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

from vllm_kvcompress.checks import eviction_defaults
from vllm_kvcompress.config import load_settings
from vllm_kvcompress.episodic import request
from vllm_kvcompress.episodic.embed import Embedder, served_embedder
from vllm_kvcompress.episodic.guide import guide_tokens
from vllm_kvcompress.episodic.identity import digest
from vllm_kvcompress.episodic.policies import POLICIES
from vllm_kvcompress.episodic.router import EpisodeMap, EpisodeRouter
from vllm_kvcompress.episodic.segment import chat_utterances, content_text
from vllm_kvcompress.episodic.settings import EpisodicSettings
from vllm_kvcompress.episodic.template import ChatTemplate, Message, common_tokens
from vllm_kvcompress.errors import KVCompressError
from vllm_kvcompress.rotations import model_folder

ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class Answer:
    """What the model said, and of how much of the history it knew."""

    text: str
    prompt_tokens: int
    """Of the whole history with the question, evicted ones included"""
    evicted: bool
    """Whether the history was longer than the threshold, so that only a budget of it was kept"""
    episode: int | None
    """The episode the question was routed to, from 0; None if nothing was evicted or the policy needs no guide"""
    episodes: int
    """How many the history has; 0 if it was not looked at"""
    guide_windows: int
    """Windows that the episode's guide quotes; fewer than `settings.medoids` if they did not fit a step"""
    reused: int
    """Tokens of the prompt that were not computed: the engine had the pages kept, or in its prefix cache"""
    finish_reason: str | None
    """As vLLM's: `stop`, or `length` for an answer cut at max_tokens"""


class EpisodicChat:
    """One conversation with an engine in this process. Not for several threads at once, as `vllm.LLM` is not."""

    def __init__(
        self,
        llm: Any,
        settings: EpisodicSettings | None = None,
        *,
        salt: str | None = None,
        embedder: Embedder | None = None,
    ) -> None:
        """
        Args:
            llm: a `vllm.LLM` with `episodic` settings.
            settings: of this conversation; default: the engine's.
            salt: the tenant's `cache_salt`; conversations of different salts share no pages.
            embedder: of windows and questions; default: the one that the settings name.

        Raises:
            KVCompressError: an engine that does not evict, or as `make_embedder`.
        """
        self._llm = llm
        self._config = llm.llm_engine.vllm_config
        engine_settings = load_settings(self._config.additional_config).episodic
        if engine_settings is None:
            raise KVCompressError(
                "EpisodicChat needs an engine that evicts, this one has no episodic settings. Start it with "
                'LLM(MODEL, kv_cache_dtype="oscar-int2", '
                'additional_config={"kvcompress": {"episodic": {"budget": 4096}}})'
            )
        self._settings = settings or engine_settings
        self._salt = salt
        self._template = ChatTemplate(llm.get_tokenizer())
        self._router = EpisodeRouter(self._settings, embedder or self._default_embedder())
        self._messages: list[Message] = []
        self._kept: dict[str | None, int] = {}
        """Tokens of the history whose pages the engine has, by episode"""

    def _default_embedder(self) -> Embedder:
        model = self._config.model_config
        folder = model_folder(model.model, model.revision, self._config.load_config.download_dir)
        if folder is None:
            raise KVCompressError(
                f"the weights of {model.model} are not on this machine; give their folder to LLM, or an embedder"
            )
        return served_embedder(self._settings.embedder, folder, self._template.encode)

    @property
    def messages(self) -> tuple[Message, ...]:
        """The history, as it stands."""
        return tuple(self._messages)

    @overload
    def append(self, role: str, content: Any) -> None: ...

    @overload
    def append(self, role: Sequence[Message]) -> None: ...

    def append(self, role: str | Sequence[Message], content: Any = None) -> None:
        """Add a message, `append("user", "Hello")`, or several as the OpenAI API has them. All or, on error, none.

        Raises:
            KVCompressError: an unknown role, or content that is not text.
        """
        given = [{"role": role, "content": content}] if isinstance(role, str) else role
        added = []
        for number, message in enumerate(given, start=len(self._messages)):
            if not isinstance(message, Mapping) or message.get("role") not in ROLES:
                shown = message.get("role") if isinstance(message, Mapping) else message
                raise KVCompressError(f"message {number} has the role {shown!r}; known: {', '.join(ROLES)}")
            added.append({**message, "content": content_text(message.get("content"), number)})
        self._messages += added

    def ask(
        self, question: str, *, max_tokens: int = 256, remember: bool = True, keep: bool = True, **sampling: Any
    ) -> Answer:
        """The model's answer to a question about the history.

        Args:
            max_tokens: of the answer.
            keep: have a long history's compacted pages kept in the engine, where they are not yet, for this question
                and those to come about the same episode. False reads the history for this question alone.
            remember: append question and answer to the history, as a chat goes on. False leaves it as it is, to ask
                many questions about one history.
            sampling: as `vllm.SamplingParams`, such as temperature=0.

        Raises:
            KVCompressError: an empty history, one that does not fit the model, a sampling argument of ours.
        """
        if not self._messages:
            raise KVCompressError("the history is empty: append() the conversation before asking about it")
        asked = [*self._messages, {"role": "user", "content": content_text(question, len(self._messages))}]
        prompt = self._template.tokens(asked, answer=True)
        longest = self._config.model_config.max_model_len
        if len(prompt) >= longest:
            raise KVCompressError(
                f"history and question have {len(prompt)} tokens, which leaves no room for an answer within "
                f"max_model_len={longest}. Evicted tokens count: positions are those of the whole conversation. Start "
                "the engine with a larger max_model_len, if the model allows it, or leave out the oldest messages"
            )
        extra = dict(sampling.pop("extra_args", None) or {})
        if ours := sorted(name for name in extra if name.startswith(request.PREFIX)):
            raise KVCompressError(f"{ours[0]} is not for extra_args here; give EpisodicChat its settings instead")
        evict = len(self._template.tokens(self._messages)) > self._settings.threshold
        episodes: EpisodeMap | None = None
        episode, windows = None, 0
        if evict:
            arguments: dict[str, Any] = {
                request.BUDGET: self._settings.budget,
                request.POLICY: self._settings.policy,
                request.PROTECT: self._template.instruction_tokens(self._messages),
            }
            if POLICIES[self._settings.policy].queries == "guide":
                episodes = self._router.episodes(chat_utterances(self._messages), salt=self._salt)
                episode = episodes.route(asked[-1]["content"]).episode
                limit = self._guide_limit(len(prompt) + max_tokens)
                arguments[request.GUIDE], windows = guide_tokens(episodes, episode, self._template.encode, limit)
            extra |= arguments
            if keep:
                key = "no guide" if episodes is None or episode is None else episodes.episodes[episode].key
                extra[request.EPISODE] = self._keep(prompt, key, arguments)
        output = self._generate(prompt, max_tokens, sampling, extra)
        said = output.outputs[0]
        if not output.num_cached_tokens:
            self._kept.pop(extra.get(request.EPISODE), None)  # the engine needed the room
        if remember:
            self._messages += [asked[-1], {"role": "assistant", "content": said.text}]
        return Answer(
            text=said.text,
            prompt_tokens=len(prompt),
            evicted=evict,
            episode=episode,
            episodes=0 if episodes is None else len(episodes.episodes),
            guide_windows=windows,
            reused=output.num_cached_tokens or 0,
            finish_reason=said.finish_reason,
        )

    def _keep(self, prompt: list[int], key: str, arguments: Mapping[str, Any]) -> str:
        """The name under which the engine has the history's pages, all but a block at most."""
        name = digest("chat", repr(self._salt), key, str(arguments[request.BUDGET]), str(arguments[request.POLICY]))
        history = prompt[: common_tokens(prompt, self._template.tokens(self._messages))]
        if len(history) - self._kept.get(name, 0) > eviction_defaults(self._config).block_tokens:
            extra = {**arguments, request.KEEP: name, request.EPISODE: name}
            # The second token has the last block of the prompt compacted.
            output = self._generate(history, 2, {"temperature": 0, "ignore_eos": True}, extra)
            self._kept[name] = ((output.kv_transfer_params or {}).get("kvcompress") or {}).get("kept_tokens", 0)
        return name

    def _guide_limit(self, tokens: int) -> int:
        """Longest guide after `tokens`: a step's, and its positions must be within the model's too."""
        room = self._config.model_config.max_model_len - tokens
        if room < 1:
            raise KVCompressError(
                f"history, question and max_tokens come to {tokens} tokens, which leaves no positions for the guide "
                f"within max_model_len={self._config.model_config.max_model_len}. Lower max_tokens, or start the "
                "engine with a larger max_model_len"
            )
        return min(room, eviction_defaults(self._config).block_tokens)

    def _generate(self, prompt: list[int], max_tokens: int, sampling: dict[str, Any], extra: dict[str, Any]) -> Any:
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=max_tokens, extra_args=extra or None, **sampling)
        inputs: dict[str, Any] = {"prompt_token_ids": prompt}
        if self._salt is not None:
            inputs["cache_salt"] = self._salt
        return self._llm.generate(inputs, params, use_tqdm=False)[0]
