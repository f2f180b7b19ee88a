# SPDX-License-Identifier: Apache-2.0
"""Tiny random models with real architectures, and a tokenizer of bytes, built on the spot."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

VOCABULARY = 256
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 96,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "max_position_embeddings": 2048,
    "head_dim": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**_SIZES, num_attention_heads=6, num_key_value_heads=2),
    # Biases of keys and values, as in Qwen2: made large below, for a random model has none.
    "qwen2": Qwen2Config(**{**_SIZES, "head_dim": 64}, num_attention_heads=4, num_key_value_heads=2),
    "gemma3": Gemma3TextConfig(
        **_SIZES,
        num_attention_heads=4,
        num_key_value_heads=1,
        query_pre_attn_scalar=64,
        sliding_window=48,
        layer_types=["sliding_attention", "full_attention", "full_attention"],
    ),
}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def build(folder: Path, config: Any) -> Path:
    torch.manual_seed(torch.seed() % 2**31)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("k_proj.bias"):
                parameter.copy_(torch.randn_like(parameter) * 3)
            elif "q_proj.weight" in name or "k_proj.weight" in name:
                parameter.mul_(8)  # scores of a random model are all alike otherwise
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("models")
    return {name: build(base / name, config) for name, config in CONFIGS.items()}


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture
def sequences() -> list[torch.Tensor]:
    return list(torch.randint(0, VOCABULARY, (4, 160)))
