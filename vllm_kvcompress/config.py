# SPDX-License-Identifier: Apache-2.0
"""Settings: `--additional-config '{"kvcompress": {...}}'`, else `VLLM_KVCOMPRESS_<NAME>`, else the recipe's."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from vllm_kvcompress import recipes
from vllm_kvcompress.episodic.settings import EpisodicSettings
from vllm_kvcompress.errors import KVCompressError

NAMESPACE = "kvcompress"
_ENV_PREFIX = "VLLM_KVCOMPRESS_"

KernelSetting = Literal["auto", "cuda", "triton", "torch"]


class Settings(BaseModel):
    """What a user may set. None means: as the model's recipe says."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    rotation: Path | None = Field(None, description="rotation file; default: beside the model, then the user cache")
    sink_tokens: int | None = Field(None, ge=0, le=65536, description="first tokens kept in 16 bits (default 64)")
    recent_tokens: int | None = Field(None, ge=0, le=65536, description="last tokens kept in 16 bits (default 256)")
    episodic: EpisodicSettings | None = Field(None, description="eviction under a fixed budget of tokens a request")
    kernels: KernelSetting = Field("auto", description="auto: CUDA where it can, else Triton; torch on the CPU")

    @field_validator("episodic", mode="before")
    @classmethod
    def _from_environment(cls, value: Any) -> Any:
        """VLLM_KVCOMPRESS_EPISODIC holds JSON."""
        return json.loads(value) if isinstance(value, str) else value

    def windows(self, model: str) -> tuple[int, int]:
        """(sink_tokens, recent_tokens), each from here or else from the model's recipe."""
        sinks, recent = recipes.windows_for(model)
        return (
            sinks if self.sink_tokens is None else self.sink_tokens,
            recent if self.recent_tokens is None else self.recent_tokens,
        )


def load_settings(additional_config: Any, environ: Mapping[str, str] = os.environ) -> Settings:
    """Settings from vLLM's `additional_config` and the environment; the former wins.

    Raises:
        KVCompressError: an unknown key or a value out of range, with its name and value.
    """
    given = additional_config.get(NAMESPACE, {}) if isinstance(additional_config, Mapping) else {}
    if not isinstance(given, Mapping):
        raise KVCompressError(f'additional_config["{NAMESPACE}"] must be a JSON object, got {given!r}')
    from_environment = {
        name: environ[_ENV_PREFIX + name.upper()]
        for name in Settings.model_fields
        if environ.get(_ENV_PREFIX + name.upper())
    }
    try:
        return Settings.model_validate({**from_environment, **given})
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, e['loc']))}={e['input']!r}: {e['msg']}" for e in error.errors(include_url=False)
        )
        raise KVCompressError(
            f"bad {NAMESPACE} settings (--additional-config or {_ENV_PREFIX}*): {problems}. "
            f"Known settings: {', '.join(Settings.model_fields)}"
        ) from None
