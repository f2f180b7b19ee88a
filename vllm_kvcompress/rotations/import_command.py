# SPDX-License-Identifier: Apache-2.0
"""Turn a pair of RotationZoo .pt files (v1 or v2) into a rotation file for a model."""

from __future__ import annotations

import argparse
from pathlib import Path

from vllm_kvcompress.errors import RotationError
from vllm_kvcompress.rotations.file import write_rotation
from vllm_kvcompress.rotations.locate import default_output, model_folder
from vllm_kvcompress.rotations.zoo import PUBLISHED_CLIP_K, PUBLISHED_CLIP_V, read_zoo

SUMMARY = "convert RotationZoo .pt files to a rotation file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("k_file", metavar="K.pt", type=Path, help="rotations of keys")
    parser.add_argument("v_file", metavar="V.pt", type=Path, help="rotations of values")
    parser.add_argument("--model", required=True, help="model folder or downloaded hub id the rotations are for")
    parser.add_argument("--out", type=Path, help="rotation file to write; default: where the engine looks for it")
    parser.add_argument("--clip-k", type=float, default=PUBLISHED_CLIP_K, help="clip of keys (default %(default)s)")
    parser.add_argument("--clip-v", type=float, default=PUBLISHED_CLIP_V, help="clip of values (default %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Read the model's geometry, convert, write; RotationError goes to the caller."""
    folder = model_folder(args.model)
    if folder is None:
        raise RotationError(
            f"{args.model} is neither a folder nor a model downloaded to this machine; its geometry is needed"
        )
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise RotationError(f"the configuration of {args.model} cannot be read: {error}") from None
    text = config.get_text_config()
    query_heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // query_heads
    rotation = read_zoo(
        args.k_file,
        args.v_file,
        num_kv_heads=getattr(text, "num_key_value_heads", None) or query_heads,
        num_query_heads=query_heads,
        head_dim=head_dim,
        model=args.model,
        model_type=text.model_type,
        clip_k=args.clip_k,
        clip_v=args.clip_v,
    )
    out = args.out or default_output(args.model, folder)
    write_rotation(out, rotation)
    print(f"{rotation.metadata.source}, {len(rotation.layers)} layers: wrote {out}")
    return 0
