# SPDX-License-Identifier: Apache-2.0
"""Load the model to calibrate, and refuse what a compressed KV cache cannot serve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from vllm_kvcompress.calibration.tap import NAME
from vllm_kvcompress.errors import KVCompressError, UnsupportedModelError
from vllm_kvcompress.formats.base import SUPPORTED_HEAD_DIMS
from vllm_kvcompress.sliding import full_attention_layers

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def check_config(config: Any, name: str) -> None:
    """Refuse what the configuration already tells.

    Raises:
        UnsupportedModelError: encoder-decoder, MLA, no attention heads, sliding windows in every layer, or a head size
            outside the page formats'.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{name} is an encoder-decoder model ({config.model_type}); only decoders are supported"
        )
    text = config.get_text_config()
    if getattr(text, "kv_lora_rank", None):
        raise UnsupportedModelError(
            f"{name} uses multi-head latent attention ({text.model_type}): its cache is already a compressed latent, "
            "which this package does not quantise. Serve it with --kv-cache-dtype auto or fp8"
        )
    heads = getattr(text, "num_attention_heads", None)
    if not isinstance(heads, int):
        raise UnsupportedModelError(f"{name} ({text.model_type}) has no attention heads to calibrate")
    if not full_attention_layers(text, text.num_hidden_layers):
        raise UnsupportedModelError(
            f"every layer of {name} has a sliding window of {text.sliding_window} tokens: no cache grows with the "
            "context, and there is nothing to save. Serve it with --kv-cache-dtype auto"
        )
    check_head_dim(getattr(text, "head_dim", None) or text.hidden_size // heads, name)


def check_head_dim(head_dim: int, name: str) -> None:
    if head_dim not in SUPPORTED_HEAD_DIMS:
        raise UnsupportedModelError(
            f"{name} has heads of size {head_dim}; supported sizes are {', '.join(map(str, SUPPORTED_HEAD_DIMS))}"
        )


def pick_device(device: str | None) -> torch.device:
    """The device asked for, else CUDA where there is one.

    Raises:
        KVCompressError: no such device.
    """
    wanted = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(wanted)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        raise KVCompressError(f"--device {wanted}: {str(error).splitlines()[0]}") from None
    return found


def load(folder: Path, name: str, device: torch.device, dtype: str = "auto") -> tuple[Any, Any]:
    """Model in evaluation mode with the tapped attention, and its tokenizer.

    Args:
        dtype: auto (the checkpoint's on a GPU, float32 on a CPU, where bfloat16 is slow), or a name of torch's.

    Raises:
        UnsupportedModelError: see `check_config`; also a model without causal head or whose attention is its own.
        KVCompressError: unreadable folder.
    """
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise KVCompressError(f"the configuration of {name} cannot be read: {error}") from None
    check_config(config, name)
    wanted: Any = _DTYPES.get(dtype) or ("auto" if device.type == "cuda" else torch.float32)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=wanted, attn_implementation=NAME)
    except (OSError, ValueError, ImportError) as error:
        raise KVCompressError(f"{name} cannot be loaded by transformers as a causal language model: {error}") from None
    model.to(device)
    return model.eval(), tokenizer
