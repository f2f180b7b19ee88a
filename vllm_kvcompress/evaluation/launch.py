# SPDX-License-Identifier: Apache-2.0
"""Run one format's engine in its own process: memory is freed at its end, and its crash costs one row, not the run."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import safe_open
from tqdm import tqdm

from vllm_kvcompress.errors import KVCompressError
from vllm_kvcompress.evaluation.engine import Job, Summary
from vllm_kvcompress.evaluation.prompts import Prompt

_POLL_SECONDS = 0.2
_LOG_TAIL_LINES = 12


class EngineFailure(KVCompressError):
    """An engine did not start, or died."""


@dataclass(frozen=True)
class Recorded:
    """Per-position results of one engine, one entry a prompt, each [T] over the scored rows."""

    summary: Summary
    logprob: list[np.ndarray]
    top1: list[np.ndarray]
    kl: list[np.ndarray] | None
    agree: list[np.ndarray] | None


def run_engine(job: Job, prompts: list[Prompt], label: str, log_file: Path, *, bar_line: int = 0) -> Recorded:
    """Start the process, show its progress on line `bar_line` below the cursor, collect its results.

    Raises:
        EngineFailure: with the engine's own reason and where its log lies.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    (job.folder / "prompts.json").write_text(json.dumps([dataclasses.asdict(prompt) for prompt in prompts]))
    job_file = job.folder / "job.json"
    job_file.write_text(job.model_dump_json())
    job.progress_file.touch()
    environ = {
        # One process less to start, and errors surface where they happen; the engine is the same.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "TOKENIZERS_PARALLELISM": "false",
        **os.environ,
    }
    log_file.parent.mkdir(parents=True, exist_ok=True)
    # Tokens, not prompts: those of different contexts take very different times.
    fed = list(itertools.accumulate((len(prompt.fed) for prompt in prompts), initial=0))
    with (
        log_file.open("wb") as log,
        tqdm(total=fed[-1], desc=label, unit="tok", unit_scale=True, file=sys.stderr, position=bar_line) as bar,
    ):
        bar.set_postfix_str("engine starts")
        process = subprocess.Popen(
            [sys.executable, "-m", "vllm_kvcompress.evaluation.engine", str(job_file)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environ,
        )
        try:
            while process.poll() is None:
                _advance(bar, job, fed)
                time.sleep(_POLL_SECONDS)
        finally:
            if process.poll() is None:  # interrupted
                process.terminate()
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()
        _advance(bar, job, fed)
    if not (job.folder / "summary.json").exists():
        raise EngineFailure(_reason(job, process.returncode, log_file))
    return _collect(job, len(prompts))


def _advance(bar: tqdm, job: Job, fed: list[int]) -> None:
    done = fed[job.progress_file.stat().st_size]
    if done > bar.n:
        bar.set_postfix_str("", refresh=False)
        bar.update(done - bar.n)


def _reason(job: Job, returncode: int | None, log_file: Path) -> str:
    error_file = job.folder / "error.txt"
    if error_file.exists():
        return f"{error_file.read_text().strip()} (log: {log_file})"
    tail = "\n".join(log_file.read_text(errors="replace").splitlines()[-_LOG_TAIL_LINES:])
    return f"the engine ended with status {returncode} (log: {log_file}):\n{tail}"


def _collect(job: Job, count: int) -> Recorded:
    columns: dict[str, list[np.ndarray]] = {}
    for index in range(count):
        with safe_open(job.result_file(index), framework="numpy") as tensors:
            # The reference's hidden states stay on disk: large, wanted by the other engines only, and bf16.
            for name in set(tensors.keys()) - {"hidden"}:
                columns.setdefault(name, []).append(tensors.get_tensor(name))
    return Recorded(
        summary=Summary.model_validate_json((job.folder / "summary.json").read_text()),
        logprob=columns["logprob"],
        top1=columns["top1"],
        kl=columns.get("kl"),
        agree=columns.get("agree"),
    )
