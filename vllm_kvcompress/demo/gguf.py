# SPDX-License-Identifier: Apache-2.0
"""GGUF to a Hugging Face model folder in bfloat16, for Llama and Qwen2 models.

Weights are dequantised one tensor at a time and written shard by shard, so memory stays at about one shard plus the
largest tensor. (Transformers reads GGUF too, but holds the whole model and needs `accelerate`.)
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch

from vllm_kvcompress.errors import UnsupportedModelError

if TYPE_CHECKING:
    from gguf import GGUFReader

DEFAULT_SHARD_BYTES = 512 << 20


@dataclass(frozen=True)
class _Architecture:
    """How one GGUF architecture maps to a Transformers model."""

    model_type: str
    class_name: str
    permuted: bool
    """Whether llama.cpp interleaved the two RoPE halves of q and k rows, which must be undone."""


_ARCHITECTURES = {
    "llama": _Architecture("llama", "LlamaForCausalLM", permuted=True),
    "qwen2": _Architecture("qwen2", "Qwen2ForCausalLM", permuted=False),
}

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
_OUTER_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
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
    heads = (config.num_attention_heads, config.num_key_value_heads) if architecture.permuted else None
    _write_weights(reader, target, heads, shard_bytes)
    _write_tokenizer(gguf_path, target, config)
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
    return AutoConfig.for_model(
        architecture.model_type,
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


def _hf_name(name: str) -> str:
    """Transformers' name of a GGUF tensor: `blk.3.attn_q.bias` -> `model.layers.3.self_attn.q_proj.bias`."""
    if name in _OUTER_NAMES:
        return _OUTER_NAMES[name]
    match name.split("."):
        case ["blk", layer, part, ("weight" | "bias") as kind] if part in _LAYER_NAMES:
            return f"model.layers.{layer}.{_LAYER_NAMES[part]}.{kind}"
    raise UnsupportedModelError(f"cannot convert GGUF tensor {name!r}")


def unpermute(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Undo llama.cpp's interleaving of the RoPE halves in the rows of q or k: [H * D, ...] -> the same shape."""
    return weight.unflatten(0, (num_heads, -1, 2)).transpose(1, 2).reshape(weight.shape)


def _tensor(tensor: Any, heads: tuple[int, int] | None) -> torch.Tensor:
    """One tensor in bfloat16, in Transformers' row order."""
    from gguf import dequantize

    # Unquantised tensors come as read-only views of the file, which PyTorch warns about: copy those.
    values = numpy.require(dequantize(tensor.data, tensor.tensor_type), requirements="W")
    weight = torch.from_numpy(values).to(torch.bfloat16)
    if heads is not None and ".attn_q." in tensor.name:
        weight = unpermute(weight, heads[0])
    elif heads is not None and ".attn_k." in tensor.name:
        weight = unpermute(weight, heads[1])
    return weight.contiguous()


def _write_weights(reader: GGUFReader, target: Path, heads: tuple[int, int] | None, shard_bytes: int) -> None:
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
        weight = _tensor(tensor, heads)
        shard[_hf_name(tensor.name)] = weight
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


def _write_tokenizer(gguf_path: Path, target: Path, config: Any) -> None:
    """Tokenizer, chat template and generation defaults (which name the token that ends an answer)."""
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name)
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(target)
    ends = {config.eos_token_id}
    # A chat model may end a turn with another token than the one the file names as the end of text.
    vocabulary = tokenizer.get_vocab()
    ends |= {vocabulary[name] for name in ("<|im_end|>", "<|endoftext|>") if name in vocabulary}
    GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=sorted(ends), pad_token_id=config.pad_token_id
    ).save_pretrained(target)
