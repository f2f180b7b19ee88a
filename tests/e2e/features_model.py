# SPDX-License-Identifier: Apache-2.0
"""A random Llama with a tokenizer, a random adapter for it, and what both say without an engine: tests' oracle."""

import itertools
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import torch

RUNNER = Path(__file__).with_name("feature_runner.py")
MAX_LEN, VOCABULARY, LAYERS, HIDDEN = 1024, 512, 3, 192
EVERYTHING = {"sink_tokens": MAX_LEN, "recent_tokens": 0}
RANK, ALPHA = 8, 16
TARGETS = {"q_proj": 384, "k_proj": 128, "v_proj": 128}
"""Width of the layers that the adapter changes: keys and values too, so that its pages are not the model's."""


def prompts(*lengths: int) -> list[list[int]]:
    return [[random.randrange(3, VOCABULARY) for _ in range(length)] for length in lengths]


def make_model(folder: Path) -> Path:
    """6 query and 2 KV heads of size 64, float32; a tokenizer of bytes and of pairs that fill the vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(random.randrange(1 << 30))
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=MAX_LEN,
        initializer_range=0.08,
        bos_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*special.values(), *letters, *map("".join, itertools.product("abcdefghijklmnop", repeat=2))]
    tokenizer = Tokenizer(models.BPE({name: number for number, name in enumerate(names[:VOCABULARY])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


def make_adapter(folder: Path) -> Path:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "base_model_name_or_path": "random"}
    settings |= {"r": RANK, "lora_alpha": ALPHA, "target_modules": list(TARGETS)}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    weights = {}
    for layer, (name, width) in itertools.product(range(LAYERS), TARGETS.items()):
        at = f"base_model.model.model.layers.{layer}.self_attn.{name}"
        weights[f"{at}.lora_A.weight"] = 0.08 * torch.randn(RANK, HIDDEN)
        weights[f"{at}.lora_B.weight"] = 0.08 * torch.randn(width, RANK)
    save_file(weights, folder / "adapter_model.safetensors")
    return folder


class Oracle:
    """The model in Hugging Face's float32, without pages, batches or drafts."""

    def __init__(self, folder: Path, adapter: Path | None = None) -> None:
        from safetensors.torch import load_file
        from transformers import LlamaForCausalLM

        self._model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        if adapter is not None:
            weights = load_file(adapter / "adapter_model.safetensors")
            for layer, name in itertools.product(range(LAYERS), TARGETS):
                at = f"base_model.model.model.layers.{layer}.self_attn.{name}"
                change = weights[f"{at}.lora_B.weight"] @ weights[f"{at}.lora_A.weight"]
                self._model.model.layers[layer].self_attn.get_submodule(name).weight.data += ALPHA / RANK * change

    @torch.inference_mode()
    def score(self, prompt: list[int], tokens: list[int]) -> torch.Tensor:
        """Log-probabilities [len(tokens), vocabulary] of what follows the prompt and each token but the last."""
        logits = self._model(torch.tensor([[*prompt, *tokens]])).logits[0]
        return logits[len(prompt) - 1 : -1].log_softmax(-1)


def run(model: Path, cache_dtype: str, rounds: list[dict], *, windows=None, profile=False, **engine) -> dict:
    """Report of an engine of its own process (feature_runner.py)."""
    arguments = {
        "model": str(model),
        "kv_cache_dtype": cache_dtype,
        "max_model_len": MAX_LEN,
        "max_num_batched_tokens": 256,
        "max_num_seqs": 16,
        "kv_cache_memory_bytes": 64 << 20,
        "dtype": "float32",
        "enforce_eager": True,
    }
    if windows is not None:
        arguments["additional_config"] = {"kvcompress": windows}
    job = json.dumps({"engine": arguments | engine, "rounds": rounds, "profile": profile})
    done = subprocess.run(
        [sys.executable, str(RUNNER), job], capture_output=True, text=True, timeout=600, env={**os.environ}
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("REPORT ")]
    assert lines, f"the engine failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return json.loads(lines[0].removeprefix("REPORT "))
