# SPDX-License-Identifier: Apache-2.0
"""Several engines at once: real processes of the real engine module, on a vLLM that only keeps a journal."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing

import numpy as np
import pytest

from vllm_kvcompress.cli import main
from vllm_kvcompress.errors import KVCompressError
from vllm_kvcompress.evaluation.engine import Job, await_reference
from vllm_kvcompress.evaluation.launch import EngineFailure, Task, run_engines
from vllm_kvcompress.evaluation.prompts import Prompt

# What takes seconds to import and is not needed by a fake.
FAKE_MODULES = {
    "torch": """
        from types import SimpleNamespace
        __version__ = "0"
        cuda = SimpleNamespace(is_available=lambda: False)
    """,
    "transformers": '__version__ = "0"',
    "vllm": '''
        """FAKE_SCRIPT: {format: {prompt index: [what to do while it is fed]}}; FAKE_JOURNAL: what all engines did."""
        import atexit, json, os, time
        from pathlib import Path
        from types import SimpleNamespace
        import numpy as np
        from safetensors.numpy import load_file, save_file

        __version__ = "0"
        JOURNAL = Path(os.environ["FAKE_JOURNAL"])

        def SamplingParams(**settings):
            pass

        class LLM:
            def __init__(self, kv_cache_dtype, **arguments):
                self.name = kv_cache_dtype
                self.script = json.loads(os.environ["FAKE_SCRIPT"]).get(self.name, {})
                self.index = -1
                self.note(f"starts {os.getpid()}")
                atexit.register(self.note, "ends")
                model = SimpleNamespace(dtype="fake")
                cache = SimpleNamespace(num_gpu_blocks=1, block_size=1)
                config = SimpleNamespace(model_config=model, cache_config=cache)
                self.llm_engine = SimpleNamespace(vllm_config=config)

            def note(self, event):
                with JOURNAL.open("a") as journal:
                    journal.write(f"{self.name} {event}\\n")

            def collective_rpc(self, method, args):
                return [getattr(self, method)(*args)]

            def kvcompress_eval_begin(self, tokens, start, stop, reference, feed):
                self.index += 1
                self.note(f"begins {self.index}")
                values = np.array(tokens[start:stop], dtype=np.float32)
                self.results = {"logprob": -values, "top1": values.astype(np.int64)}
                if reference is None:
                    self.results["hidden"] = values
                else:
                    self.results |= {"kl": load_file(reference)["hidden"] / 7, "agree": values > 5}

            def generate(self, *args, **settings):
                for action, *what in self.script.get(str(self.index), []):
                    if action == "wait":
                        deadline = time.monotonic() + 120
                        while not any(line.startswith(what[0]) for line in JOURNAL.read_text().splitlines()):
                            assert time.monotonic() < deadline, f"never came: {what[0]}"
                            time.sleep(0.02)
                    elif action == "fail":
                        raise RuntimeError(what[0])
                    elif action == "sleep":
                        time.sleep(what[0])
                    elif action == "signal":
                        os.kill(os.getpid(), what[0])

            def kvcompress_eval_end(self, result_file):
                partial = result_file + ".fake"
                save_file(self.results, partial)
                self.note(f"done {self.index}")
                os.replace(partial, result_file)
                return 1
    ''',
}

NEVER = ["wait", "never"]


class Fake:
    """The fake vLLM's journal, and what it is to do."""

    def __init__(self, folder, monkeypatch):
        self.folder = folder
        self.journal = folder / "journal"
        self.journal.touch()
        self.monkeypatch = monkeypatch
        modules = folder / "modules"
        modules.mkdir()
        for name, source in FAKE_MODULES.items():
            indent = 8 if source.startswith("\n") else 0
            (modules / f"{name}.py").write_text("\n".join(line[indent:] for line in source.splitlines()))
        monkeypatch.setenv("PYTHONPATH", str(modules))
        monkeypatch.setenv("FAKE_JOURNAL", str(self.journal))
        self.script({})

    def script(self, script):
        self.journal.write_text("")
        self.monkeypatch.setenv("FAKE_SCRIPT", json.dumps(script))

    def lines(self):
        return self.journal.read_text().splitlines()

    def wait(self, *lines):
        deadline = time.monotonic() + 120
        while not all(any(known.startswith(line) for known in self.lines()) for line in lines):
            assert time.monotonic() < deadline, lines
            time.sleep(0.02)

    def pids(self):
        return [int(line.split()[2]) for line in self.lines() if line.split()[1] == "starts"]

    def tasks(self, folder, names):
        return [
            Task(
                Job(
                    folder=self.folder / folder / str(number),
                    reference_folder=self.folder / folder / "0" if number else None,
                    feed=1,
                    engine_args={"kv_cache_dtype": name},
                ),
                name,
                self.folder / folder / f"{name}.log",
            )
            for number, name in enumerate(names)
        ]


