# SPDX-License-Identifier: Apache-2.0
"""Fetch a small model, calibrate it, serve it with a 2-bit KV cache, ask it a question and show what was saved."""

from __future__ import annotations

import argparse
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from vllm_kvcompress import rotations
from vllm_kvcompress.capacity.geometry import read_geometry
from vllm_kvcompress.demo import capacity
from vllm_kvcompress.demo.model import DEFAULT_MODEL, SOURCES, fetch_model
from vllm_kvcompress.demo.question import MESSAGES, QUESTION, TEXT
from vllm_kvcompress.demo.server import Server
from vllm_kvcompress.errors import KVCompressError, RotationError
from vllm_kvcompress.formats import format_names, get_format, is_ours

SUMMARY = "the whole way with a small real model: calibrate, serve, ask"

START_SECONDS = 600.0
ANSWER_TOKENS = 120


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        help=f"model folder, hub id, or one of {', '.join(SOURCES)} (default %(default)s)",
    )
    parser.add_argument("--kv-cache-dtype", default="oscar-int2", choices=("auto", *format_names()))
    parser.add_argument("--workdir", type=Path, default=Path(".demo"), help="models and logs (default %(default)s)")
    parser.add_argument("--port", type=int, default=0, help="of the server; default: a free one")
    parser.add_argument("--kv-cache-memory-bytes", type=int, default=1 << 30, help="memory for pages (default 1 GiB)")
    parser.add_argument(
        "--max-model-len", type=int, default=8192, help="default %(default)s, or what the model can do if that is less"
    )
    parser.add_argument("--question", help="what to ask; default: about a text that is longer than the 16-bit windows")
    parser.add_argument("--keep", action="store_true", help="leave the server running until Ctrl-C")


def run(args: argparse.Namespace) -> int:
    """The demo; KVCompressError goes to the caller, and the server is stopped however this ends."""
    # A plain `kill` shall clean up as Ctrl-C does.
    signal.signal(signal.SIGTERM, _exit_on_signal)
    begin = time.monotonic()
    try:
        model, folder = _find_model(args.model, args.workdir)
        _step(f"model: {model}")
        if is_ours(args.kv_cache_dtype) and get_format(args.kv_cache_dtype).needs_calibration:
            _calibrate_once(model, folder)
        _serve_and_ask(model, folder, args)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    print(f"\nserve it yourself: vllm serve {model} --kv-cache-dtype {args.kv_cache_dtype}")
    print(f"done in {time.monotonic() - begin:.0f} s; log of the server: {args.workdir / 'server.log'}")
    return 0


def _exit_on_signal(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def _step(text: str) -> None:
    print(f"\n== {text}", flush=True)


def _find_model(wanted: str, workdir: Path) -> tuple[str, Path]:
    """What to call the model and its local folder, downloaded if need be."""
    if wanted in SOURCES:
        folder = fetch_model(wanted, workdir / wanted).resolve()
        return str(folder), folder
    found = rotations.model_folder(wanted)
    if found is None:
        from huggingface_hub import snapshot_download

        print(f"downloading {wanted}", flush=True)
        try:
            # Safetensors only: some repositories hold the weights several times over.
            others = ["*.pth", "*.bin", "*.gguf", "original/*", "*.onnx"]
            found = Path(snapshot_download(wanted, ignore_patterns=others))
        except Exception as error:
            raise KVCompressError(
                f"{wanted} is not a folder and cannot be downloaded: {error}. "
                f"Known without a model hub: {', '.join(SOURCES)}"
            ) from None
    return wanted, found


def _calibrate_once(model: str, folder: Path) -> None:
    try:
        path = rotations.find_rotation(model, folder, None)
    except RotationError:
        _step(f"calibrating (once; kvcompress calibrate {model})")
        # A process of its own gives all its memory back before the server starts.
        command = [sys.executable, "-m", "vllm_kvcompress", "calibrate", model]
        status = subprocess.run(command).returncode
        if status != 0:
            raise KVCompressError(f"calibration failed with status {status}") from None
        path = rotations.find_rotation(model, folder, None)
    print(f"rotation file: {path}")


def _serve_and_ask(model: str, folder: Path, args: argparse.Namespace) -> None:
    geometry = read_geometry(folder)
    max_model_len = min(args.max_model_len, geometry.max_positions)
    memory = args.kv_cache_memory_bytes
    arguments = [
        *("--kv-cache-dtype", args.kv_cache_dtype),
        *("--max-model-len", str(max_model_len)),
        *("--kv-cache-memory-bytes", str(memory)),
        # Compiling the model takes longer than the question; leave it out to serve for longer.
        "--enforce-eager",
        *("--max-num-seqs", "8"),
    ]
    server = Server(model, arguments, args.workdir / "server.log", args.port)
    _step(f"vllm serve {' '.join(server.command[2:])}")
    with server:
        server.wait_until_ready(START_SECONDS, _Progress())
        print(f"\rready at {server.url}/v1" + " " * 20)
        if args.question:
            _step(f"question: {args.question}")
            messages = [{"role": "user", "content": args.question}]
        else:
            _step(f"question (after a text of {len(TEXT.split())} words): {QUESTION}")
            messages = MESSAGES
        _ask(server.url, model, messages)
        _step("KV cache")
        tokens = server.kv_cache_tokens()
        print(capacity.table(geometry, args.kv_cache_dtype, memory, max_model_len, tokens))
        if args.keep:
            _step(f"serving at {server.url}/v1 until Ctrl-C")
            while server.is_running():
                time.sleep(1)


class _Progress:
    """A line that counts the seconds: in place on a terminal, now and then in a log."""

    def __init__(self) -> None:
        self._width = shutil.get_terminal_size().columns
        self._next = 0.0

    def __call__(self, waited: float) -> None:
        if sys.stdout.isatty():
            print(f"\rstarting, {waited:.0f} s"[: self._width], end="", flush=True)
        elif waited >= self._next:
            print(f"starting, {waited:.0f} s", flush=True)
            self._next += 15


def _ask(url: str, model: str, messages: list[Any]) -> None:
    """Stream one chat answer to the terminal and say how it was made."""
    try:
        from openai import OpenAI, OpenAIError
    except ImportError:
        raise KVCompressError("the demo needs the openai client: pip install 'vllm-kvcompress[demo]'") from None
    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300)
    begin = time.monotonic()
    first = None
    usage = None
    try:
        stream = client.chat.completions.create(
            model=model,
            messages=messages,
            temperature=0,
            max_tokens=ANSWER_TOKENS,
            stream=True,
            stream_options={"include_usage": True},
        )
        for chunk in stream:
            usage = chunk.usage or usage
            text = chunk.choices[0].delta.content if chunk.choices else None
            if text:
                first = first or time.monotonic()
                print(text, end="", flush=True)
    except OpenAIError as error:
        raise KVCompressError(f"the server did not answer: {error}") from None
    end = time.monotonic()
    print()
    if usage and first:
        speed = (usage.completion_tokens - 1) / (end - first) if end > first else 0.0
        print(
            f"({usage.prompt_tokens} tokens read, first word after {first - begin:.1f} s; "
            f"{usage.completion_tokens} tokens written, {speed:.1f} per second)"
        )
