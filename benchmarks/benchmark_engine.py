# SPDX-License-Identifier: Apache-2.0
"""A whole engine: time per output token, tokens per second at equal KV memory, capacity, start.

    python benchmarks/benchmark_engine.py [--layers 12] [--formats auto,fp8,hadamard-int2] [--out DIR]      # GPU
    python benchmarks/benchmark_engine.py --model DIR --formats auto,oscar-int2 --batches 4 --contexts 1024 --rounds 3

Without --model: the shape of Llama-3.1-8B with dummy weights and --layers of its 32 layers. What a step costs besides
its layers (output head, sampling, scheduling) weighs the more, the fewer there are. Every format has an engine of its
own with the same kv_cache_memory_bytes: what `auto` needs for the largest batch at the largest context. Prompts are
random and differ, prefix caching is off. A context is prefilled once, for the largest batch; its decode steps are
timed, then requests are aborted down to the next batch, and so on.

Equal KV memory: a 1/--share part of the pool, as the full one would take minutes of prefill. The batch is the number of
requests that vLLM itself says fit, divided by --share; the engine decodes exactly that many.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import _common as common
import torch
from _common import number, verdict

BASELINE = "auto"
SETTLE_TOKENS, SETTLE_SECONDS = 8, 0.1
MOST_SETTLE_TOKENS = 128
BLOCKS = 3
CAPACITY_LENGTHS = (32768, 131072)
LEAST_THROUGHPUT = {BASELINE: 4.0, "fp8": 2.0}
LEAST_CAPACITY = 6.5
MOST_EXTRA_START = 30.0
MOST_COMPRESSION = 8
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "torch_dtype": "bfloat16",
}
TOY = LLAMA_8B | {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 2048,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


# --- the model --------------------------------------------------------------------------------------------------------


def write_model(folder: Path, config: dict[str, Any]) -> None:
    """A folder that vLLM serves with load_format=dummy, and a rotation file of random orthogonal matrices beside it."""
    from safetensors.torch import save_file

    from vllm_kvcompress.rotations import (
        ROTATION_BESIDE_MODEL,
        LayerRotation,
        RotationMetadata,
        RotationSet,
        write_rotation,
    )

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"unused": torch.zeros(1)}, folder / "model.safetensors")  # a model's fingerprint is of its weight files
    layers, heads, dim = (config[name] for name in ("num_hidden_layers", "num_key_value_heads", "head_dim"))

    def layer() -> LayerRotation:
        k, v = (torch.linalg.qr(torch.randn(heads, dim, dim))[0] for _ in range(2))
        clip = torch.full((heads,), 0.9)
        return LayerRotation(k, v, torch.zeros(heads, dim), clip, clip.clone())

    metadata = RotationMetadata(
        model="dummy weights",
        fingerprint="",
        layer_ids=list(range(layers)),
        num_kv_heads=heads,
        num_query_heads=config["num_attention_heads"],
        head_dim=dim,
        source="random orthogonal matrices",
    )
    rotations = RotationSet(metadata, {index: layer() for index in range(layers)})
    write_rotation(folder / ROTATION_BESIDE_MODEL, rotations)


# --- one engine, in a process of its own ------------------------------------------------------------------------------


class Requests:
    """Requests of one context in an engine, and the time their steps take."""

    def __init__(self, llm: Any, context: int, vocabulary: int, most_tokens: int) -> None:
        self._engine = llm.llm_engine
        self._context, self._vocabulary, self._most_tokens = context, vocabulary, most_tokens
        self._made: dict[str, int] = {}

    def fill(self, batch: int, extra_args: dict[str, Any] | None = None) -> float:
        """Add requests, of these extra arguments, and step until each has its first token; seconds.

        Requests that are prefilled first make tokens while the others are, so the time is a little more than prefill's.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = SamplingParams(
            max_tokens=self._most_tokens,
            ignore_eos=True,
            temperature=0,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            extra_args=extra_args,
        )
        prompts = [random.choices(range(2, self._vocabulary), k=self._context) for _ in range(batch)]
        started = time.perf_counter()
        for index, tokens in enumerate(prompts):
            name = f"{self._context}-{index}"
            self._engine.add_request(name, {"prompt_token_ids": tokens}, sampling)
            self._made[name] = 0
        while min(self._made.values()) == 0:
            self._step()
        return time.perf_counter() - started

    def shrink(self, batch: int) -> None:
        """Abort all but the first `batch`."""
        gone = list(self._made)[batch:]
        self._engine.abort_request(gone)
        for name in gone:
            del self._made[name]

    def drain(self) -> None:
        self.shrink(0)
        while self._engine.has_unfinished_requests():
            self._engine.step()

    def seconds_per_token(self, tokens: int) -> list[float]:
        """Seconds of one decode step of all requests, in BLOCKS blocks of `tokens` steps.

        The engine is another process and does not wait for this one: steps it has done meanwhile are waiting and come
        at once. They are taken first, and with them the last steps of requests that were aborted.

        Raises:
            RuntimeError: requests did not advance together, so the pool was too small and some waited.
        """
        begin = time.perf_counter()
        while time.perf_counter() - begin < SETTLE_SECONDS:
            self._advance(SETTLE_TOKENS)
        return [self._advance(tokens) / tokens for _ in range(BLOCKS)]

    def _advance(self, tokens: int) -> float:
        before = dict(self._made)
        goal = sum(before.values()) + tokens * len(before)
        started = time.perf_counter()
        while sum(self._made.values()) < goal:
            self._step()
        seconds = time.perf_counter() - started
        gains = [self._made[name] - before[name] for name in before]
        if max(gains) - min(gains) > 1:
            raise RuntimeError(f"{len(gains)} requests advanced by {min(gains)} to {max(gains)} tokens: some waited")
        return seconds

    def _step(self) -> None:
        for output in self._engine.step():
            if output.request_id in self._made:
                if output.finished:
                    raise RuntimeError(f"request {output.request_id} ended early, after {self._made} tokens")
                self._made[output.request_id] += len(output.outputs[0].token_ids)