@pytest.fixture
def fake(tmp_path, monkeypatch):
    fake = Fake(tmp_path, monkeypatch)
    yield fake
    for pid in fake.pids():
        # Every engine has ended, and was waited for.
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


PROMPTS = [Prompt(list(range(index, index + 12)), 2, 10) for index in range(3)]


def test_together_and_one_after_the_other(fake):
    # Together, the reference ends only when another engine has used its first result; `b` is done before `a`.
    fake.script({"auto": {"1": [["wait", "a done 0"], ["sleep", 2]]}, "a": {"2": [["wait", "b done 2"]]}})
    together = list(run_engines(fake.tasks("together", ["auto", "a", "b"]), PROMPTS, at_once=3))
    lines = fake.lines()
    for name in ("a", "b"):
        for index in range(len(PROMPTS)):
            assert lines.index(f"auto done {index}") < lines.index(f"{name} begins {index}")
    fake.script({})
    in_turn = list(run_engines(fake.tasks("in turn", ["auto", "a", "b"]), PROMPTS, at_once=1))
    assert [line.split()[0] for line in fake.lines()] == ["auto"] * 8 + ["a"] * 8 + ["b"] * 8
    for one, other in zip(together, in_turn, strict=True):
        for column in ("logprob", "top1", "kl", "agree"):
            assert (getattr(one, column) is None) == (getattr(other, column) is None)
            np.testing.assert_equal(getattr(one, column), getattr(other, column))
    assert together[0].kl is None
    np.testing.assert_equal(together[1].kl[2], np.arange(4, 12, dtype=np.float32) / 7)
    # Waiting for the reference is no time of feeding.
    assert together[2].summary.feed_seconds < 2 < together[0].summary.feed_seconds


def test_no_more_than_asked_for(fake):
    results = list(run_engines(fake.tasks("run", ["auto", "a", "b", "c"]), PROMPTS, at_once=2))
    assert not any(isinstance(result, EngineFailure) for result in results)
    running = most = 0
    for line in fake.lines():
        running += {"starts": 1, "ends": -1}.get(line.split()[1], 0)
        most = max(most, running)
    assert running == 0
    assert most <= 2


@pytest.mark.parametrize("at_once", [1, 3])
def test_a_failed_engine_costs_only_its_result(fake, at_once):
    fake.script({"a": {"1": [["fail", "no luck"]]}})
    auto, a, b = run_engines(fake.tasks("run", ["auto", "a", "b"]), PROMPTS, at_once=at_once)
    assert isinstance(a, EngineFailure)
    assert "RuntimeError: no luck (log: " in str(a)
    assert len(auto.logprob) == len(b.kl) == len(PROMPTS)


def test_a_failed_reference_starts_nothing_more(fake):
    fake.script({"auto": {"0": [["fail", "no luck"]]}})
    results = list(run_engines(fake.tasks("run", ["auto", "a", "b"]), PROMPTS, at_once=1))
    assert "no luck" in str(results[0])
    assert all("stopped" in str(result) for result in results[1:])
    assert len(fake.pids()) == 1


def test_interrupt(fake):
    """Only this process is signalled, as by `kill -INT`: a terminal would signal the engines, too."""
    fake.script({"auto": {"0": [NEVER]}})
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupt():
        fake.wait("auto begins 0", "a starts")
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    try:
        thread.start()
        with (
            closing(run_engines(fake.tasks("run", ["auto", "a", "b"]), PROMPTS, at_once=2)) as results,
            pytest.raises(KeyboardInterrupt),
        ):
            next(results)
    finally:
        thread.join()
        signal.signal(signal.SIGINT, before)
    assert len(fake.pids()) == 2


def test_an_exception_between_results(fake):
    fake.script({"a": {"0": [NEVER]}})
    with (
        pytest.raises(ZeroDivisionError),
        closing(run_engines(fake.tasks("run", ["auto", "a"]), PROMPTS, at_once=2)) as results,
    ):
        next(results)
        fake.wait("a begins 0")
        raise ZeroDivisionError
    assert len(fake.pids()) == 2


