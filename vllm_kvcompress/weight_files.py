# SPDX-License-Identifier: Apache-2.0
"""The index of a Hugging Face folder's safetensors files: which tensor lies in which of them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from vllm_kvcompress.errors import KVCompressError

SINGLE_FILE = "model.safetensors"
"""Name of the weights where they are one file, without an index."""
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class WeightIndex:
    """What `model.safetensors.index.json` says; its files need not be there."""

    holders: dict[str, Path]
    """File of each tensor, by name."""
    total_size: int | None
    """Bytes of all tensors as stored, where the index states them."""

    @property
    def files(self) -> list[Path]:
        """Every file, once, sorted."""
        return sorted(set(self.holders.values()))


def read_index(folder: Path) -> WeightIndex | None:
    """The folder's index; None where it has none.

    Raises:
        KVCompressError: an index that cannot be read.
    """
    path = folder / _INDEX
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        holders = {name: Path(file) for name, file in content["weight_map"].items()}
        if outside := [str(file) for file in holders.values() if file.is_absolute() or ".." in file.parts]:
            raise ValueError(f"{outside[0]} is outside of the folder")
        holders = {name: folder / file for name, file in holders.items()}
        stated = (content.get("metadata") or {}).get("total_size")
        return WeightIndex(holders, None if stated is None else int(stated))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise KVCompressError(f"{path} cannot be read: {error!r}") from None
