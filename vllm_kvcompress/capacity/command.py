# SPDX-License-Identifier: Apache-2.0
"""What fits on a GPU in each KV cache format, before anything is calibrated or started.

Tokens and requests are vLLM's own count for the KV memory shown, 16-bit windows included. How much memory that is on a
GPU is an estimate: what vLLM may use, less the weights divided by --tp, less --reserve. With --kv-cache-memory-bytes,
which `vllm serve` takes too, nothing is estimated.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_kvcompress.capacity import plan
from vllm_kvcompress.capacity.report import report
from vllm_kvcompress.capacity.text import gib, parse_bytes
from vllm_kvcompress.capacity.weights import find_config, weight_bytes
from vllm_kvcompress.config import NAMESPACE, Settings, load_settings
from vllm_kvcompress.errors import KVCompressError
from vllm_kvcompress.formats import is_ours
from vllm_kvcompress.formats.base import PAGE_TOKENS
from vllm_kvcompress.logs import quiet

if TYPE_CHECKING:
    from vllm.config import VllmConfig

SUMMARY = "what fits in a GPU's memory in each format"

DEFAULT_RESERVE = 3 << 30
"""By arithmetic, for a model of 8B parameters and vLLM's defaults: about 0.5 GiB each for the CUDA context, for CUDA
graphs and for the activations of a step of 8192 tokens; the rest for float32 logits of 1024 requests and sampling."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", metavar="MODEL", help="Hugging Face name or folder; configuration and index suffice")
    memory = parser.add_mutually_exclusive_group(required=True)
    size = "80GiB, 80GB, 80G (2^30 each) or 80g (10^9 each)"
    memory.add_argument(
        "--gpu-memory", type=parse_bytes, metavar="SIZE", help=f"of one GPU, as nvidia-smi says: {size}"
    )
    memory.add_argument(
        "--kv-cache-memory-bytes", type=parse_bytes, metavar="SIZE", help="of one GPU, for the KV cache alone"
    )
    parser.add_argument("--tp", type=int, default=1, metavar="N", help="tensor parallel size (default %(default)s)")
    parser.add_argument("--max-model-len", type=int, metavar="N", help="tokens of a request; default: the model's most")
    parser.add_argument(
        "--gpu-memory-utilization", type=float, default=0.92, metavar="F", help="as vLLM's (default %(default)s)"
    )
    parser.add_argument(
        "--reserve",
        type=parse_bytes,
        default=DEFAULT_RESERVE,
        metavar="SIZE",
        help="allowance on each GPU for activations, logits, CUDA graphs and the CUDA context (default 3GiB)",
    )
    parser.add_argument(
        "--weights", type=parse_bytes, metavar="SIZE", help="of the whole model; default: from its files"
    )
    parser.add_argument("--dtype", default="auto", help="of the model (default %(default)s)")
    parser.add_argument(
        "--formats",
        type=_formats,
        default=",".join(plan.FORMATS),
        metavar="NAME[,NAME...]",
        help="--kv-cache-dtype values (default %(default)s)",
    )
    parser.add_argument(
        "--sinks", type=int, metavar="S", help="first tokens kept in 16 bits (default: as when serving)"
    )
    parser.add_argument(
        "--recent", type=int, metavar="R", help="last tokens kept in 16 bits (default: as when serving)"
    )
    parser.add_argument(
        "--device", choices=("gpu", "cpu"), default="gpu", help="whose block sizes (default %(default)s)"
    )
    blocks = f"as vLLM's; default: {PAGE_TOKENS} for this package's formats, else what the device's backends choose"
    parser.add_argument("--block-size", type=int, metavar="N", help=blocks)
    parser.add_argument("--trust-remote-code", action="store_true", help="as vLLM's")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")


def _formats(text: str) -> list[str]:
    names = list(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in plan.FORMATS:
            raise argparse.ArgumentTypeError(f"unknown format {name!r}; known: {', '.join(plan.FORMATS)}")
    return names


def run(args: argparse.Namespace) -> int:
    """Plan and print; KVCompressError goes to the caller."""
    _check(args)
    given = {"sink_tokens": args.sinks, "recent_tokens": args.recent}
    settings = load_settings({NAMESPACE: {name: value for name, value in given.items() if value is not None}})
    folder = find_config(args.model)
    with quiet():
        text = _plan(args, folder, settings)
    print(text)
    return 0


def _plan(args: argparse.Namespace, folder: Path, settings: Settings) -> str:
    config = plan.configure(
        args.model,
        folder,
        dtype=args.dtype,
        tensor_parallel=args.tp,
        trust_remote_code=args.trust_remote_code,
    )
    limit = config.model_config.max_model_len
    length = args.max_model_len or limit
    if length > limit:
        raise KVCompressError(f"--max-model-len {length} is beyond the model's limit of {limit} tokens")
    memory = _memory(args, config, folder)
    windows = settings.windows(args.model)
    rows = [
        plan.plan(
            config,
            name,
            memory["kv_cache"],
            max_model_len=length,
            block_size=args.block_size or plan.default_block_size(name, args.device),
            windows=windows,
        )
        for name in args.formats
    ]
    if args.json:
        figures = [asdict(row) for row in rows]
        return json.dumps({"memory": memory, "max_model_len": length, "windows": windows, "formats": figures}, indent=2)
    return report(args.model, config, args.gpu_memory_utilization, memory, length, windows, rows)


def _check(args: argparse.Namespace) -> None:
    for name, low in {"tp": 1, "max_model_len": 1, "block_size": 1}.items():
        value = getattr(args, name)
        if value is not None and value < low:
            raise KVCompressError(f"--{name.replace('_', '-')} must be at least {low}, got {value}")
    if not 0 < args.gpu_memory_utilization <= 1:
        raise KVCompressError(
            f"--gpu-memory-utilization must be above 0 and at most 1, got {args.gpu_memory_utilization}"
        )
    ours = [name for name in args.formats if is_ours(name)]
    if ours and args.block_size and args.block_size % PAGE_TOKENS:
        raise KVCompressError(
            f"--block-size must be a multiple of {PAGE_TOKENS} for {', '.join(ours)}, got {args.block_size}"
        )
    if args.device == "cpu" and args.gpu_memory:
        raise KVCompressError("--device cpu needs --kv-cache-memory-bytes instead of --gpu-memory")


def _memory(args: argparse.Namespace, config: VllmConfig, folder: Path) -> dict[str, int]:
    """Bytes of one GPU by their use; `kv_cache` is what is left.

    Raises:
        KVCompressError: nothing is left.
    """
    if args.kv_cache_memory_bytes:
        return {"kv_cache": args.kv_cache_memory_bytes}
    model_config: Any = config.model_config
    # Quantised weights are loaded as they are, others in the model's dtype.
    itemsize = None if model_config.quantization else model_config.dtype.itemsize
    weights = args.weights or weight_bytes(args.model, folder, itemsize)
    usable = int(args.gpu_memory * args.gpu_memory_utilization)
    share = -(-weights // args.tp)
    left = usable - share - args.reserve
    if left <= 0:
        raise KVCompressError(
            f"no memory is left for the KV cache: of {gib(args.gpu_memory)} on each GPU, {gib(usable)} may be used "
            f"(--gpu-memory-utilization {args.gpu_memory_utilization}), and weights of {gib(share)} with a reserve of "
            f"{gib(args.reserve)} take all of it. Raise --tp or --gpu-memory, or lower --reserve"
        )
    return {"gpu": args.gpu_memory, "usable": usable, "weights": share, "reserve": args.reserve, "kv_cache": left}
