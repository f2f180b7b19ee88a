# SPDX-License-Identifier: Apache-2.0
"""What all tests share: Triton's interpreter where there is no GPU, and the demo model.

The model is downloaded, converted and calibrated once a machine: tests of quality need real weights.
"""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if torch.cuda.device_count() == 0:
    # Read while triton is imported, which vLLM does too: it must be set before any test module is.
    os.environ["TRITON_INTERPRET"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.device_count() == 0:
    # A thread each for the processes that share the processors: threads that wait for each other at every operation,
    # and are not all running, take many times as long. vLLM counts processors itself unless told not to.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder with its rotation file beside it."""
    from vllm_kvcompress import rotations
    from vllm_kvcompress.demo.model import fetch_demo_model

    cache = Path(os.environ.get("KVCOMPRESS_TEST_CACHE", Path.home() / ".cache" / "vllm-kvcompress-tests"))
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder = fetch_demo_model(cache / "smollm2-135m")
        rotation = folder / rotations.ROTATION_BESIDE_MODEL
        # One calibration serves a version of the code: its file is named by what made it.
        if not is_current(rotation):
            subprocess.run([sys.executable, "-m", "vllm_kvcompress", "calibrate", str(folder)], check=True)
    return folder


def is_current(rotation: Path) -> bool:
    """Whether the rotation file was made by this very source of calibration and quantiser."""
    import hashlib

    root = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for path in sorted([*root.glob("calibration/*.py"), *root.glob("vllm_kvcompress/quantizers/*.py")]):
        digest.update(path.read_bytes())
    mark = rotation.with_suffix(".source")
    current = rotation.is_file() and mark.is_file() and mark.read_text() == digest.hexdigest()
    if not current:
        mark.parent.mkdir(parents=True, exist_ok=True)
        rotation.unlink(missing_ok=True)
        mark.write_text(digest.hexdigest())
    return current
