# SPDX-License-Identifier: Apache-2.0
"""What a budget of pages is worth in a whole engine: decode steps, peak KV memory and prefill of long histories.

    python benchmarks/benchmark_eviction.py [--context 102400] [--budget 6144] [--batches 4,1] [--out DIR]

The shape of Llama-3.1-8B with dummy weights and --layers of its 32 layers, as in benchmark_engine.py. Four engines:
`auto` (FlashAttention over bf16 pages) and one of our formats, each keeping everything and each with requests that
evict. All read prompts in steps of one block, so that prefill compares. They all start, then measure one after the
other, alone on the GPU.

Prefill is that of one request, timed without looking into it, and so are decode steps. Another reading waits for the
GPU before and after each guide pass and compaction, to time them, and looks up peak memory in the block manager after
every step that is scheduled: pages and 16-bit windows of one request, in bytes of all layers.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import _common as common
from _common import number, verdict
from benchmark_engine import LLAMA_8B, TOY, Requests, integers, round_up, write_model

BASELINE = "auto"
LEAST_DECODE, LEAST_MEMORY, MOST_PREFILL = 2.4, 3.7, 1.15
GUIDE_TOKENS = 512
LEAST_COMPRESSION = 3
"""Of any format's pages and windows against 16 bits"""
NEW_TOKENS = 1024


@dataclass(frozen=True)
class Setup:
    kv_cache_dtype: str
    evicts: bool

    @property
    def label(self) -> str:
        return self.kv_cache_dtype + (", evicting" if self.evicts else "")


@dataclass
class Measured:
    setup: Setup
    decode_ms: dict[int, float] = field(default_factory=dict)
    """By batch"""
    prefill_s: list[float] = field(default_factory=list)
    """Of one request, several times"""
    guide_s: float = 0
    """Of the guide passes of one request, scoring aside"""
    compact_s: float = 0
    """Of scoring and compacting"""
    compactions: int = 0
    peak_bytes: int = 0
    """Most that one request held"""
    error: str = ""


# --- one engine, in a process of its own ------------------------------------------------------------------------------


