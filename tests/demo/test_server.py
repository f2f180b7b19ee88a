# SPDX-License-Identifier: Apache-2.0
"""The child server is gone after its `with` block, with its own children, and a failed start shows the log."""

import os
import stat
import sys
import time

import pytest

from vllm_kvcompress.demo import server as module
from vllm_kvcompress.demo.server import Server, ServerError

# Answers /health, and leaves a child behind that ignores the polite signal, as a stuck worker would.
HEALTHY = """
import http.server, subprocess, sys
port = int(sys.argv[sys.argv.index("--port") + 1])
code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", code])
print("child", child.pid, flush=True)
print("CPU KV cache size: 1,234,567 tokens, Maximum concurrency", flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """A Server whose `vllm` is the given Python code."""

    def make(code, port=0):
        script = tmp_path / "vllm"
        script.write_text(f"#!{sys.executable}\n{code}")
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setattr(module, "vllm_command", lambda: str(script))
        return Server("model", [], tmp_path / "logs" / "server.log", port)

    return make


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that is dead but not yet reaped does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, SystemExit])
def test_stops_with_all_its_children(start, error):
    with pytest.raises(error or ZeroDivisionError), start(HEALTHY) as server:
        server.wait_until_ready(60)
        assert server.is_running()
        assert server.kv_cache_tokens() == 1_234_567
        child = int(server.log_text().split()[1])
        assert is_alive(child)
        raise error or ZeroDivisionError
    assert not server.is_running()
    for _ in range(50):
        if not is_alive(child):
            break
        time.sleep(0.1)
    assert not is_alive(child)


def test_failed_start_shows_the_end_of_the_log(start):
    with (
        pytest.raises(ServerError, match=r"ended while starting(.|\n)*no such model"),
        start("raise SystemExit('no such model')") as server,
    ):
        server.wait_until_ready(60)


def test_another_server_on_the_port_is_not_taken_for_ours(start):
    with start(HEALTHY) as other:
        other.wait_until_ready(60)
        with pytest.raises(ServerError, match=f"port {other.port} is taken"), start(HEALTHY, other.port):
            pass
        assert other.is_running()


def test_slow_start_is_given_up(start):
    waits = []
    with (
        pytest.raises(ServerError, match="not ready after"),
        start("import time; print('loading', flush=True); time.sleep(600)") as server,
    ):
        process = server._process
        server.wait_until_ready(1, waits.append)
    assert waits and process.returncode is not None
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
