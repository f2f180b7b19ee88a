# SPDX-License-Identifier: Apache-2.0
"""`vllm serve` killed in the middle of its work, and two of them at once: words, and nothing of the user's lost."""

import concurrent.futures
import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path

import openai
import psutil
import pytest

from vllm_kvcompress import rotations
from vllm_kvcompress.demo.server import Server
from vllm_kvcompress.serving.middleware import HEADER

pytestmark = pytest.mark.long

NAME = "somebody/tiny"
BLOCK, MAX_LEN = 256, 2048
SETTINGS = {
    "sink_tokens": 32,
    "recent_tokens": 64,
    "episodic": {"budget": 512, "block_tokens": BLOCK, "episodes": 2},
}
ENGINE = ["--kv-cache-dtype", "oscar-int2", "--dtype", "float32", "--enforce-eager", "--max-model-len", str(MAX_LEN)]
ENGINE += ["--kv-cache-memory-bytes", str(64 << 20), "--max-num-batched-tokens", str(BLOCK)]
ENGINE += ["--additional-config", json.dumps({"kvcompress": SETTINGS})]
START_SECONDS, ANSWER_SECONDS = 600, 300
QUESTION = {"role": "user", "content": "What did I tell you?"}
HISTORY = [
    {"role": role, "content": f"Number {turn}: {said} the {('tomatoes', 'violin')[turn // 8 % 2]}, as I said."}
    for turn in range(28)
    for role, said in (("user", "something new happened with"), ("assistant", "please go on about"))
]


@pytest.fixture
def home(demo_model, tmp_path, monkeypatch):
    """A hub cache with one downloaded model and an empty folder for rotation files, as a user has them."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    from _soak_common import random_model

    revision = "a" * 40
    hub = tmp_path / "hub" / f"models--{NAME.replace('/', '--')}"
    random_model(hub / "snapshots" / revision, demo_model, seed=7)
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text(revision)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("VLLM_KVCOMPRESS_CACHE", str(tmp_path / "rotations"))
    return tmp_path


def calibrate() -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "vllm_kvcompress", "calibrate", NAME, "--tokens", "256", "--if-missing"]
    return subprocess.run(command, capture_output=True, text=True, timeout=START_SECONDS)


def serve(home: Path, name: str, port: int = 0, workers: int = 1) -> Server:
    return Server(NAME, [*ENGINE, "--tensor-parallel-size", str(workers)], home / "logs" / name, port)


def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=ANSWER_SECONDS, max_retries=0)


def ask(server: Server, messages: list[dict], salt: str = "somebody"):
    return client(server).chat.completions.with_raw_response.create(
        model=NAME, messages=messages, max_tokens=8, temperature=0, extra_body={"ignore_eos": True, "cache_salt": salt}
    )


def answers(server: Server, salt: str = "somebody") -> list[str]:
    """Of a short history and of a long one that this tenant has not sent: read and kept, then again from what was."""
    found = [ask(server, messages, salt) for messages in ([QUESTION], [*HISTORY, QUESTION], [*HISTORY, QUESTION])]
    headers = [raw.headers.get(HEADER.decode()) for raw in found]
    assert headers[0] is None and headers[1].endswith("built") and headers[2].endswith("reused"), headers
    return [raw.parse().choices[0].message.content for raw in found]


def files(home: Path) -> dict[str, bytes]:
    """What the user has: the model's files and the folder of rotation files."""
    return {
        str(path.relative_to(home)): path.read_bytes()
        for folder in ("hub", "rotations")
        for path in sorted((home / folder).rglob("*"))
        if path.is_file()
    }


def processes(server: Server) -> list[psutil.Process]:
    assert server._process is not None
    server_process = psutil.Process(server._process.pid)
    return [server_process, *server_process.children(recursive=True)]


def kill(server: Server, title: str) -> None:
    (found,) = [one for one in processes(server) if title in " ".join(one.cmdline())]
    found.kill()


def check_gone(server: Server, all_of_it: list[psutil.Process]) -> None:
    """The server ends by itself, having said why, and so do its processes."""
    _, alive = psutil.wait_procs(all_of_it, timeout=60)
    assert not alive, alive
    assert "EngineDeadError" in server.log_text()


def check_nothing_lost(home: Path, before: dict[str, bytes], expected: list[str], workers: int = 1) -> None:
    """The user's files are as they were, and a new server answers as the one that is gone."""
    assert files(home) == before
    with serve(home, "again", workers=workers) as server:
        server.wait_until_ready(START_SECONDS)
        assert answers(server) == expected
    assert files(home) == before


def test_killed_in_the_middle_of_a_request(home):
    assert calibrate().returncode == 0
    before = files(home)
    with serve(home, "engine") as server:
        server.wait_until_ready(START_SECONDS)
        expected, all_of_it = answers(server), processes(server)
        events = client(server).chat.completions.create(
            model=NAME, messages=[*HISTORY, QUESTION], max_tokens=512, stream=True, extra_body={"ignore_eos": True}
        )
        stream = iter(events)
        next(stream)
        kill(server, "EngineCore")
        with pytest.raises(openai.APIError, match="EngineCore encountered an issue"):
            list(stream)
        check_gone(server, all_of_it)
    check_nothing_lost(home, before, expected)


@pytest.mark.parametrize(("workers", "title"), [(1, "Worker"), (2, "Worker_TP1")])
def test_worker_killed_while_a_history_is_read(home, workers, title):
    """By the middleware. Of two workers with a part of the heads each, the other must not wait for ever."""
    assert calibrate().returncode == 0
    before = files(home)
    with serve(home, "worker", workers=workers) as server, concurrent.futures.ThreadPoolExecutor(1) as pool:
        server.wait_until_ready(START_SECONDS)
        expected, all_of_it = answers(server), processes(server)
        other = [{**message, "content": message["content"] + " Or not."} for message in HISTORY[:40]]
        asked = pool.submit(ask, server, [*other, QUESTION])
        time.sleep(0.5)
        assert not asked.done()
        kill(server, title)
        with pytest.raises(openai.APIError) as caught:
            asked.result(ANSWER_SECONDS)
        assert isinstance(caught.value, openai.InternalServerError | openai.APIConnectionError), caught.value
        check_gone(server, all_of_it)
    check_nothing_lost(home, before, expected, workers)


def test_two_at_once(home):
    """Calibrated and started at the same time, as replicas with a shared cache are; a third finds its port taken."""
    with contextlib.ExitStack() as stack, concurrent.futures.ThreadPoolExecutor(2) as pool:

        def begin(name: str) -> Server:
            done = calibrate()
            assert done.returncode == 0 and "rotation: " in done.stdout, done.stderr
            server = stack.enter_context(serve(home, name))
            server.wait_until_ready(START_SECONDS)
            return server

        first, second = pool.map(begin, ("first", "second"))
        expected, other = pool.map(answers, (first, second))
        assert other == expected
        (path,) = (home / "rotations").iterdir()  # no temporary file either
        metadata = rotations.read_rotation(path).metadata
        assert metadata.model == NAME and path.stem == metadata.fingerprint

        before = files(home)
        taken = subprocess.run(
            serve(home, "third", first.port).command, capture_output=True, text=True, timeout=START_SECONDS
        )
        assert taken.returncode != 0 and "Address already in use" in taken.stderr
        assert answers(first, "another") == expected
        assert files(home) == before