def watch_pages(worker: Any) -> None:
    """Count what requests hold. Runs in the worker, the scheduler's process where there is one GPU."""
    from vllm.v1.core.sched.scheduler import Scheduler

    original = Scheduler.schedule
    worker.peak_bytes = 0

    def schedule(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        managers = self.kv_cache_manager.coordinator.single_type_managers
        held: dict[str, int] = {}
        for manager, group in zip(managers, self.kv_cache_config.kv_cache_groups, strict=True):
            size = manager.kv_cache_spec.page_size_bytes * len(group.layer_names)
            for request_id, blocks in manager.req_to_blocks.items():
                held[request_id] = held.get(request_id, 0) + size * sum(not block.is_null for block in blocks)
        worker.peak_bytes = max(worker.peak_bytes, *held.values(), 0)
        return output

    Scheduler.schedule = schedule


def peak_bytes(worker: Any) -> int:
    return worker.peak_bytes


def watch_compactions(worker: Any) -> None:
    """From now on wait for the GPU around every guide pass and every compaction, and add up their time."""
    import torch

    from vllm_kvcompress.episodic.worker import EvictionWorker

    worker.seconds = {"_run": 0.0, "_score_layers": 0.0, "compact": 0.0, "compactions": 0}

    def settle() -> None:
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def timed(name: str) -> None:
        original = getattr(EvictionWorker, name)

        def run(self: Any, *args: Any) -> Any:
            settle()
            started = time.perf_counter()
            result = original(self, *args)
            settle()
            worker.seconds[name] += time.perf_counter() - started
            worker.seconds["compactions"] += name == "compact"
            return result

        setattr(EvictionWorker, name, run)

    timed("_run")
    timed("_score_layers")
    timed("compact")


def compaction_seconds(worker: Any) -> dict[str, float]:
    return worker.seconds


def run_engine(job: dict[str, Any]) -> None:
    """Measure one setup once its turn has come; the result file is written after every stage."""
    from vllm import LLM

    setup = Setup(**job["setup"])
    measured = Measured(setup)
    llm = LLM(**job["engine"])
    Path(job["ready"]).touch()
    while not Path(job["go"]).exists():
        time.sleep(0.05)
    vocabulary = llm.llm_engine.vllm_config.model_config.get_vocab_size()
    context = job["context"]
    asked = None
    if setup.evicts:
        guide = random.choices(range(2, vocabulary), k=job["guide"])
        asked = {"kvcompress_budget": job["budget"], "kvcompress_policy": "epicache", "kvcompress_guide": guide}
    most = job["engine"]["max_model_len"] - context

    def read(tokens: int, batch: int) -> tuple[Requests, float]:
        requests = Requests(llm, tokens, vocabulary, most)
        return requests, requests.fill(batch, extra_args=asked)

    read(min(context, job["budget"] + 3 * job["block"]), 1)[0].drain()  # the first of everything is slower
    for _ in range(job["rounds"]):
        requests, seconds = read(context, 1)
        measured.prefill_s.append(seconds)
        requests.drain()
        Path(job["result"]).write_text(json.dumps(asdict(measured)))
    requests, _ = read(context, max(job["batches"]))
    for batch in job["batches"]:
        requests.shrink(batch)
        measured.decode_ms[batch] = statistics.median(requests.seconds_per_token(job["steps"])) * 1e3
        Path(job["result"]).write_text(json.dumps(asdict(measured)))
    requests.drain()
    # Last: with so many blocks to look at, every step takes a millisecond more.
    llm.collective_rpc(watch_pages)
    if setup.evicts:
        llm.collective_rpc(watch_compactions)
    read(context, 1)[0].drain()
    (measured.peak_bytes,) = llm.collective_rpc(peak_bytes)
    if setup.evicts:
        (seconds_of,) = llm.collective_rpc(compaction_seconds)
        measured.guide_s = seconds_of["_run"] - seconds_of["_score_layers"]  # layers are scored within the pass
        measured.compact_s = seconds_of["compact"] - measured.guide_s
        measured.compactions = int(seconds_of["compactions"])
    Path(job["result"]).write_text(json.dumps(asdict(measured)))


# --- all engines ------------------------------------------------------------------------------------------------------


def engine_arguments(args: argparse.Namespace, model: Path, setup: Setup) -> dict[str, Any]:
    most = max(args.batches)
    # Tokens that the first request makes while the others are read, then those that are timed.
    max_model_len = round_up(args.context + NEW_TOKENS + most * (args.context // args.block + 2), 128)
    token_bytes = (
        2 * (4 if args.dry_run else 2) * args.shape["head_dim"] * args.shape["num_key_value_heads"] * args.layers
    )
    # vLLM starts only where a request of the greatest length fits, whether requests evict or not.
    held = max(max_model_len, most * (2 * args.budget + 4 * args.block)) if setup.evicts else most * max_model_len
    kept_bytes = token_bytes * (held + 1024)  # + the null block and windows
    if setup.kv_cache_dtype != BASELINE:
        kept_bytes //= LEAST_COMPRESSION
    settings: dict[str, Any] = {"episodic": {"budget": args.budget, "block_tokens": args.block}} if setup.evicts else {}
    found = {
        "model": str(model),
        "kv_cache_dtype": setup.kv_cache_dtype,
        "load_format": "dummy",
        "max_model_len": max_model_len,
        "max_num_seqs": most,
        "max_num_batched_tokens": args.block,
        "kv_cache_memory_bytes": kept_bytes,
        "gpu_memory_utilization": 0.1,  # only checked against what is free at the start: the bytes are given
        "enable_prefix_caching": False,
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "seed": args.seed,
        "enforce_eager": args.dry_run,
    }
    if args.dry_run:
        found["dtype"] = "float32"
    else:
        found["enable_flashinfer_autotune"] = False
        found["compilation_config"] = {"cudagraph_capture_sizes": sorted({1, 2, 4, *args.batches})}
    if settings or setup.kv_cache_dtype != BASELINE:
        found["additional_config"] = {"kvcompress": settings}
    return found


def run_engines(args: argparse.Namespace, setups: list[Setup], folder: Path) -> list[Measured]:
    """Start all, then let one after the other measure."""
    write_model(folder / "model", args.shape | {"num_hidden_layers": args.layers})
    environ = {"VLLM_NO_USAGE_STATS": "1", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1", **os.environ}
    found, started = [], []
    try:
        for number_, setup in enumerate(setups):
            job = {
                "setup": asdict(setup),
                "engine": engine_arguments(args, folder / "model", setup),
                **{name: str(folder / f"{name}-{number_}") for name in ("ready", "go", "result")},
                **{
                    name: getattr(args, name)
                    for name in ("context", "budget", "block", "batches", "steps", "rounds", "guide")
                },
            }
            file = folder / f"job-{number_}.json"
            file.write_text(json.dumps(job))
            log = (args.out / f"benchmark_eviction-{number_}.log").open("w")
            command = [sys.executable, __file__, "--job", str(file)]
            process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=environ, start_new_session=True
            )
            started.append((setup, job, process, log))
            if number_ == 0:
                # What it compiles, the others find; then they start together, for their memory is given.
                _wait(process, Path(job["ready"]), args.timeout)
        for _, job, process, _ in started:
            _wait(process, Path(job["ready"]), args.timeout)
        for setup, job, process, log in started:
            Path(job["go"]).touch()
            try:
                code = process.wait(args.timeout)
                error = "" if code == 0 else f"the engine's process ended with {code}; see {log.name}"
            except subprocess.TimeoutExpired:
                error = f"not finished after {args.timeout:.0f} s; see {log.name}"
            _kill(process)
            result = Path(job["result"])
            given = json.loads(result.read_text()) if result.is_file() else {}
            given["decode_ms"] = {int(batch): ms for batch, ms in given.get("decode_ms", {}).items()}
            found.append(Measured(**{**given, "setup": setup, "error": error}))
            print(f"{setup.label}: {error or 'done'}", flush=True)
    finally:
        for *_, process, log in started:
            _kill(process)
            log.close()
    return found


def _wait(process: subprocess.Popen[bytes], ready: Path, seconds: float) -> None:
    end = time.monotonic() + seconds
    while process.poll() is None and not ready.exists() and time.monotonic() < end:
        time.sleep(0.1)


def _kill(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


# --- report -----------------------------------------------------------------------------------------------------------


def prefill_ratio(row: Measured, plain: Measured | None) -> float | None:
    """Of block prefill to plain chunked prefill and the guide passes."""
    if plain is None or not plain.prefill_s or not row.prefill_s:
        return None
    return statistics.median(row.prefill_s) / (statistics.median(plain.prefill_s) + row.guide_s)


def report(found: list[Measured], args: argparse.Namespace) -> str:
    auto = next((row for row in found if row.setup == Setup(BASELINE, False)), None)
    headers = [
        "engine", *(f"decode ms at {batch} (auto / it)" for batch in args.batches), "peak MiB a request (auto / it)",
        "prefill s", "guide passes s", "compactions s", "prefill / (plain + guide)",
    ]  # fmt: skip
    rows = []
    for row in found:
        cells = [row.setup.label]
        for batch in args.batches:
            ms, base = row.decode_ms.get(batch), auto.decode_ms.get(batch) if auto else None
            against = base / ms if ms and base else None
            judged = f" {verdict(against, LEAST_DECODE)}" if row.setup.evicts and batch == max(args.batches) else ""
            cells.append(f"{number(ms, 2)} ({number(against, 2)}{judged})")
        against = auto.peak_bytes / row.peak_bytes if auto and row.peak_bytes else None
        judged = f" {verdict(against, LEAST_MEMORY)}" if row.setup.evicts else ""
        cells.append(f"{row.peak_bytes / 2**20:,.0f} ({number(against, 2)}{judged})")
        cells.append(number(statistics.median(row.prefill_s), 2) if row.prefill_s else "-")
        if row.setup.evicts:
            plain = next((o for o in found if o.setup == Setup(row.setup.kv_cache_dtype, False)), None)
            ratio = prefill_ratio(row, plain)
            cells += [number(row.guide_s, 3), f"{row.compact_s:.3f} ({row.compactions})"]
            cells.append(f"{number(ratio, 2)} {verdict(ratio, MOST_PREFILL, at_least=False)}")
        else:
            cells += ["-"] * 3
        rows.append(cells)
    title = f"Histories of {args.context} tokens, budget {args.budget}, blocks of {args.block}, guides of {args.guide}"
    errors = [f"{row.setup.label}: {row.error}" for row in found if row.error]
    return "\n\n".join([title, common.table(headers, rows), *errors])


def draw(found: list[Measured], args: argparse.Namespace, name: str, line: str) -> Any:
    drawn, axes = common.figure(f"Eviction: {name}", line, args.dry_run, panels=3)
    labels = [row.setup.label for row in found]
    common.bars(
        axes[0],
        [f"{batch} x {args.context}" for batch in args.batches],
        {row.setup.label: [row.decode_ms.get(batch) for batch in args.batches] for row in found},
        digits=2,
    )
    axes[0].set_ylabel("ms per output token")
    common.bars(axes[1], ["one request"], {k: [r.peak_bytes / 2**20] for k, r in zip(labels, found, strict=True)}, 0)
    axes[1].set_ylabel("most KV memory, MiB")
    seconds = {k: [statistics.median(r.prefill_s) if r.prefill_s else None] for k, r in zip(labels, found, strict=True)}
    common.bars(axes[2], ["one request"], seconds, 2)
    axes[2].set_ylabel("prefill, s")
    return drawn


def parse() -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("--layers", type=int, default=12, help="layers of the dummy model; all of them are 32")
    parser.add_argument("--format", default="oscar-int2", help="beside auto")
    parser.add_argument("--context", type=int, default=102400)
    parser.add_argument("--budget", type=int, default=6144)
    parser.add_argument("--block", type=int, default=2048)
    parser.add_argument("--guide", type=int, default=GUIDE_TOKENS, help="tokens of the guide prompt")
    parser.add_argument("--batches", type=integers, default=[4, 1])
    parser.add_argument("--steps", type=int, default=32, help="decode steps of each timed block")
    parser.add_argument("--rounds", type=int, default=3, help="prefills that are timed")
    parser.add_argument(
        "--timeout", type=float, default=300, help="seconds an engine may take to start, and to measure"
    )
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.shape = LLAMA_8B
    if args.dry_run:
        args.shape = TOY
        args.layers, args.context, args.budget, args.block, args.guide = 2, 2048, 512, 256, 32
        args.steps, args.rounds = 4, 1
    args.batches = sorted(args.batches, reverse=True)
    return args


def main() -> None:
    args = parse()
    if args.job:
        run_engine(json.loads(args.job.read_text()))
        return
    common.begin(args)
    args.out.mkdir(parents=True, exist_ok=True)
    setups = [Setup(dtype, evicts) for dtype in (BASELINE, args.format) for evicts in (False, True)]
    with tempfile.TemporaryDirectory() as folder:
        found = run_engines(args, setups, Path(folder))
    environment = common.environment(dry_run=args.dry_run, copy=False)
    line = common.environment_line(environment)
    name = "toy" if args.dry_run else f"Llama-3.1-8B shape, {args.layers} of 32 layers, dummy weights"
    print(f"\n{line}\n{name}\n\n{report(found, args)}")
    content = {
        "environment": environment,
        "model": name,
        "arguments": {key: value for key, value in vars(args).items() if key not in ("out", "job", "shape")},
        "results": [asdict(row) for row in found],
    }
    common.write("benchmark_eviction", args, content, draw(found, args, name, line))
    if any(row.error for row in found):
        sys.exit(1)


if __name__ == "__main__":
    main()
