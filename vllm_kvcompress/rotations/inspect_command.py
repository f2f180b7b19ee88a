# SPDX-License-Identifier: Apache-2.0
"""Print what a rotation file holds, after checking all of it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from vllm_kvcompress.errors import printable
from vllm_kvcompress.rotations.file import read_rotation

SUMMARY = "check and print a rotation file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", type=Path, help="rotation file (.safetensors)")
    parser.add_argument("--json", action="store_true", help="print the metadata as JSON")


def run(args: argparse.Namespace) -> int:
    """Read with every check of the engine; RotationError goes to the caller."""
    rotation = read_rotation(args.file)
    metadata = rotation.metadata
    if args.json:
        print(json.dumps(metadata.model_dump(), indent=2))
        return 0
    rows = {
        "model": metadata.model,
        "fingerprint": metadata.fingerprint or "any model of this geometry",
        "geometry": f"{len(metadata.layer_ids)} layers, {metadata.num_query_heads} query heads, "
        f"{metadata.num_kv_heads} KV heads of size {metadata.head_dim}",
        "source": metadata.source,
        "data": f"{metadata.data}, {metadata.tokens} tokens, seed {metadata.seed}",
        "recipe": ", ".join(f"{key} {value}" for key, value in metadata.recipe.items()),
        "versions": ", ".join(f"{key} {value}" for key, value in metadata.versions.items()),
        "file": f"{args.file} ({args.file.stat().st_size / 1e6:.1f} MB, schema {metadata.schema_version})",
    }
    for key, value in rows.items():
        if value:
            print(f"{key:<12} {printable(value)}")
    print(f"\n{'layer':>5}  {'|mean key|':>10}  {'key clip':>13}  {'value clip':>13}  {'sensitivity':>11}")
    for index, (layer_id, layer) in enumerate(rotation.layers.items()):
        mean = float(layer.k_mean.norm(dim=-1).mean())
        clips = [f"{float(c.min()):.3f} - {float(c.max()):.3f}" for c in (layer.k_clip, layer.v_clip)]
        sensitivity = f"{metadata.sensitivity[index]:.4f}" if metadata.sensitivity else "-"
        print(f"{layer_id:>5}  {mean:>10.3f}  {clips[0]:>13}  {clips[1]:>13}  {sensitivity:>11}")
    return 0
