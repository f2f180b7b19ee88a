# SPDX-License-Identifier: Apache-2.0
"""Bytes as rotation or RotationZoo files, guided by coverage: anything but a RotationError ends it.

    python tests/rotations/fuzz.py rotation|zoo CORPUS_DIR [-max_total_time=60] [other arguments of libFuzzer]

Needs atheris, of the extra `dev` where there are wheels of it.
"""

import contextlib
import io
import os
import sys
import tempfile
from pathlib import Path

import atheris
import torch

with atheris.instrument_imports(include=["vllm_kvcompress.rotations", "torch._weights_only_unpickler"]):
    import torch._weights_only_unpickler

    from vllm_kvcompress import rotations
    from vllm_kvcompress.errors import RotationError

HEADS, DIM = 1, 4


def read(target: str, path: Path) -> None:
    with contextlib.suppress(RotationError):
        if target == "rotation":
            rotations.read_rotation(path)
        else:
            rotations.read_zoo(path, path, num_kv_heads=HEADS, num_query_heads=HEADS, head_dim=DIM)


def seeds(target: str, folder: Path) -> None:
    """Valid files to begin with."""
    content = {"layers": {0: {"rotation": torch.eye(DIM), "k_mean": torch.zeros(DIM)}}}
    for legacy in (False, True):
        path = folder / f"seed-{target}-{legacy}"
        packed = io.BytesIO()
        torch.save(content, packed, _use_new_zipfile_serialization=not legacy)
        path.write_bytes(packed.getvalue())
        if target == "rotation":
            found = rotations.read_zoo(path, path, num_kv_heads=HEADS, num_query_heads=HEADS, head_dim=DIM)
            rotations.write_rotation(path, found)


def main() -> None:
    target, corpus = sys.argv[1], Path(sys.argv[2])
    if target not in ("rotation", "zoo"):
        raise SystemExit(f"{target}: the targets are rotation and zoo")
    seeds(target, corpus)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        path = Path(folder) / "file"

        def one(data: bytes) -> None:
            path.write_bytes(data)
            read(target, path)

        atheris.Setup([sys.argv[0], *sys.argv[2:]], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
