# SPDX-License-Identifier: Apache-2.0
"""Text to evaluate on: a .txt or .jsonl file, cut into token chunks spread evenly over what calibration did not see."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_kvcompress.errors import KVCompressError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Of the slice a chunk is cut from, only this much is tokenised: no text has more characters per token than this.
_CHARACTERS_PER_TOKEN = 24


def read_text(path: str | Path, skip_fraction: float) -> tuple[str, str]:
    """The text of a file: its first `skip_fraction` (of characters), and what is behind it.

    Args:
        path: .txt, or .jsonl with one {"text": ...} or string a line.

    Raises:
        KVCompressError: no such file, unreadable, empty, malformed JSON, fraction outside [0, 1).
    """
    if not 0 <= skip_fraction < 1:
        raise KVCompressError(f"--skip-fraction must be at least 0 and below 1, got {skip_fraction}")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise KVCompressError(f"--data {path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise KVCompressError(f"--data {path}: cannot be read as UTF-8 text: {error}") from None
    if Path(path).suffix == ".jsonl":
        text = "\n\n".join(_records(text, path))
    if not text.strip():
        raise KVCompressError(f"--data {path}: holds no text")
    skipped = int(len(text) * skip_fraction)
    return text[:skipped], text[skipped:]


def _records(text: str, path: str | Path) -> list[str]:
    records = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            records.append(record if isinstance(record, str) else record["text"])
            if not isinstance(records[-1], str):
                raise TypeError
        except (json.JSONDecodeError, KeyError, TypeError):
            raise KVCompressError(
                f'--data {path}, line {number}: expected a JSON string or an object with a "text" string'
            ) from None
    return records


def leading_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens the tokenizer puts before any text (a beginning-of-sequence token, or nothing)."""
    with_special = tokenizer("a")["input_ids"]
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    return list(with_special[: with_special.index(plain[0])]) if plain and plain[0] in with_special else []


def cut_chunks(text: str, tokenizer: PreTrainedTokenizerBase, chunks: int, context: int) -> list[list[int]]:
    """`chunks` prompts of exactly `context` tokens, from equal slices of the text, each begun at a line.

    Raises:
        KVCompressError: a slice has fewer than `context` tokens.
    """
    prefix = leading_tokens(tokenizer)
    wanted = context - len(prefix)
    slice_length = len(text) // chunks
    prompts = []
    for index in range(chunks):
        piece = text[index * slice_length : (index + 1) * slice_length]
        # The first slice begins wherever the skipped part ended, the others anywhere: begin all at a line.
        newline = piece.find("\n", 0, max(1, slice_length // 8))
        piece = piece[newline + 1 :]
        tokens = _encode(tokenizer, piece[: wanted * _CHARACTERS_PER_TOKEN])
        if len(tokens) < wanted:
            raise KVCompressError(
                f"--data: too little text for {chunks} chunks of {context} tokens: a slice of "
                f"{len(piece)} characters has {len(tokens)} tokens. Give more text, or lower --chunks, --context or "
                "--skip-fraction."
            )
        prompts.append(prefix + tokens[:wanted])
    return prompts


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
