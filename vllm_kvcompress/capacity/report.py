# SPDX-License-Identifier: Apache-2.0
"""The table that `kvcompress plan` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm_kvcompress.capacity.plan import Capacity
from vllm_kvcompress.capacity.text import aligned, gib
from vllm_kvcompress.formats import is_ours

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_ESTIMATE = """An estimate: weights as in the checkpoint's files, divided by the number of GPUs though some are not
split, and an allowance (--reserve) for activations, logits, CUDA graphs and the CUDA context. vLLM measures
and logs what it has, 'Available KV cache memory': with that as --kv-cache-memory-bytes nothing is estimated."""


def report(
    model: str,
    config: VllmConfig,
    utilization: float,
    memory: dict[str, int],
    max_model_len: int,
    windows: tuple[int, int],
    rows: list[Capacity],
) -> str:
    """Model, memory, table and notes.

    Args:
        memory: bytes of one GPU by their use; `kv_cache` and, where it was estimated, `gpu`, `weights`, `reserve`.
        max_model_len: tokens of the requests that were counted.
    """
    model_config: Any = config.model_config
    gpus = config.parallel_config.tensor_parallel_size
    heads, here = model_config.get_total_num_kv_heads(), model_config.get_num_kv_heads(config.parallel_config)
    dtype = str(model_config.dtype).removeprefix("torch.")
    on_gpu = f" ({here} on each of {gpus} GPUs)" if gpus > 1 else ""
    lines = [
        f"{model}: {model_config.get_num_layers(config.parallel_config)} layers, {heads} KV heads{on_gpu} of size "
        f"{model_config.get_head_size()}, {dtype}, at most {model_config.max_model_len:,} tokens"
    ]
    notes = []
    if "gpu" in memory:
        notes.append(_ESTIMATE)
        lines.append(
            f"KV cache of one GPU: {gib(memory['gpu'])} x {utilization:g} - {gib(memory['weights'])} weights - "
            f"{gib(memory['reserve'])} reserve = {gib(memory['kv_cache'])} [1]"
        )
    else:
        lines.append(f"KV cache of one GPU: {gib(memory['kv_cache'])}")
    counted = f"As vLLM counts and logs them, with requests of {max_model_len:,} tokens."
    if any(windows) and any(is_ours(row.kv_cache_dtype) for row in rows):
        counted += (
            f" 16-bit windows (first {windows[0]}, last {windows[1]} tokens)\n"
            "are included here, not in bytes/token; they weigh less the longer requests are."
        )
    notes.append(counted)
    head = ["format", "bytes/token", f"tokens [{len(notes)}]", f"requests of {max_model_len:,}", "longest request"]
    stored = config.cache_config.cache_dtype
    lines += ["", *aligned(_cells(head, dtype if stored == "auto" else stored, rows)), ""]
    for number, note in enumerate(notes, 1):
        lines.append(f"[{number}] " + note.replace("\n", "\n    "))
    for row in rows:
        if row.problem:
            lines.append(f"{row.kv_cache_dtype}: {row.problem}")
        elif row.longest < max_model_len:
            lines.append(
                f"{row.kv_cache_dtype}: does not start with --max-model-len {max_model_len}, at most {row.longest} fit"
            )
    return "\n".join(lines)


def _cells(head: list[str], auto_dtype: str, rows: list[Capacity]) -> list[list[str]]:
    """Rows of the table; with `auto` among them, its requests are compared with."""
    base = next((row.requests for row in rows if row.kv_cache_dtype == "auto"), 0)
    cells = [[*head, "against auto"] if base else head]
    for row in rows:
        name = f"auto ({auto_dtype})" if row.kv_cache_dtype == "auto" else row.kv_cache_dtype
        if row.problem:
            cells.append([name, *["-"] * (len(cells[0]) - 1)])
            continue
        found = [f"{row.bytes_per_token:,}", f"{row.tokens:,}", f"{row.requests:,.2f}", f"{row.longest:,}"]
        cells.append([name, *found, *([f"{row.requests / base:.2f}x"] if base else [])])
    return cells
