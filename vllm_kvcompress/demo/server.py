# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` as a child process that never outlives its `with` block."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import IO

from vllm_kvcompress.errors import KVCompressError

_POLL_SECONDS = 0.5
_STOP_SECONDS = 30.0
_TAIL_LINES = 25

DEFAULT_ENVIRON = {
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_NO_USAGE_STATS": "1",
    # A machine with two cores cannot afford the one that vLLM sets aside for its API server by default.
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
}
"""Of a server, unless the user's environment says otherwise."""


class ServerError(KVCompressError):
    """The server did not start, or died."""


def free_port() -> int:
    """A TCP port nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def vllm_command() -> str:
    """The `vllm` command of this Python environment, activated or not."""
    beside = Path(sys.executable).parent / "vllm"
    found = str(beside) if beside.is_file() else shutil.which("vllm")
    if found is None:
        raise ServerError(f"no vllm command beside {sys.executable}; run docker/install.sh")
    return found


class Server:
    """A local vLLM server. As a context manager it is started on entry and stopped, with all its children, on exit.

    Args:
        arguments: what follows `vllm serve MODEL`, host and port excepted.
        log_file: receives everything the server prints.
        port: 0 picks a free one.
    """

    def __init__(self, model: str, arguments: list[str], log_file: Path, port: int = 0) -> None:
        self.port = port or free_port()
        self.log_file = log_file
        self.command = [vllm_command(), "serve", model, "--host", "127.0.0.1", "--port", str(self.port), *arguments]
        self._process: subprocess.Popen[bytes] | None = None
        self._log: IO[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Server:
        with socket.socket() as probe:
            # Another server there would be taken for ours, and its answers too.
            if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                raise ServerError(f"port {self.port} is taken: something listens there already; choose another --port")
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        self._log = self.log_file.open("wb")
        # A session of its own: the engine's and the workers' processes can be signalled together, and Ctrl-C in the
        # terminal reaches us alone, who then stop them in order.
        self._process = subprocess.Popen(
            self.command,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env={**DEFAULT_ENVIRON, **os.environ},
            start_new_session=True,
        )
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def wait_until_ready(self, timeout: float, on_wait: Callable[[float], None] = lambda seconds: None) -> None:
        """Return once /health answers.

        Args:
            on_wait: called about twice a second with the seconds waited.

        Raises:
            ServerError: the server died or took longer, with the end of its log.
        """
        begin = time.monotonic()
        while not self._is_healthy():
            waited = time.monotonic() - begin
            if not self.is_running():
                raise ServerError(f"the server ended while starting.\n{self.log_tail()}")
            if waited > timeout:
                raise ServerError(f"the server was not ready after {waited:.0f} s.\n{self.log_tail()}")
            on_wait(waited)
            time.sleep(_POLL_SECONDS)

    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def _is_healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return answer.status == 200
        except (urllib.error.URLError, OSError):
            return False

    def log_text(self) -> str:
        return self.log_file.read_text(encoding="utf-8", errors="replace")

    def log_tail(self) -> str:
        """The end of the log, for error messages."""
        tail = "\n".join(self.log_text().splitlines()[-_TAIL_LINES:])
        return f"--- end of {self.log_file} ---\n{tail}\n---"

    def kv_cache_tokens(self) -> int:
        """Capacity of the KV cache in tokens, as vLLM logged it for requests of --max-model-len tokens."""
        found = re.search(r"KV cache size: ([\d,]+) tokens", self.log_text())
        if not found:
            raise ServerError(f"the server did not log its KV cache size.\n{self.log_tail()}")
        return int(found[1].replace(",", ""))

    def stop(self) -> None:
        """End the server and every process it started: politely first, then not."""
        process, self._process = self._process, None
        if process is not None:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_STOP_SECONDS)
            # Even where the server died, its engine or workers may live on.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if self._log is not None:
            self._log.close()
            self._log = None
