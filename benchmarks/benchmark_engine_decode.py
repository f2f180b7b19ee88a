# SPDX-License-Identifier: Apache-2.0
"""Decode speed of a whole engine: tokens per second of our formats as a ratio to the same engine with `auto`.

    python benchmarks/benchmark_engine_decode.py MODEL [--formats auto,oscar-int2] [--batch 4] [--context 1024]

Each format runs in a process of its own, the formats in turn for `--rounds` rounds, and the medians are compared: a
machine that drifts drifts for all. The decode rate is (tokens of the long run) / (time of the long - of the short run),
with prefix caching off, so that prefill cancels out.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time


def measure(model: str, dtype: str, batch: int, context: int, tokens: int, settings: dict) -> float:
    """Decode tokens per second of one engine."""
    import random

    from vllm import LLM, SamplingParams

    llm = LLM(
        model,
        kv_cache_dtype=dtype,
        max_model_len=context + tokens + 16,
        max_num_seqs=batch,
        kv_cache_memory_bytes=1 << 30,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        additional_config={"kvcompress": settings} if dtype != "auto" else {},
    )
    prompts = [{"prompt_token_ids": [random.randrange(1000, 20000) for _ in range(context)]} for _ in range(batch)]

    def seconds(count: int) -> float:
        sampling = SamplingParams(max_tokens=count, ignore_eos=True, temperature=0, detokenize=False)
        begin = time.perf_counter()
        llm.generate(prompts, sampling, use_tqdm=False)
        return time.perf_counter() - begin

    seconds(4)
    short = statistics.median(seconds(2) for _ in range(3))
    long = statistics.median(seconds(2 + tokens) for _ in range(3))
    return batch * tokens / (long - short)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--formats", default="auto,oscar-int2,hadamard-int2")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--settings", type=json.loads, default={}, help="kvcompress settings, as JSON")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        rate = measure(args.model, args.one, args.batch, args.context, args.tokens, args.settings)
        print(f"RATE {rate}")
        return
    formats = args.formats.split(",")
    rates: dict[str, list[float]] = {name: [] for name in formats}
    for _ in range(args.rounds):
        for name in formats:
            done = subprocess.run(
                [sys.executable, *sys.argv, "--one", name], stdout=subprocess.PIPE, text=True, check=True
            )
            rates[name].append(float(next(x for x in done.stdout.splitlines() if x.startswith("RATE ")).split()[1]))
    reference = statistics.median(rates["auto"]) if "auto" in rates else None
    print(
        f"{'format':16} {'tokens/s':>9} {'min':>8} {'max':>8} {'ratio':>6}   batch {args.batch}, context {args.context}"
    )
    for name, found in rates.items():
        median = statistics.median(found)
        ratio = "" if reference is None else f"{median / reference:6.2f}"
        print(f"{name:16} {median:9.1f} {min(found):8.1f} {max(found):8.1f} {ratio}")


if __name__ == "__main__":
    main()