def requests_that_fit(worker: Any, lengths: list[int]) -> list[float]:
    """vLLM's own count, for other values of max_model_len. Runs in the worker."""
    from vllm.v1.core.kv_cache_utils import get_max_concurrency_for_kv_cache_config

    config, found = worker.vllm_config, []
    kept = config.model_config.max_model_len
    for length in lengths:
        config.model_config.max_model_len = length
        found.append(get_max_concurrency_for_kv_cache_config(config, worker.model_runner.kv_cache_config))
    config.model_config.max_model_len = kept
    return found


def run_engine(job: dict[str, Any]) -> None:
    """Measure one format; the result file is written anew after every stage, so that what was measured survives."""
    result: dict[str, Any] = {"format": job["format"], "stages": {}, "decode": [], "prefill": [], "error": ""}
    path = Path(job["result"])

    def stage(name: str, seconds: float) -> None:
        result["stages"][name] = round(seconds, 1)
        path.write_text(json.dumps(result))
        print(f"  {job['format']:>18}  {name}: {seconds:.1f} s", file=sys.stderr, flush=True)

    started = time.perf_counter()
    from vllm import LLM

    stage("import", time.perf_counter() - started)
    started = time.perf_counter()
    llm = LLM(**job["engine"])
    cache = llm.llm_engine.vllm_config.cache_config
    vocabulary = llm.llm_engine.vllm_config.model_config.get_vocab_size()
    result["start_s"] = time.perf_counter() - started
    result["capacity"] = {
        "kv_cache_memory_bytes": job["engine"]["kv_cache_memory_bytes"],
        "max_model_len": job["engine"]["max_model_len"],
        "blocks": cache.num_gpu_blocks,
        "block_size": cache.block_size,
        "tokens": cache.kv_cache_size_tokens,
        "requests": cache.kv_cache_max_concurrency,
    }
    (fits,) = llm.collective_rpc(requests_that_fit, args=(job["capacity_lengths"],))
    result["capacity"]["requests_at"] = dict(zip(map(str, job["capacity_lengths"]), fits, strict=True))
    stage("start", result["start_s"])
    if job["wait_for"]:
        while not Path(job["wait_for"]).exists():
            time.sleep(0.05)
    for context in job["contexts"]:
        batches = set(job["batches"])
        if job["share"] and context == max(job["contexts"]):
            result["equal_memory_batch"] = math.floor(cache.kv_cache_max_concurrency / job["share"])
            batches.add(max(1, result["equal_memory_batch"]))
        requests = Requests(llm, context, vocabulary, job["engine"]["max_model_len"] - context)
        seconds = requests.fill(max(batches))
        result["prefill"].append(
            {"context": context, "batch": max(batches), "tokens_s": max(batches) * context / seconds}
        )
        stage(f"fill {max(batches)} x {context}", seconds)
        for batch in sorted(batches, reverse=True):
            requests.shrink(batch)
            blocks = requests.seconds_per_token(job["steps"])
            result["decode"].append(
                {"context": context, "batch": batch, "ms": statistics.median(blocks) * 1e3, "blocks_ms": blocks}
            )
            stage(f"decode {batch} x {context}", sum(blocks) * job["steps"])
        requests.drain()


