# SPDX-License-Identifier: Apache-2.0
"""Settings of episodes: how conversations are cut and routed, and what of them the engine keeps."""

from __future__ import annotations

from argparse import ArgumentTypeError
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from vllm_kvcompress.capacity.text import parse_bytes
from vllm_kvcompress.episodic.segment import WINDOW_UTTERANCES
from vllm_kvcompress.formats.base import PAGE_TOKENS

TOKENS = "tokens"
"""Name of the default embedder: the served model's own token embeddings."""
MIN_BUDGET = 4 * PAGE_TOKENS
"""Of the settings, which are for whole conversations; a request may ask for less."""

Policy = Literal["epicache", "epicache-keydiff", "streaming", "snapkv", "h2o", "keydiff"]
Routing = Literal["window", "centroid"]
LayerBudgets = Literal["uniform", "sensitivity"]


class EpisodicSettings(BaseModel):
    """What a user may set under `"episodic"`; only the budget must be."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    budget: int = Field(ge=MIN_BUDGET, description="tokens a layer keeps of a history, per KV head")
    block_tokens: int = Field(
        2048,
        ge=PAGE_TOKENS,
        multiple_of=PAGE_TOKENS,
        description="tokens prefilled between two evictions, and the longest step of any prompt",
    )
    threshold_tokens: int | None = Field(
        None, ge=1, description="histories up to this length are left alone (default budget + block_tokens)"
    )
    episodes: int = Field(4, ge=1, le=64, description="episodes of a conversation")
    window_utterances: int = Field(WINDOW_UTTERANCES, ge=1, le=64, description="utterances in a window")
    medoids: int = Field(4, ge=1, le=64, description="windows that an episode's guide prompt quotes")
    embedder: str = Field(
        TOKENS, min_length=1, description="tokens: the model's own embeddings; else a sentence-transformers model"
    )
    routing: Routing = Field(
        "window", description="to the episode of the window nearest to the question, or to the nearest centroid"
    )
    growth: float = Field(
        1.5, ge=1.1, le=16, description="episodes are made anew when the conversation has grown by this factor"
    )
    policy: Policy = Field("epicache-keydiff", description="which tokens are kept")
    layer_budgets: LayerBudgets = Field(
        "uniform", description="the budget in every layer, or on average: more where calibration found more sensitivity"
    )
    alpha: float | None = Field(
        None, ge=0, le=16, description="how unequal budgets by sensitivity are (default 1.1; Qwen 1.3)"
    )
    host_memory: int = Field(
        0, ge=0, description="bytes, or a size as 4GiB: kept episodes that must give way are moved there, up to so much"
    )

    @field_validator("host_memory", mode="before")
    @classmethod
    def _bytes(cls, value: Any) -> Any:
        try:
            return parse_bytes(value) if isinstance(value, str) else value
        except ArgumentTypeError as error:
            raise ValueError(str(error)) from None

    @model_validator(mode="after")
    def _threshold_above_budget(self) -> EpisodicSettings:
        if self.threshold_tokens is not None and self.threshold_tokens < self.budget:
            raise ValueError(
                f"threshold_tokens={self.threshold_tokens} is below budget={self.budget}: a history that fits the "
                "budget has nothing to evict. Raise threshold_tokens or lower budget"
            )
        return self

    @model_validator(mode="after")
    def _alpha_is_of_use(self) -> EpisodicSettings:
        if self.alpha is not None and self.layer_budgets == "uniform":
            raise ValueError(f'alpha={self.alpha} is of no use to uniform budgets: add "layer_budgets": "sensitivity"')
        return self

    @property
    def threshold(self) -> int:
        """Tokens up to which a history is left alone."""
        return self.budget + self.block_tokens if self.threshold_tokens is None else self.threshold_tokens

    def clustering_identity(self) -> str:
        """The settings that decide which episodes a conversation has."""
        return self.model_dump_json(include={"episodes", "window_utterances", "medoids", "embedder", "growth"})

    def page_identity(self) -> str:
        """The settings that decide what is kept of an episode."""
        return self.model_dump_json(include={"budget", "block_tokens", "policy", "layer_budgets", "alpha"})
