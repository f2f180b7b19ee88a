# SPDX-License-Identifier: Apache-2.0
"""What a command needs of a model before it starts an engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_kvcompress.errors import KVCompressError

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def load_model_files(model: str, engine_args: dict[str, Any]) -> tuple[PretrainedConfig, Any]:
    """Configuration and tokenizer.

    Args:
        engine_args: keyword arguments of vllm.LLM, for `trust_remote_code`.

    Raises:
        KVCompressError: no such model.
    """
    from transformers import AutoConfig, AutoTokenizer

    trust = bool(engine_args.get("trust_remote_code", False))
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust)
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust)
    except (OSError, ValueError) as error:
        raise KVCompressError(f"cannot load {model}: {error}") from None
    return config, tokenizer


def check_limit(flag: str, context: int, config: PretrainedConfig) -> None:
    """
    Raises:
        KVCompressError: a context that the model has no positions for, with the flag that sets it.
    """
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and context > limit:
        raise KVCompressError(f"{flag} {context} is beyond the model's limit of {limit} tokens")


def sufficient_kv_bytes(config: PretrainedConfig, context: int) -> int:
    """KV cache for one chunk, generously: 16-bit pages, companion windows and rounding up to whole pages fit thrice."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    bytes_per_token = 2 * 2 * config.num_hidden_layers * heads * head_dim
    return max(256 << 20, 3 * bytes_per_token * (context + 1024))
