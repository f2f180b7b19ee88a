# SPDX-License-Identifier: Apache-2.0
"""Calibration text: read from a file, or written by the model itself so that calibration works offline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from vllm_kvcompress.errors import KVCompressError

# Openings for self-generated text: the kinds of text a served model sees. The model goes on by itself.
_OPENINGS = (
    "The history of the region begins",
    "import os\nimport sys\n\n\ndef main(",
    "Once upon a time, in a small village by the sea,",
    "Question: What is the difference between weather and climate?\nAnswer:",
    "In this paper we study",
    "To solve the equation, first note that",
    "BREAKING NEWS: Officials said on Tuesday that",
    "Ingredients:\n- 2 cups of flour\n-",
    "Dear Sir or Madam,\n\nI am writing to",
    "The human heart is",
    "Alice: Hi! Did you see the match last night?\nBob:",
    "| Year | Population | Area |\n|---|---|---|\n|",
    "Chapter 1\n\nIt was late in the evening when",
    "def fibonacci(n: int) -> int:\n",
    "Die Stadt liegt im Süden des Landes und",
    "The company announced its quarterly results:",
)
_TOP_K = 50
# No text has more characters per token than this, so only that much of a slice is tokenised.
_CHARACTERS_PER_TOKEN = 24
_MAX_FILE_BYTES = 256 << 20


def read_records(path: Path) -> str:
    """The text of a .txt file, or of a .jsonl file with one {"text": ...}, {"content": ...} or string a line.

    Raises:
        KVCompressError: missing, unreadable, empty or malformed file.
    """
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_FILE_BYTES).decode("utf-8", errors="ignore" if path.suffix == ".txt" else "strict")
    except FileNotFoundError:
        raise KVCompressError(f"--data {path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise KVCompressError(f"--data {path}: cannot be read as UTF-8 text: {error}") from None
    if path.suffix == ".jsonl":
        text = "\n\n".join(_jsonl_texts(text, path))
    if not text.strip():
        raise KVCompressError(f"--data {path}: holds no text")
    return text


def _jsonl_texts(text: str, path: Path) -> list[str]:
    found = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise KVCompressError(f"--data {path}, line {number}: not JSON: {error.msg}") from None
        if isinstance(record, dict):
            record = record.get("text", record.get("content"))
        if not isinstance(record, str):
            raise KVCompressError(f'--data {path}, line {number}: expected a string or an object with "text"')
        found.append(record)
    return found


def file_sequences(path: Path, tokenizer: Any, tokens: int, length: int) -> list[torch.Tensor]:
    """Sequences of `length` tokens cut at even distances from a file, about `tokens` in all.

    Returns:
        [T] int64 tensors; fewer or shorter ones where the file is too small (at least one of 16 tokens).

    Raises:
        KVCompressError: unreadable file, or fewer than 16 tokens of text.
    """
    text = read_records(path)
    count = max(1, tokens // length)
    step = len(text) / count
    found = []
    for index in range(count):
        start = int(index * step)
        piece = text[start : min(len(text), int((index + 1) * step), start + length * _CHARACTERS_PER_TOKEN)]
        if index:  # a slice begins at a word, as text does
            piece = piece[piece.find(" ") + 1 :]
        ids = torch.tensor(tokenizer(piece)["input_ids"][:length], dtype=torch.int64)
        if len(ids) >= 16:
            found.append(ids)
    if not found:
        raise KVCompressError(f"--data {path}: too short to calibrate on; give at least a few thousand tokens of text")
    return found


def generated_sequences(model: Any, tokenizer: Any, tokens: int, length: int, seed: int) -> list[torch.Tensor]:
    """Text the model samples from fixed openings, top-50 at temperature 1, all in one batch.

    A sequence is two texts of half its length, one after the other: half the steps, at twice the batch.

    Returns:
        ceil(tokens / length) tensors of [length] int64. The same model, seed and device give the same text.
    """
    count, half = max(1, -(-tokens // length)), -(-length // 2)
    prompts = [tokenizer(_OPENINGS[i % len(_OPENINGS)])["input_ids"] for i in range(2 * count)]
    # Openings are cut to the shortest, so that the batch needs no padding.
    shortest = min(half, *map(len, prompts))
    device = next(model.parameters()).device
    generator = torch.Generator(device="cpu").manual_seed(seed)
    ids = torch.tensor([prompt[:shortest] for prompt in prompts], device=device)
    cache, feed = None, ids
    with torch.inference_mode(), tqdm(total=half, initial=shortest, desc="generating text", unit="step") as bar:
        while ids.shape[1] < half:
            result = model(input_ids=feed, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = result.past_key_values
            top, choice = result.logits[:, -1].float().cpu().topk(min(_TOP_K, result.logits.shape[-1]), dim=-1)
            # Sampled on the CPU: its generator gives the same draws on every machine.
            picked = torch.multinomial(top.softmax(-1), 1, generator=generator)
            feed = choice.gather(-1, picked).to(device)
            ids = torch.cat([ids, feed], dim=1)
            bar.update(1)
    return [pair.flatten()[:length] for pair in ids.cpu().view(count, 2, -1)]
