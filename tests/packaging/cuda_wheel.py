# SPDX-License-Identifier: Apache-2.0
"""A wheel with the CUDA extension, compiled once per state of its sources, for tests of packaging and of the ops.

A test file gets it by `runpy.run_path`: test folders are no packages.
"""

import fcntl
import hashlib
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
BUILD_FILES = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")
SOURCE_FOLDERS = ("vllm_kvcompress", "calibration", "triton_kernels", "csrc")


def copy_source(target: Path) -> Path:
    """A copy to build from, so that no build folder is left in the source tree; no binaries."""
    target.mkdir()
    for name in BUILD_FILES:
        shutil.copy(ROOT / name, target / name)
    for name in SOURCE_FOLDERS:
        shutil.copytree(ROOT / name, target / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    return target


def build_wheel(source: Path, folder: Path, switch: str) -> Path:
    """The wheel as pip builds it, isolated, with VLLM_KVCOMPRESS_BUILD_CUDA as given."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(source)]
    environ = {**os.environ, "VLLM_KVCOMPRESS_BUILD_CUDA": switch}
    done = subprocess.run(command, capture_output=True, text=True, env=environ)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    return path


def cuda_wheel() -> Path:
    """From the cache, else built. Skips the calling test, with the reason, where it cannot be compiled."""
    setup = runpy.run_path(str(ROOT / "setup.py"))
    try:
        nvcc = setup["find_nvcc"]()
        setup["find_torch"](any_build=True)
    except setup["Unavailable"] as reason:
        pytest.skip(f"the CUDA extension cannot be compiled here: {reason}")
    digest = hashlib.sha256(subprocess.run([nvcc, "--version"], capture_output=True, check=True).stdout)
    digest.update(torch.__version__.encode())
    # The names of the modules: what a wheel must hold changes with them.
    for folder in ("vllm_kvcompress", "triton_kernels", "calibration"):
        digest.update(repr(sorted(str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*.py"))).encode())
    for path in (ROOT / "setup.py", ROOT / "pyproject.toml", *sorted((ROOT / "csrc").iterdir())):
        digest.update(path.name.encode() + path.read_bytes())
    cache = Path(os.environ.get("KVCOMPRESS_TEST_CACHE", Path.home() / ".cache" / "vllm-kvcompress-tests"))
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / f"cuda-{digest.hexdigest()[:16]}"
    with (cache / "cuda.lock").open("w") as lock, tempfile.TemporaryDirectory(dir=cache) as temporary:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            built = Path(temporary, "built")
            built.mkdir()
            build_wheel(copy_source(Path(temporary, "source")), built, "1")
            built.rename(folder)
    (path,) = folder.glob("*.whl")
    return path
