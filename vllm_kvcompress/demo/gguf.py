# SPDX-License-Identifier: Apache-2.0
"""GGUF to a Hugging Face model folder in bfloat16, for Llama, Qwen2 and Gemma 3 (text) models.

Weights are dequantised one tensor at a time and written shard by shard, so memory stays at about one shard plus the
largest tensor. (Transformers reads GGUF too, but holds the whole model and needs `accelerate`.)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch

from vllm_kvcompress.errors import UnsupportedModelError

if TYPE_CHECKING:
    from gguf import GGUFReader

DEFAULT_SHARD_BYTES = 512 << 20


_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA3_LAYER_NAMES = {
    **_LAYER_NAMES,
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_OUTER_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def _gemma3_config(value: Callable[..., Any]) -> dict[str, Any]:
    """What a Gemma 3 file leaves to llama.cpp's code: the pattern of layers, the local RoPE base, the score scale."""
    layers, hidden, heads = value("block_count"), value("embedding_length"), value("attention.head_count")
    pattern = value("attention.sliding_window_pattern", 6)
    slides = pattern if isinstance(pattern, list) else [(layer + 1) % pattern != 0 for layer in range(layers)]
    local_base = float(value("rope.freq_base_swa", 10000.0))
    return {
        "layer_types": ["sliding_attention" if sliding else "full_attention" for sliding in slides],
        "sliding_window": value("attention.sliding_window"),
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": float(value("rope.freq_base", 1e6))},
            "sliding_attention": {"rope_type": "default", "rope_theta": local_base},
        },
        # Of all sizes only the 27B one, known by its 62 layers, does not scale by its head size.
        "query_pre_attn_scalar": hidden // heads if layers == 62 else value("attention.key_length", 256),
    }


@dataclass(frozen=True)
class _Architecture:
    """How one GGUF architecture maps to a Transformers model."""

    model_type: str
    class_name: str
    permuted: bool = False
    """Whether llama.cpp interleaved the two RoPE halves of q and k rows, which must be undone."""
    norms_plus_one: bool = False
    """Whether the file holds 1 + w where the model holds the weight w of a norm."""
    layer_names: Mapping[str, str] = field(default_factory=lambda: _LAYER_NAMES)
    config: Callable[[Callable[..., Any]], dict[str, Any]] = lambda value: {}
    """Configuration of this architecture alone, from a getter of its metadata."""


_ARCHITECTURES = {
    "llama": _Architecture("llama", "LlamaForCausalLM", permuted=True),
    "qwen2": _Architecture("qwen2", "Qwen2ForCausalLM"),
    "gemma3": _Architecture(
        "gemma3_text",
        "Gemma3ForCausalLM",
        norms_plus_one=True,
        layer_names=_GEMMA3_LAYER_NAMES,
        config=_gemma3_config,
    ),
}


def gguf_to_hf(gguf_path: Path, target: Path, shard_bytes: int = DEFAULT_SHARD_BYTES) -> Path:
    """Write the model in `gguf_path` as a Hugging Face folder: weights, config, tokenizer, chat template.

    Args:
        target: folder to write into; created if missing.
        shard_bytes: weights are split into safetensors files of about this size.

    Raises:
        UnsupportedModelError: an architecture, a RoPE scaling or a tensor this converter does not know.
    """
    from gguf import GGUFReader

    reader = GGUFReader(gguf_path)
    metadata = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.")}
    architecture = _architecture(metadata)
    tied = all(tensor.name != "output.weight" for tensor in reader.tensors)
    target.mkdir(parents=True, exist_ok=True)
    config = _config(metadata, architecture, tied, reader)
    heads = (config.num_attention_heads, config.num_key_value_heads)
    _write_weights(reader, target, architecture, heads, shard_bytes)
    add_bos = reader.fields.get("tokenizer.ggml.add_bos_token")
    _write_tokenizer(gguf_path, target, config, add_bos is not None and bool(add_bos.contents()))
    config.save_pretrained(target)
    return target


def _architecture(metadata: dict[str, Any]) -> _Architecture:
    name = metadata["general.architecture"]
    if name not in _ARCHITECTURES:
        raise UnsupportedModelError(
            f"cannot convert GGUF architecture {name!r}; known: {', '.join(_ARCHITECTURES)}. "
            "Use the model's Hugging Face folder instead."
        )
    scaling = metadata.get(f"{name}.rope.scaling.type", "none")
    if scaling != "none":
        raise UnsupportedModelError(f"cannot convert a GGUF with RoPE scaling {scaling!r}")
    return _ARCHITECTURES[name]


