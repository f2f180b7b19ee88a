# SPDX-License-Identifier: Apache-2.0
"""Run each format's engine in its own process: memory is freed at its end, and its crash costs one row, not the run."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import torch
from safetensors import safe_open
from tqdm import tqdm

from vllm_kvcompress.errors import KVCompressError
from vllm_kvcompress.evaluation.engine import EngineJob, Job, Summary
from vllm_kvcompress.evaluation.prompts import Prompt

T = TypeVar("T")
J = TypeVar("J", bound=EngineJob)

_POLL_SECONDS = 0.2
_LOG_TAIL_LINES = 12


class EngineFailure(KVCompressError):
    """An engine did not start, died, or was stopped."""


@dataclass(frozen=True)
class Recorded:
    """Per-position results of one engine, one entry a prompt, each [T] over the scored rows."""

    summary: Summary
    logprob: list[np.ndarray]
    top1: list[np.ndarray]
    kl: list[np.ndarray] | None
    agree: list[np.ndarray] | None


@dataclass(frozen=True)
class Task(Generic[J]):
    """One engine to run, under the name it has on screen."""

    job: J
    label: str
    log_file: Path


def run_engines(
    tasks: Sequence[Task[Job]], prompts: list[Prompt], *, at_once: int
) -> Generator[Recorded | EngineFailure, None, None]:
    """As `run_at_once`; the failure of a reference stops all others."""

    def run(task: Task[Job], stop: threading.Event, device: str | None) -> Recorded | EngineFailure:
        try:
            return run_engine(task.job, prompts, task.label, task.log_file, stop=stop, device=device)
        except EngineFailure as failure:
            if task.job.reference_folder is None:
                stop.set()
            return failure

    return run_at_once(tasks, run, at_once=at_once)


def run_at_once(
    tasks: Sequence[Task[J]], run: Callable[[Task[J], threading.Event, str | None], T], *, at_once: int
) -> Generator[T, None, None]:
    """Results of `run(task, stop, device)` in the order of `tasks`, at most `at_once` together and begun in that order.

    On a machine with several GPUs tasks that may run together get one each, in turn, if an engine takes only one.
    Closing the iterator stops all: no process outlives it. Close it (`contextlib.closing`), or an exception between two
    results leaves that to the garbage collector.
    """
    stop = threading.Event()
    devices = _devices() if at_once > 1 else []
    if any(task.job.gpus > 1 for task in tasks) or len(devices) < 2:
        devices = [None]
    with ThreadPoolExecutor(at_once) as pool:
        try:
            futures = [
                pool.submit(run, task, stop, device)
                for task, device in zip(tasks, itertools.cycle(devices), strict=False)
            ]
            turn = 0
            for future in as_completed(futures):
                future.result()  # What is not an engine's failure is raised here, out of turn.
                while turn < len(futures) and futures[turn].done():
                    yield futures[turn].result()
                    turn += 1
        finally:
            # Exceptions, Ctrl-C among them, are raised in this thread; the others poll the processes.
            stop.set()


def _devices() -> list[str | None]:
    """The GPUs that this process sees, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name.strip() for name in visible.split(",") if name.strip()]
    return [str(number) for number in range(torch.cuda.device_count())]


def run_engine(
    job: Job,
    prompts: list[Prompt],
    label: str,
    log_file: Path,
    *,
    stop: threading.Event | None = None,
    device: str | None = None,
) -> Recorded:
    """Start the process, show its progress on a line of its own, collect its results.

    Args:
        stop: ends the process when set, from any thread.
        device: the only GPU it may see; None: all.

    Raises:
        EngineFailure: with the engine's own reason and where its log lies.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    (job.folder / "prompts.json").write_text(json.dumps([dataclasses.asdict(prompt) for prompt in prompts]))
    # Tokens, not prompts: those of different contexts take very different times.
    watch_engine(
        job,
        [len(prompt.fed) for prompt in prompts],
        label,
        log_file,
        module="vllm_kvcompress.evaluation.engine",
        stop=stop,
        device=device,
    )
    return _collect(job, len(prompts))


def watch_engine(
    job: EngineJob,
    tokens: list[int],
    label: str,
    log_file: Path,
    *,
    module: str,
    stop: threading.Event | None = None,
    device: str | None = None,
) -> None:
    """Start the process and show its progress on a line of its own until it has left its summary.

    Args:
        tokens: of each prompt, in the order they are fed.
        module: run as `python -m MODULE JOB.json`.
        stop: ends the process when set, from any thread.
        device: the only GPU it may see; None: all.

    Raises:
        EngineFailure: with the engine's own reason and where its log lies.
    """
    stop = stop or threading.Event()
    if stop.is_set():
        raise EngineFailure("stopped before it was started")
    job.folder.mkdir(parents=True, exist_ok=True)
    job_file = job.folder / "job.json"
    job_file.write_text(job.model_dump_json())
    job.progress_file.touch()
    environ = {
        # One process less to start, and errors surface where they happen; the engine is the same.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "TOKENIZERS_PARALLELISM": "false",
        **os.environ,
        **({} if device is None else {"CUDA_VISIBLE_DEVICES": device}),
    }
    log_file.parent.mkdir(parents=True, exist_ok=True)
    fed = list(itertools.accumulate(tokens, initial=0))
    with (
        log_file.open("wb") as log,
        # The lowest free line below the cursor, given free at the end.
        tqdm(total=fed[-1], desc=label, unit="tok", unit_scale=True, file=sys.stderr, leave=False) as bar,
    ):
        bar.set_postfix_str("engine starts")
        process = subprocess.Popen(
            [sys.executable, "-m", module, str(job_file)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environ,
        )
        try:
            while process.poll() is None and not stop.wait(_POLL_SECONDS):
                _advance(bar, job, fed)
        finally:
            if process.poll() is None:  # interrupted or stopped
                process.terminate()
                try:
                    process.wait(10)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
        _advance(bar, job, fed)
        failed = not job.summary_file.exists()
        if failed:
            bar.set_postfix_str("stopped" if stop.is_set() else "failed")
        # Rate None: the average.
        last_line = bar.format_meter(**{**bar.format_dict, "rate": None})
    # Above the lines of the engines that still run; a bar left behind would fall into them. A bar that was cleared may
    # have left the cursor anywhere in the line.
    tqdm.write(f"\r{last_line}", file=sys.stderr)
    if failed and stop.is_set():
        raise EngineFailure("stopped")
    if failed:
        raise EngineFailure(_reason(job, process.returncode, log_file))


def _advance(bar: tqdm, job: EngineJob, fed: list[int]) -> None:
    done = fed[job.progress_file.stat().st_size]
    if done > bar.n:
        bar.set_postfix_str("", refresh=False)
        bar.update(done - bar.n)


def _reason(job: EngineJob, returncode: int | None, log_file: Path) -> str:
    if job.error_file.exists():
        return f"{job.error_file.read_text().strip()} (log: {log_file})"
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
        summary=Summary.model_validate_json(job.summary_file.read_text()),
        logprob=columns["logprob"],
        top1=columns["top1"],
        kl=columns.get("kl"),
        agree=columns.get("agree"),
    )