# --- all engines ------------------------------------------------------------------------------------------------------


def engine_arguments(args: argparse.Namespace, model: Path | str, kv_bytes: int, max_model_len: int, on_gpu: bool):
    """Keyword arguments of vllm.LLM that all formats share."""
    most = round_up(most_requests(args), 8)
    found: dict[str, Any] = {
        "model": str(model),
        "max_model_len": max_model_len,
        "max_num_seqs": most,
        "max_num_batched_tokens": args.chunk,
        "kv_cache_memory_bytes": kv_bytes,
        "enable_prefix_caching": False,
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "enforce_eager": args.enforce_eager,
        "seed": args.seed,
    }
    if not args.model:
        found["load_format"] = "dummy"
    if args.wait_for:
        found["gpu_memory_utilization"] = 0.1  # only checked against what other engines left: kv_bytes are given
    if on_gpu and not args.enforce_eager:
        found["enable_flashinfer_autotune"] = False  # nothing of a dense 16-bit model is tuned, and it takes 15 s
        # The sizes that are decoded, and steps of 8: fewer graphs to capture, no batch padded by more than 7.
        sizes = sorted({1, 2, 4, *args.batches, *range(8, most + 1, 8)})
        found["compilation_config"] = {"cudagraph_capture_sizes": sizes}
    return found


def round_up(value: float, multiple: int) -> int:
    return math.ceil(value / multiple) * multiple


def most_requests(args: argparse.Namespace) -> int:
    """More than any format decodes at once: the equal-memory batch is below MOST_COMPRESSION times that of `auto`."""
    largest = max(args.batches)
    return max(largest, math.ceil(MOST_COMPRESSION * largest / args.share)) if args.share else largest


def longest_output(args: argparse.Namespace) -> int:
    """Tokens the first request makes: one a step while the others are prefilled, then the timed ones."""
    prefill = most_requests(args) * (math.ceil(max(args.contexts) / args.chunk) + 1)
    return prefill + (len(args.batches) + 1) * (MOST_SETTLE_TOKENS + BLOCKS * args.steps)


def run_format(job: dict[str, Any], log: Path, timeout: float, cold_start: bool) -> dict[str, Any]:
    """Run one engine in a process group of its own and end it with all its children, come what may."""
    path = Path(job["result"])
    job_file = path.with_suffix(".job.json")
    job_file.write_text(json.dumps(job))
    environ = {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # requests_that_fit travels to the worker as code
        **os.environ,
    }
    if cold_start:
        caches = path.with_suffix(".caches")
        for name in ("VLLM_CACHE_ROOT", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
            environ[name] = str(caches / name.lower())
    with log.open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, __file__, "--job", str(job_file)],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environ,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout)
            error = "" if code == 0 else f"the engine's process ended with {code}"
        except subprocess.TimeoutExpired:
            error = f"not finished after {timeout:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    empty = {"format": job["format"], "stages": {}, "decode": [], "prefill": []}
    result = json.loads(path.read_text()) if path.is_file() else empty
    result["error"] = error
    if error:
        print(f"{job['format']}: {error}; the end of {log}:", flush=True)
        print("\n".join(log.read_text(errors="replace").splitlines()[-25:]), flush=True)
    return result