def _config(metadata: dict[str, Any], architecture: _Architecture, tied: bool, reader: GGUFReader) -> Any:
    """The Transformers configuration of the model."""
    from transformers import AutoConfig

    prefix = metadata["general.architecture"]

    def value(key: str, default: Any = None) -> Any:
        return metadata.get(f"{prefix}.{key}", default)

    heads, hidden = value("attention.head_count"), value("embedding_length")
    special = {
        key: reader.fields[f"tokenizer.ggml.{name}_token_id"].contents()
        for key, name in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding"))
        if f"tokenizer.ggml.{name}_token_id" in reader.fields
    }
    values = dict(
        architectures=[architecture.class_name],
        vocab_size=len(reader.fields["tokenizer.ggml.tokens"].data),
        hidden_size=hidden,
        intermediate_size=value("feed_forward_length"),
        num_hidden_layers=value("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=value("attention.head_count_kv", heads),
        head_dim=value("attention.key_length", hidden // heads),
        max_position_embeddings=value("context_length"),
        # The file stores float32: 1e-5 would come back as 9.999999747378752e-06.
        rms_norm_eps=float(f"{value('attention.layer_norm_rms_epsilon'):.6g}"),
        rope_parameters={"rope_type": "default", "rope_theta": float(value("rope.freq_base", 10000.0))},
        tie_word_embeddings=tied,
        dtype="bfloat16",
        **special,
    )
    return AutoConfig.for_model(architecture.model_type, **{**values, **architecture.config(value)})


def _hf_name(name: str, layer_names: Mapping[str, str]) -> str:
    """Transformers' name of a GGUF tensor: `blk.3.attn_q.bias` -> `model.layers.3.self_attn.q_proj.bias`."""
    if name in _OUTER_NAMES:
        return _OUTER_NAMES[name]
    match name.split("."):
        case ["blk", layer, part, ("weight" | "bias") as kind] if part in layer_names:
            return f"model.layers.{layer}.{layer_names[part]}.{kind}"
    raise UnsupportedModelError(f"cannot convert GGUF tensor {name!r}")


def unpermute(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Undo llama.cpp's interleaving of the RoPE halves in the rows of q or k: [H * D, ...] -> the same shape."""
    return weight.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).reshape(weight.shape)


def _tensor(tensor: Any, architecture: _Architecture, heads: tuple[int, int]) -> torch.Tensor:
    """One tensor in bfloat16, as Transformers keeps it; `heads` are those of queries and of keys."""
    from gguf import dequantize

    # Unquantised tensors come as read-only views of the file, which PyTorch warns about: copy those.
    weight = torch.from_numpy(numpy.require(dequantize(tensor.data, tensor.tensor_type), requirements="W"))
    if architecture.norms_plus_one and tensor.name.endswith("norm.weight"):
        weight = weight - 1
    weight = weight.to(torch.bfloat16)
    if architecture.permuted and ".attn_q." in tensor.name:
        weight = unpermute(weight, heads[0])
    elif architecture.permuted and ".attn_k." in tensor.name:
        weight = unpermute(weight, heads[1])
    return weight.contiguous()


def _write_weights(
    reader: GGUFReader, target: Path, architecture: _Architecture, heads: tuple[int, int], shard_bytes: int
) -> None:
    from safetensors.torch import save_file

    parts: list[tuple[Path, list[str]]] = []
    shard: dict[str, torch.Tensor] = {}
    size = total = 0

    def flush() -> None:
        nonlocal shard, size
        path = target / f"part-{len(parts)}.tmp"
        save_file(shard, path, metadata={"format": "pt"})
        parts.append((path, list(shard)))
        shard, size = {}, 0

    for tensor in reader.tensors:
        weight = _tensor(tensor, architecture, heads)
        shard[_hf_name(tensor.name, architecture.layer_names)] = weight
        size += weight.nbytes
        total += weight.nbytes
        if size >= shard_bytes:
            flush()
    if shard:
        flush()

    # Final names carry the number of shards, which is known only now.
    if len(parts) == 1:
        parts[0][0].rename(target / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for index, (path, names) in enumerate(parts, 1):
        name = f"model-{index:05d}-of-{len(parts):05d}.safetensors"
        path.rename(target / name)
        weight_map |= dict.fromkeys(names, name)
    index_json = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (target / "model.safetensors.index.json").write_text(json.dumps(index_json, indent=1), encoding="utf-8")


def _write_tokenizer(gguf_path: Path, target: Path, config: Any, add_bos: bool) -> None:
    """Tokenizer, chat template and generation defaults (which name the token that ends an answer)."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name)
    tokenizer.model_max_length = config.max_position_embeddings
    bos = tokenizer.bos_token
    if add_bos and bos and tokenizer("a").input_ids[:1] != [tokenizer.bos_token_id]:
        # Transformers drops this flag of the file; Gemma makes no sense of a text that does not begin with it.
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.bos_token_id)]
        )
    tokenizer.save_pretrained(target)
    ends = {config.eos_token_id}
    # A chat model may end a turn with another token than the one the file names as the end of text.
    vocabulary = tokenizer.get_vocab()
    ends |= {vocabulary[name] for name in ("<|im_end|>", "<|endoftext|>", "<end_of_turn>") if name in vocabulary}
    GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=sorted(ends), pad_token_id=config.pad_token_id
    ).save_pretrained(target)
