# SPDX-License-Identifier: Apache-2.0
"""Most pages that a request ever holds while it reads histories of growing length: a real engine on the CPU, minutes.

    python benchmarks/episodic_pages.py [--budget 4096] [--block 2048] [--histories 4,8,16,32,64,128,256] [--out DIR]

The model is a random Llama of one layer: pages are counted, and neither their number nor their place depends on what is
in them. Histories are random tokens, one request after the other. After every step that vLLM schedules, the request's
tables are looked at: pages that are not null, and blocks of the 16-bit windows, which have the same bytes. The bounds
are `Eviction.peak_pages` (budget, a block, the recent window and two pages that are not full) and the windows' own
(`WindowSpec.max_admission_blocks_per_request`). `full` is what the same history holds without eviction, by arithmetic.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import _common as common
from tqdm import tqdm

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the block managers are looked at from here

POLICIES = ("streaming", "keydiff", "epicache")
VOCABULARY, GUIDE_TOKENS, NEW_TOKENS = 512, 64, 4


@dataclass(frozen=True)
class Found:
    policy: str
    history: int
    pages: int
    """Most that were not null after any step"""
    window_blocks: int
    most_pages: int
    most_window_blocks: int
    """The bounds of both"""
    full_pages: int
    bytes: int
    """Of the most pages and window blocks held at once"""
    full_bytes: int
    """Of all pages of the history, with the windows at their bound"""
    seconds: float
    """Of processor time: the engine is in this process"""

    @property
    def seconds_per_1k(self) -> float:
        return self.seconds / self.history * 1000

    @property
    def holds(self) -> bool:
        return self.pages <= self.most_pages and self.window_blocks <= self.most_window_blocks


class Watched:
    """An engine whose scheduler tells the progress of the only request and the most blocks that it held."""

    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        from vllm import LLM

        self.llm = LLM(
            str(folder),
            skip_tokenizer_init=True,
            kv_cache_dtype=args.kv_cache_dtype,
            dtype="float32",
            enforce_eager=True,
            enable_prefix_caching=False,
            max_model_len=max(args.histories) + NEW_TOKENS,
            max_num_batched_tokens=args.block,
            max_num_seqs=1,
            kv_cache_memory_bytes=args.kv_memory << 20,
            additional_config={"kvcompress": {"episodic": {"budget": args.budget, "block_tokens": args.block}}},
        )
        self.config = self.llm.llm_engine.vllm_config
        core: Any = self.llm.llm_engine.engine_core
        scheduler = core.engine_core.scheduler
        self.managers = scheduler.kv_cache_manager.coordinator.single_type_managers
        self.layers = [len(group.layer_names) for group in scheduler.kv_cache_config.kv_cache_groups]
        self.held, self.both, self.bar = [0, 0], 0, tqdm(disable=True)
        original = scheduler.schedule

        def schedule(*arguments: Any, **keywords: Any) -> Any:
            output = original(*arguments, **keywords)
            now = [self._blocks(manager) for manager in self.managers]
            self.held = [max(pair) for pair in zip(self.held, now, strict=True)]
            self.both = max(self.both, self._bytes(now))
            self.bar.update(output.total_num_scheduled_tokens)
            return output

        scheduler.schedule = schedule

    @staticmethod
    def _blocks(manager: Any) -> int:
        return max((sum(not block.is_null for block in table) for table in manager.req_to_blocks.values()), default=0)

    def _bytes(self, blocks: list[int]) -> int:
        specs = [manager.kv_cache_spec.page_size_bytes for manager in self.managers]
        return sum(count * size * layers for count, size, layers in zip(blocks, specs, self.layers, strict=True))

    def read(self, policy: str, history: list[int], guide: list[int], budget: int) -> Found:
        """One request: the history is its prompt."""
        from vllm import SamplingParams

        from vllm_kvcompress.checks import eviction_defaults
        from vllm_kvcompress.episodic import request

        asked = {request.BUDGET: budget, request.POLICY: policy}
        if policy == "epicache":
            asked[request.GUIDE] = guide
        wanted = request.parse(asked, eviction_defaults(self.config))
        assert wanted is not None
        pages, windows = self.managers
        most_windows = windows.max_admission_blocks_per_request
        full = -(-len(history) // pages.block_size)
        self.held, self.both = [0, 0], 0
        sampling = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True, temperature=0, extra_args=asked)
        with tqdm(
            total=len(history) + NEW_TOKENS - 1, desc=f"{policy}, {len(history) >> 10}K", unit="token", leave=False
        ) as self.bar:
            began = time.process_time()
            self.llm.generate({"prompt_token_ids": history}, sampling, use_tqdm=False)
            seconds = time.process_time() - began
        return Found(
            policy, len(history), *self.held, wanted.eviction.peak_pages(pages.block_size), most_windows, full,
            self.both, self._bytes([full, most_windows]), seconds,
        )  # fmt: skip


def write_model(folder: Path, positions: int, seed: int) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=positions,
        initializer_range=0.08,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def tables(found: list[Found]) -> str:
    headers = [
        "history",
        "policy",
        "pages",
        "bound",
        "window blocks",
        "bound",
        "full: pages",
        "MiB",
        "full: MiB",
        "s/1K",
    ]
    rows = [
        [
            f"{row.history >> 10}K", row.policy, str(row.pages), str(row.most_pages), str(row.window_blocks),
            str(row.most_window_blocks), str(row.full_pages), f"{row.bytes / 2**20:.2f}",
            f"{row.full_bytes / 2**20:.2f}", f"{row.seconds_per_1k:.3f}",
        ]
        for row in sorted(found, key=lambda row: (row.history, POLICIES.index(row.policy)))
    ]  # fmt: skip
    return common.table(headers, rows)


def draw(found: list[Found], args: argparse.Namespace, environment: str) -> Any:
    drawn, (pages, seconds) = common.figure(
        "Pages of one request that evicts, by history", environment, args.dry_run, 2
    )
    lengths = [length >> 10 for length in args.histories]
    for policy in args.policies:
        rows = [row for row in found if row.policy == policy]
        pages.plot(lengths, [row.pages for row in rows], marker="o", label=policy)
        seconds.plot(lengths, [row.seconds_per_1k for row in rows], marker="o", label=policy)
    rows = found[: len(lengths)]
    pages.plot(lengths, [row.most_pages for row in rows], "k--", label="bound")
    pages.plot(lengths, [row.full_pages for row in rows], color="gray", label="without eviction")
    for axis, label in ((pages, "most pages held"), (seconds, "processor seconds per 1K tokens")):
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, [f"{length}K" for length in lengths])
        axis.set_xlabel("history, tokens")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    pages.set_yscale("log")
    seconds.set_ylim(bottom=0)
    return drawn


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--budget", type=int, default=4096, help="tokens that every layer keeps (default: 4096)")
    parser.add_argument("--block", type=int, default=2048, help="tokens read between two evictions (default: 2048)")
    parser.add_argument(
        "--histories", type=lambda text: [int(part) << 10 for part in text.split(",")],
        default="4,8,16,32,64,128,256", help="in units of 1024 tokens",
    )  # fmt: skip
    parser.add_argument("--policies", type=lambda text: text.split(","), default=",".join(POLICIES))
    parser.add_argument("--kv-cache-dtype", default="turboquant-4", help="a format without calibration")
    parser.add_argument("--kv-memory", type=int, default=128, metavar="MIB", help="of the pool (default: 128)")
    args = parser.parse_args()
    common.begin(args, needs_gpu=False)
    if args.dry_run:
        args.histories = args.histories[:2]
    rng = random.Random(args.seed)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), max(args.histories) + NEW_TOKENS, args.seed)
        engine = Watched(Path(folder), args)
        guide = [rng.randrange(VOCABULARY) for _ in range(GUIDE_TOKENS)]
        histories = [[rng.randrange(VOCABULARY) for _ in range(length)] for length in args.histories]
        for policy in args.policies:
            engine.read(policy, histories[0], guide, args.budget)  # first calls of kernels are slower
            found += [engine.read(policy, history, guide, args.budget) for history in histories]
    print(tables(found))
    environment = common.environment(args.dry_run)
    rows = [{**asdict(row), "seconds_per_1k": row.seconds_per_1k, "holds": row.holds} for row in found]
    content = {"environment": environment, "rows": rows}
    common.write("episodic_pages", args, content, draw(found, args, common.environment_line(environment)))
    broken = [row for row in found if not row.holds]
    if broken:
        raise SystemExit(f"{len(broken)} of {len(found)} requests held more than their bound")


if __name__ == "__main__":
    main()