def test_what_is_not_an_engines_failure_does_not_wait_its_turn(fake):
    fake.script({"auto": {"0": [NEVER]}})
    tasks = fake.tasks("run", ["auto", "a"])
    tasks[1] = Task(tasks[1].job, "a", fake.journal / "a.log")  # a file where a folder should be
    with pytest.raises(FileExistsError):
        list(run_engines(tasks, PROMPTS, at_once=2))


def evaluate(folder, model, *arguments):
    data = folder / "text.txt"
    data.write_text("w1 w2 w3 w4 w5 w6 w7 w8 w9\n" * 300)
    base = ["eval", str(model), "--data", str(data), "--sinks", "16", "--recent", "64", "--context", "256"]
    return main([*base, "--chunks", "2", "--recall-depths", "0", "--out", str(folder / "out"), *arguments])


@pytest.mark.parametrize(
    ("end", "reason"),
    [(["fail", "no luck"], "RuntimeError: no luck"), (["signal", signal.SIGKILL], "the engine ended with status -9")],
)
def test_the_command_ends_with_its_reference(fake, tmp_path, tiny_model, capsys, end, reason):
    # One engine waits for the second result of the reference, the other is busy with the first.
    others = {"hadamard-int2": {"0": [NEVER]}}
    fake.script({"auto": {"1": [["wait", "int2 done 0"], ["wait", "hadamard-int2 begins 0"], end]}, **others})
    assert evaluate(tmp_path, tiny_model, "--formats", "int2,hadamard-int2", "--jobs", "3") == 2
    assert f"kvcompress eval: the reference engine (auto) failed: {reason}" in capsys.readouterr().err
    assert len(fake.pids()) == 3
    assert not (tmp_path / "out" / "eval.json").exists()


def test_the_command_keeps_the_order_given(fake, tmp_path, tiny_model, capsys):
    script = {"int2": {"0": [["fail", "no luck"]]}, "hadamard-int2": {"1": [["wait", "oscar-int2 ends"]]}}
    fake.script(script)
    arguments = ["--formats", "hadamard-int2,int2,oscar-int2", "--jobs", "4"]
    assert evaluate(tmp_path, tiny_model, *arguments) == 1
    rows = json.loads((tmp_path / "out" / "eval.json").read_text())["formats"]
    assert [row["format"] for row in rows] == ["auto", "hadamard-int2", "int2", "oscar-int2"]
    assert ["no luck" in (row["error"] or "") for row in rows] == [False, False, True, False]
    printed = capsys.readouterr()
    assert "int2: failed: RuntimeError: no luck" in printed.out
    assert printed.err.count("510/510") >= 3  # the last line of each bar: 2 chunks of 255 tokens fed


def waiting_job(tmp_path, parent):
    (tmp_path / "0").mkdir(exist_ok=True)
    return Job(folder=tmp_path / "1", reference_folder=tmp_path / "0", feed=1, engine_args={}, parent=parent)


def test_waiting_for_the_reference(tmp_path):
    job = waiting_job(tmp_path, os.getppid())
    result = tmp_path / "0" / "prompt1.safetensors"
    appears = threading.Timer(0.3, result.touch)
    appears.start()
    used = time.process_time()
    assert await_reference(job, 1) == str(result)
    assert time.process_time() - used < 0.2  # it sleeps
    appears.join()
    assert await_reference(job.model_copy(update={"reference_folder": None}), 1) is None
    (tmp_path / "0" / "error.txt").write_text("no luck\n")
    # What the reference did before it failed is there to use.
    assert await_reference(job, 1) == str(result)
    with pytest.raises(KVCompressError, match="the reference engine failed: no luck"):
        await_reference(job, 2)


def test_a_waiting_engine_ends_after_its_parent(fake, tmp_path):
    code = """
import subprocess, sys
from pathlib import Path
from vllm_kvcompress.evaluation.engine import Job

folder = Path(sys.argv[1])
args = {"kv_cache_dtype": "a"}
file = folder / "job.json"
file.write_text(Job(folder=folder, reference_folder=folder / "0", feed=1, engine_args=args).model_dump_json())
subprocess.Popen([sys.executable, "-m", "vllm_kvcompress.evaluation.engine", str(file)])
"""
    (tmp_path / "prompts.json").write_text('[{"tokens": [1, 2, 3], "start": 0, "stop": 2}]')
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=120)
    fake.wait("a ends")
    assert "that started this engine" in (tmp_path / "error.txt").read_text()
    fake.script({})  # Whoever adopted the engine may never wait for it: its process id is not ours to check.
