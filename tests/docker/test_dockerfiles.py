# SPDX-License-Identifier: Apache-2.0
"""Both Dockerfiles: linted, pinned, unprivileged, with a health check that tells well from ill."""

import os
import re
import runpy
import shutil
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILES = [ROOT / "docker" / "Dockerfile", ROOT / "docker" / "Dockerfile.cpu"]
helpers = runpy.run_path(str(Path(__file__).with_name("image.py")))
packaging = runpy.run_path(str(ROOT / "tests" / "packaging" / "cuda_wheel.py"))
both = pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)


def hadolint() -> str:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    found = shutil.which("hadolint", path=path)
    assert found, 'no hadolint: pip install -e ".[dev]"'
    return found


@both
def test_lint(dockerfile):
    done = subprocess.run([hadolint(), "--no-color", str(dockerfile)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_lint_finds_faults(tmp_path):
    (tmp_path / "Dockerfile").write_text("FROM python\nRUN cd /tmp && sudo true\n")
    done = subprocess.run([hadolint(), str(tmp_path / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 1 and "DL3006" in done.stdout


@both
def test_stages(dockerfile):
    found = helpers["instructions"](dockerfile)
    names = {value.rpartition(" AS ")[2] for name, value in found if name == "FROM" and " AS " in value}
    for name, value in found:
        if name == "FROM" and value not in names:
            assert re.fullmatch(r"[\w./-]+:v?\d[\w.-]*( AS \w+)?", value), f"{value}: no version"
    final = dict(helpers["last_stage"](found))
    assert final["USER"] == "10001" and final["ENTRYPOINT"] == '["vllm", "serve"]' and final["EXPOSE"] == "8000"
    assert "VLLM_KVCOMPRESS_CACHE=/rotations" in final["ENV"] and "HF_HOME=/models" in final["ENV"]


def test_the_served_version_is_one_of_ours():
    tags = {value.split()[0] for name, value in helpers["instructions"](DOCKERFILES[0]) if name == "FROM"}
    tags = {tag.rpartition(":v")[2] for tag in tags if tag.startswith("vllm/")}
    assert tags == {"0.33.0"}
    assert "vllm>=0.32,<0.34" in (ROOT / "pyproject.toml").read_text()


def test_no_build_tools_are_added_to_the_gpu_image():
    for name, value in helpers["last_stage"](helpers["instructions"](DOCKERFILES[0])):
        if name == "RUN":
            assert not re.search(r"apt-get|nvcc|g\+\+|setup\.py", value)
        assert name not in ("COPY", "ADD"), "the wheel is mounted, not copied"


def test_context():
    """The images are built from what the wheel is built from, and docker/."""
    names = helpers["context_names"]()
    assert set(names) == {*packaging["BUILD_FILES"], *packaging["SOURCE_FOLDERS"], "docker"}
    assert all((ROOT / name).exists() for name in names)


@both
@pytest.mark.parametrize("status", [200, 503, None])
def test_healthcheck(dockerfile, status):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(status)
            self.end_headers()

        def log_message(self, *arguments):
            pass

    asked: list[str] = []
    server = HTTPServer(("127.0.0.1", 0), Handler)
    command = helpers["healthcheck"](helpers["instructions"](dockerfile))
    assert command[0] == "python3"
    command = [sys.executable, *(word.replace(":8000", f":{server.server_port}") for word in command[1:])]
    if status is None:
        server.server_close()
    else:
        Thread(target=server.serve_forever, daemon=True).start()
    done = subprocess.run(command, capture_output=True, timeout=60)
    if status is not None:
        server.shutdown()
        server.server_close()
    assert done.returncode == (0 if status == 200 else 1)
    assert asked == ([] if status is None else ["/health"])
