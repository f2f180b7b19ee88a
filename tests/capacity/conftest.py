# SPDX-License-Identifier: Apache-2.0
"""Folders with nothing but a configuration, which is all that planning needs."""

import pytest


def save_config(folder, architecture="LlamaForCausalLM", config_class="LlamaConfig", **changes):
    """Shape of Llama-3.1-8B with 4 layers unless `changes` say otherwise."""
    import transformers

    shape = {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 4,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "dtype": "bfloat16",
        "architectures": [architecture],
    }
    getattr(transformers, config_class)(**{**shape, **changes}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    return save_config(tmp_path_factory.mktemp("llama"))
