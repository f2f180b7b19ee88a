# SPDX-License-Identifier: Apache-2.0
"""GGUF conversion: a small model written as llama.cpp writes it comes back with the same logits."""

import json

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3TextConfig, LlamaConfig, Qwen2Config

from vllm_kvcompress.demo.gguf import gguf_to_hf, unpermute
from vllm_kvcompress.errors import UnsupportedModelError

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "c", "ab"]
GEMMA_TOKENS = ["<pad>", "<eos>", "<bos>", "<unk>", "a", "b", "ab"]
SHAPE = dict(
    vocab_size=len(TOKENS),
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    rms_norm_eps=1e-5,
    initializer_range=0.2,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=2,
)


def permute(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's conversion of q and k rows (convert_hf_to_gguf.py, LlamaModel.permute)."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path, model, architecture: str, permuted: bool, **changes) -> None:
    config = model.config
    writer = GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    gemma = architecture == "gemma3"
    if gemma:
        writer.add_key_length(config.head_dim)
        writer.add_sliding_window(config.sliding_window)
        for name, theta in (("freq_base", "full_attention"), ("freq_base_swa", "sliding_attention")):
            writer.add_float32(f"gemma3.rope.{name}", config.rope_parameters[theta]["rope_theta"])
        if "pattern" in changes:
            writer.add_sliding_window_pattern(changes["pattern"])
    else:
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if "rope_scaling" in changes:
        writer.add_string(f"{architecture}.rope.scaling.type", changes["rope_scaling"])
    if gemma:
        writer.add_tokenizer_model("llama")
        writer.add_token_list(GEMMA_TOKENS)
        writer.add_token_scores([-1000.0] * 4 + [-2.0, -3.0, -1.0])
        writer.add_token_types([3, 3, 3, 3, 1, 1, 1])
        writer.add_add_bos_token(True)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(TOKENS)
        writer.add_token_types([3, 3, 3, 1, 1, 1, 1])
        writer.add_token_merges(["a b"])
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_pad_token_id(config.pad_token_id)
    writer.add_chat_template(TEMPLATE)
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    inner = {
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    if gemma:
        inner |= {
            "self_attn.q_norm": "attn_q_norm",
            "self_attn.k_norm": "attn_k_norm",
            "post_attention_layernorm": "post_attention_norm",
            "pre_feedforward_layernorm": "ffn_norm",
            "post_feedforward_layernorm": "post_ffw_norm",
        }
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        module, kind = name.rsplit(".", 1)
        values = weight.float().numpy()
        if gemma and name.endswith("norm.weight"):
            values = values + 1  # llama.cpp's conversion: convert_hf_to_gguf.py, Gemma3Model.norm_shift
        if module in outer:
            target = outer[module]
        else:
            _, _, layer, part = module.split(".", 3)
            target = f"blk.{layer}.{inner[part]}"
            if permuted and part == "self_attn.q_proj":
                values = permute(values, config.num_attention_heads)
            if permuted and part == "self_attn.k_proj":
                values = permute(values, config.num_key_value_heads)
        writer.add_tensor(f"{target}.{kind}", np.ascontiguousarray(values))
    if "extra_tensor" in changes:
        writer.add_tensor(changes["extra_tensor"], np.zeros(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


CASES = {
    "llama, tied": ("llama", True, LlamaConfig(**SHAPE, tie_word_embeddings=True)),
    "llama, untied": ("llama", True, LlamaConfig(**SHAPE, tie_word_embeddings=False)),
    "qwen2, biases": ("qwen2", False, Qwen2Config(**SHAPE, tie_word_embeddings=True)),
}

GEMMA = dict(
    SHAPE,
    num_hidden_layers=7,
    bos_token_id=2,
    eos_token_id=1,
    pad_token_id=0,
    head_dim=32,
    query_pre_attn_scalar=32,
    sliding_window=8,
    rope_parameters={
        "full_attention": {"rope_type": "default", "rope_theta": 50000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
    },
)
S, F = "sliding_attention", "full_attention"
LAYERS = {"by default": ({}, [S, S, S, S, S, F, S]), "every third": ({"pattern": 3}, [S, S, F, S, S, F, S])}
LAYERS["listed"] = ({"pattern": [True, False, False, True, True, True, True]}, [S, F, F, S, S, S, S])


@pytest.mark.parametrize("case", LAYERS)
def test_gemma3(case, tmp_path):
    """Both RoPE bases, windows shorter than the text, norms of 1 + w, and a tokenizer that begins with <bos>."""
    changes, kinds = LAYERS[case]
    model = make_model(Gemma3TextConfig(**GEMMA, layer_types=kinds))
    write_gguf(tmp_path / "m.gguf", model, "gemma3", False, **changes)
    folder = gguf_to_hf(tmp_path / "m.gguf", tmp_path / "hf")
    back = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert back.config.layer_types == kinds
    ids = torch.randint(4, len(GEMMA_TOKENS), (2, 40))
    with torch.inference_mode():
        # Exact in float32, see test_same_logits; 1 + w holds every bit of a bf16 w near 1.
        torch.testing.assert_close(back(ids).logits, model(ids).logits, rtol=0, atol=0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("ab").input_ids == [2, 6]
    assert tokenizer("ab", add_special_tokens=False).input_ids == [6]
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [1]


def make_model(config):
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "norm.weight")):  # initialised to constants, which would hide a swap
                parameter.copy_(torch.randn_like(parameter) * 0.3 + 1)
    return model


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shard_bytes", [1 << 30, 20_000])
def test_same_logits(case, shard_bytes, tmp_path):
    architecture, permuted, config = CASES[case]
    model = make_model(config)
    write_gguf(tmp_path / "m.gguf", model, architecture, permuted)
    folder = gguf_to_hf(tmp_path / "m.gguf", tmp_path / "hf", shard_bytes)
    back = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert back.dtype == torch.bfloat16
    ids = torch.randint(3, len(TOKENS), (2, 40))
    with torch.inference_mode():
        # bf16 values pass through float32 unchanged, so the two models are the same to the bit.
        torch.testing.assert_close(back(ids).logits, model(ids).logits, rtol=0, atol=0)


def test_folder_is_complete(tmp_path):
    architecture, permuted, config = CASES["llama, tied"]
    write_gguf(tmp_path / "m.gguf", make_model(config), architecture, permuted)
    folder = gguf_to_hf(tmp_path / "m.gguf", tmp_path / "hf", shard_bytes=20_000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for file in set(index["weight_map"].values()):
        with safe_open(folder / file, "pt") as tensors:
            assert set(tensors.keys()) == {name for name, where in index["weight_map"].items() if where == file}
    assert not list(folder.glob("*.tmp"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "ab"
    assert tokenizer("abc").input_ids == [6, 5]
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [0, 2]
    written = json.loads((folder / "config.json").read_text())
    assert written["head_dim"] == 16 and written["rms_norm_eps"] == 1e-5


@pytest.mark.parametrize("heads,dim", [(1, 2), (3, 64), (9, 64), (2, 128)])
def test_unpermute_inverts_llama_cpp(heads, dim):
    for shape in ((heads * dim, 5), (heads * dim,)):
        weight = np.random.default_rng().standard_normal(shape).astype(np.float32)
        assert np.array_equal(unpermute(torch.from_numpy(permute(weight, heads)), heads).numpy(), weight)


@pytest.mark.parametrize(
    "architecture,changes,words",
    [
        ("falcon", {}, "architecture 'falcon'"),
        ("llama", {"rope_scaling": "yarn"}, "RoPE scaling 'yarn'"),
        ("llama", {"extra_tensor": "rope_freqs.weight"}, "rope_freqs.weight"),
    ],
)
def test_what_cannot_be_converted_is_refused(architecture, changes, words, tmp_path):
    write_gguf(tmp_path / "m.gguf", make_model(CASES["llama, tied"][2]), architecture, True, **changes)
    with pytest.raises(UnsupportedModelError, match=words):
        gguf_to_hf(tmp_path / "m.gguf", tmp_path / "hf")