def merge_rounds(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """One result of several rounds of a format: medians over the rounds, the first error."""
    merged = dict(rounds[0])
    merged["error"] = next((r["error"] for r in rounds if r["error"]), "")
    merged["rounds"] = rounds
    merged["decode"] = []
    for row in rounds[0]["decode"]:
        key = (row["context"], row["batch"])
        times = [r["ms"] for result in rounds for r in result["decode"] if (r["context"], r["batch"]) == key]
        merged["decode"].append({**row, "ms": statistics.median(times), "min_ms": min(times), "max_ms": max(times)})
    return merged


# --- report -----------------------------------------------------------------------------------------------------------


def step_ms(result: dict[str, Any], context: int, batch: int | None) -> float | None:
    return next((r["ms"] for r in result["decode"] if (r["context"], r["batch"]) == (context, batch)), None)


def tokens_per_second(result: dict[str, Any], context: int) -> float | None:
    batch = result.get("equal_memory_batch")
    ms = step_ms(result, context, batch)
    return None if ms is None or not batch else batch / ms * 1e3


def ratio(value: float | None, reference: float | None) -> float | None:
    return None if value is None or not reference else value / reference


def is_ours(name: str) -> bool:
    from vllm_kvcompress import formats

    return formats.is_ours(name)


def report(results: dict[str, dict[str, Any]], args: argparse.Namespace) -> str:
    names = list(results)
    auto = results.get(BASELINE, {"decode": []})
    parts = ["Milliseconds per output token, one token of every request (ratio to auto; target of ours <= 1)"]
    rows = []
    for context in args.contexts:
        for batch in args.batches:
            reference = step_ms(auto, context, batch)
            cells = [f"{batch}, {context}"]
            for name in names:
                ms = step_ms(results[name], context, batch)
                against = ratio(ms, reference)
                judged = f" {verdict(against, 1.0, at_least=False)}" if is_ours(name) else ""
                cells.append("failed" if ms is None else f"{ms:.2f} ({number(against, 2)}{judged})")
            rows.append(cells)
    parts.append(common.table(["batch, context", *names], rows))

    context = max(args.contexts)
    if args.share:
        rows = []
        for name in names:
            rate = tokens_per_second(results[name], context)
            cells = [name, number(results[name].get("equal_memory_batch"), 0), number(rate, 0)]
            for peer, target in LEAST_THROUGHPUT.items():
                other = results.get(peer)
                against = ratio(rate, tokens_per_second(other, context)) if other else None
                goal = f" (>= {target:g}: {verdict(against, target)})" if is_ours(name) else ""
                cells.append(f"{number(against, 2, 'x')}{goal}")
            rows.append(cells)
        size = next((r["capacity"]["kv_cache_memory_bytes"] for r in results.values() if "capacity" in r), 0)
        parts.append(f"Tokens per second in {size / args.share / 2**20:,.0f} MiB of KV memory, contexts of {context}")
        parts.append(common.table(["format", "requests", "tokens/s", *(f"to {n}" for n in LEAST_THROUGHPUT)], rows))

    rows = []
    for name in names:
        found = results[name].get("capacity")
        if found is None:
            rows.append([name, *["failed"] * (2 + len(args.capacity_lengths))])
            continue
        cells = [name, number(found["tokens"], 0)]
        for length in args.capacity_lengths:
            fits = found["requests_at"][str(length)]
            against = ratio(fits, auto.get("capacity", {}).get("requests_at", {}).get(str(length)))
            goal = f" (>= {LEAST_CAPACITY:g}: {verdict(against, LEAST_CAPACITY)})" if is_ours(name) else ""
            cells.append(f"{fits:.1f}, {number(against, 2, 'x')}{goal}")
        start = results[name].get("start_s")
        extra = None if start is None or "start_s" not in auto else start - auto["start_s"]
        goal = f" (<= auto + {MOST_EXTRA_START:g}: {verdict(extra, MOST_EXTRA_START, at_least=False)})"
        cells.append(f"{number(start, 0)}{goal if is_ours(name) and args.cold_start else ''}")
        rows.append(cells)
    lengths = [f"requests of {length}" for length in args.capacity_lengths]
    start_header = "start, s" if args.cold_start else "start, s (compile caches as found)"
    parts.append("Capacity as vLLM counts it (16-bit windows included), and seconds to start")
    parts.append(common.table(["format", "tokens, as vLLM logs", *lengths, start_header], rows))
    rows = [
        [name, *(f"{number(r['tokens_s'], 0)} ({r['batch']} x {r['context']})" for r in results[name]["prefill"])]
        for name in names
        if len(results[name]["prefill"]) == len(args.contexts)
    ]
    parts.append("Prefill tokens per second, of the fills")
    parts.append(common.table(["format", *map(str, args.contexts)], rows))
    stages = [f"{name}: " + ", ".join(f"{k} {v:g} s" for k, v in results[name]["stages"].items()) for name in names]
    parts.append("\n".join(["Wall time", *stages]))
    if errors := [f"{name}: {results[name]['error']}" for name in names if results[name]["error"]]:
        parts.append("\n".join(errors))
    return "\n\n".join(parts)


def draw(results: dict[str, dict[str, Any]], args: argparse.Namespace, model: str, line: str):
    drawn, axes = common.figure(f"Whole engine: {model}", line, args.dry_run, panels=2 if args.share else 1)
    shapes = [(context, batch) for context in args.contexts for batch in args.batches]
    series = {name: [step_ms(result, *shape) for shape in shapes] for name, result in results.items()}
    common.bars(axes[0], [f"{batch} x {context}" for context, batch in shapes], series)
    axes[0].set_ylabel("ms per output token")
    axes[0].set_xlabel("batch x context")
    if args.share:
        context = max(args.contexts)
        rates = {name: [tokens_per_second(result, context)] for name, result in results.items()}
        common.bars(axes[1], [f"equal KV memory, contexts of {context}"], rates, digits=0)
        axes[1].set_ylabel("tokens per second")
    return drawn


def integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def parse() -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("--model", help="serve this model instead of the dummy one")
    parser.add_argument("--layers", type=int, default=12, help="layers of the dummy model; all of them are 32")
    parser.add_argument("--formats", default="auto,fp8,hadamard-int2", help="values of --kv-cache-dtype")
    parser.add_argument("--batches", type=integers, default=[32, 8, 1])
    parser.add_argument("--contexts", type=integers, default=[4096, 32768])
    parser.add_argument("--share", type=int, default=4, help="equal-memory test in this part of the pool; 0: none")
    parser.add_argument("--steps", type=int, default=32, help=f"decode steps of each of {BLOCKS} timed blocks")
    parser.add_argument("--chunk", type=int, default=8192, help="max_num_batched_tokens")
    parser.add_argument("--rounds", type=int, default=1, help="engines of each format, in turn; medians count")
    parser.add_argument("--capacity-lengths", type=integers, default=list(CAPACITY_LENGTHS))
    parser.add_argument("--settings", type=json.loads, default={}, help="kvcompress settings, as JSON")
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--cold-start", action="store_true", help="empty compile caches for each, so starts compare")
    parser.add_argument("--timeout", type=float, default=400, help="seconds an engine may take")
    parser.add_argument("--earlier", type=Path, help="JSON of an earlier run with the same settings: adds its formats")
    parser.add_argument(
        "--wait-for", type=Path, metavar="FILE", help="measure when this file exists; runs started together take turns"
    )
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.dry_run:
        args.layers, args.formats, args.enforce_eager = 2, "auto,hadamard-int2,oscar-int2", True
        args.batches, args.contexts, args.steps, args.chunk, args.share = [4, 1], [128, 512], 4, 256, 4
        args.capacity_lengths = [512, 2048]
    args.batches, args.contexts = sorted(args.batches, reverse=True), sorted(args.contexts)
    return args


def same_run(args: argparse.Namespace) -> dict[str, Any]:
    """Settings that results must share to stand in one table."""
    names = ("model", "layers", "batches", "contexts", "share", "steps", "chunk", "rounds", "settings", "enforce_eager")
    return {name: getattr(args, name) for name in names}


def main() -> None:
    args = parse()
    if args.job:
        run_engine(json.loads(args.job.read_text()))
        return
    common.begin(args, needs_gpu=False)
    earlier = json.loads(args.earlier.read_text()) if args.earlier else None
    if earlier and earlier["same_run"] != same_run(args):
        raise SystemExit(f"{args.earlier} was measured with {earlier['same_run']}, this run has {same_run(args)}")
    with tempfile.TemporaryDirectory() as scratch_name:
        scratch = Path(scratch_name)
        model: Path | str = args.model or scratch / "model"
        if not args.model:
            write_model(scratch / "model", (TOY if args.dry_run else LLAMA_8B) | {"num_hidden_layers": args.layers})
        from vllm_kvcompress.capacity.geometry import head_bytes_per_token, read_geometry

        geometry = read_geometry(Path(model))
        shape = "toy" if args.dry_run else f"Llama-3.1-8B shape, {args.layers} of 32 layers"
        name = args.model or f"{shape}, dummy weights"
        on_gpu = torch.cuda.is_available()
        max_model_len = round_up(max(args.contexts) + longest_output(args), 128)
        token_bytes = head_bytes_per_token(BASELINE, geometry.head_dim) * geometry.heads
        # + a block: vLLM keeps one as the null block.
        kv_bytes = token_bytes * (max(args.batches) * max_model_len + 128)
        print(f"{name}; max_model_len {max_model_len}, KV memory {kv_bytes / 2**20:,.0f} MiB", flush=True)
        shared = engine_arguments(args, model, kv_bytes, max_model_len, on_gpu)
        args.out.mkdir(parents=True, exist_ok=True)
        formats = args.formats.split(",")
        rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in formats}
        for index in range(args.rounds):
            for dtype in formats:
                job = {
                    "format": dtype,
                    "engine": {**shared, "kv_cache_dtype": dtype},
                    "result": str(scratch / f"{dtype}-{index}.json"),
                    **{
                        key: getattr(args, key) for key in ("batches", "contexts", "share", "steps", "capacity_lengths")
                    },
                    "wait_for": str(args.wait_for) if args.wait_for else "",
                }
                if is_ours(dtype):
                    job["engine"]["additional_config"] = {"kvcompress": args.settings}
                started = time.perf_counter()
                log = args.out / f"benchmark_engine-{dtype}.log"
                rounds[dtype].append(run_format(job, log, args.timeout, args.cold_start))
                stages = rounds[dtype][-1]["stages"]
                print(f"{dtype}: {time.perf_counter() - started:.0f} s in all, {stages}", flush=True)
    # Only now: asking the device for its name makes a CUDA context, whose memory the engines could not have.
    found = common.environment(dry_run=args.dry_run or not on_gpu, copy=False)
    results = {dtype: merge_rounds(runs) for dtype, runs in rounds.items()}
    if earlier and earlier["environment"] == found:
        results = {result["format"]: result for result in earlier["results"]} | results
    elif earlier:
        print(f"{args.earlier} is left out: it was measured on {common.environment_line(earlier['environment'])}")
    line = common.environment_line(found)
    print(f"\n{line}\n\n{report(results, args)}")
    content = {"environment": found, "model": name, "same_run": same_run(args), "results": list(results.values())}
    common.write("benchmark_engine", args, content, draw(results, args, name, line))
    if any(result["error"] for result in results.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
