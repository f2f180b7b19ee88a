# SPDX-License-Identifier: Apache-2.0
"""What a request asks of eviction: `vllm_xargs` over HTTP, `SamplingParams.extra_args` offline.

| argument | meaning |
|---|---|
| `kvcompress_budget` | tokens that a layer keeps per KV head (on average: setting `layer_budgets`), in whole pages |
| `kvcompress_policy` | one of `policies.POLICIES`; default: the server's |
| `kvcompress_guide` | token ids of the guide prompt (policies `epicache` and `epicache-keydiff`) |
| `kvcompress_protect` | first tokens that are never evicted, as a system prompt; the sinks never are |
| `kvcompress_keep` | keep the compacted pages of this prompt under a name when the request has finished |
| `kvcompress_episode` | begin with the pages kept under a name, if they are of this prompt's beginning |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from vllm_kvcompress.episodic.policies import POLICIES
from vllm_kvcompress.errors import KVCompressError

PREFIX = "kvcompress_"
BUDGET, POLICY, GUIDE, PROTECT, KEEP, EPISODE = (
    PREFIX + name for name in ("budget", "policy", "guide", "protect", "keep", "episode")
)
_ARGUMENTS = (BUDGET, POLICY, GUIDE, PROTECT, KEEP, EPISODE)
_MAX_NAME = 256


@dataclass(frozen=True)
class Eviction:
    """What an evicting request keeps."""

    budget_pages: int
    policy: str
    guide: tuple[int, ...]
    """token ids of the guide prompt; empty where the policy needs none"""
    protected_tokens: int
    """First tokens that are kept whatever their score; at least the sinks, which are read at their own positions"""
    recent_tokens: int
    """Last tokens that are not compacted yet"""
    block_tokens: int
    """Most tokens of a step, and those generated between two compactions"""
    keeps: bool = field(default=False, compare=False)
    """Whether the pages outlive the request"""

    def share(self, share: float, page_tokens: int) -> Eviction:
        """The same for layers that keep a share of the budget: at least a page beside what is protected."""
        if share == 1:
            return self
        least = -(-self.protected_tokens // page_tokens) + 1
        return replace(self, budget_pages=max(least, round(share * self.budget_pages)))

    def peak_pages(self, page_tokens: int) -> int:
        """Most pages held at once: the budget, one block, the recent window and two pages that are not full."""
        return self.budget_pages + -(-self.block_tokens // page_tokens) + -(-self.recent_tokens // page_tokens) + 2


@dataclass(frozen=True)
class Wanted:
    """A request's arguments, checked."""

    eviction: Eviction
    keep: str | None
    episode: str | None


@dataclass(frozen=True)
class Defaults:
    """Of the engine, where a request leaves them out."""

    policy: str
    block_tokens: int
    page_tokens: int
    sink_tokens: int
    recent_tokens: int
    vocabulary: int
    max_model_len: int


def parse(arguments: Mapping[str, Any] | None, defaults: Defaults) -> Wanted | None:
    """What a request's extra arguments ask for; None: to keep everything.

    Raises:
        KVCompressError: an unknown argument of ours, a wrong type or a value out of range.
    """
    given = {name: value for name, value in (arguments or {}).items() if name.startswith(PREFIX)}
    unknown = sorted(given.keys() - set(_ARGUMENTS))
    if unknown:
        raise KVCompressError(f"unknown argument {unknown[0]}={given[unknown[0]]!r}; known: {', '.join(_ARGUMENTS)}")
    if BUDGET not in given:
        if given:
            name, value = min(given.items())
            raise KVCompressError(f"{name}={value!r} needs {BUDGET}: without it nothing is evicted")
        return None
    policy = given.get(POLICY, defaults.policy)
    if not isinstance(policy, str) or policy not in POLICIES:
        raise KVCompressError(f"{POLICY}={policy!r} must be one of {', '.join(POLICIES)}")
    guide = _token_ids(given, GUIDE, defaults)
    if POLICIES[policy].queries == "guide":
        if not guide:
            raise KVCompressError(f"{POLICY}={policy} needs {GUIDE}, the token ids of a guide prompt")
    elif guide:
        raise KVCompressError(f"{GUIDE} is of no use to {POLICY}={policy}; remove it")
    protected = max(_count(given, PROTECT, 0), defaults.sink_tokens)
    page = defaults.page_tokens
    # A page beside what is protected, or nothing could be chosen.
    least = -(-protected // page) * page + page
    budget = _count(given, BUDGET, least)
    keep, episode = _name(given, KEEP), _name(given, EPISODE)
    eviction = Eviction(
        -(-budget // page), policy, guide, protected, defaults.recent_tokens, defaults.block_tokens, keep is not None
    )
    return Wanted(eviction, keep, episode)


def is_private(request: Any) -> bool:
    """Whether a request's pages and windows must stay its own: it evicts, so its tokens have seen less than others'."""
    params = request.sampling_params
    return params is not None and bool(params.extra_args) and BUDGET in params.extra_args


def _name(given: Mapping[str, Any], argument: str) -> str | None:
    value = given.get(argument)
    if value is not None and not (isinstance(value, str) and 0 < len(value) <= _MAX_NAME):
        raise KVCompressError(f"{argument}={value!r} must be a name of 1 to {_MAX_NAME} characters")
    return value


def _token_ids(given: Mapping[str, Any], argument: str, defaults: Defaults) -> tuple[int, ...]:
    value = given.get(argument, ())
    if not isinstance(value, list | tuple):
        raise KVCompressError(f"{argument} must be a list of token ids, got {value!r}")
    for token in value:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < defaults.vocabulary:
            raise KVCompressError(
                f"{argument} holds {token!r}, which is none of the token ids below {defaults.vocabulary}"
            )
    most = min(defaults.block_tokens, defaults.max_model_len // 2)
    if len(value) > most:
        raise KVCompressError(
            f"{argument} has {len(value)} tokens, at most {most} fit a step and the model's positions"
        )
    return tuple(value)


def _count(given: Mapping[str, Any], argument: str, least: int) -> int:
    value = given.get(argument, least)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise KVCompressError(f"{argument}={value!r} must be a whole number of tokens, {least} or more")
    return value
