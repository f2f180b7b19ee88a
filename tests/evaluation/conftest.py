# SPDX-License-Identifier: Apache-2.0
"""A word tokenizer and a tiny random Llama, made here so that no test needs a download."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# w0..w299 for text; the words of the recall probe become <unk> unless they are added.
VOCABULARY = ["<unk>", "<s>", "</s>", *(f"w{index}" for index in range(300))]


def _tokenizer(words: list[str], with_bos: bool = False) -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if with_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="session")
def tokenizer():
    return _tokenizer(VOCABULARY)


@pytest.fixture(scope="session")
def tokenizer_with_bos():
    return _tokenizer(VOCABULARY, with_bos=True)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, tokenizer):
    """Folder of a random two-layer Llama, head_dim 64, 4 query heads on 2 KV heads, at most 512 positions."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        # Large enough that attention and output are far from uniform.
        initializer_range=0.08,
        dtype="bfloat16",
    )
    folder = tmp_path_factory.mktemp("tiny-llama")
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
