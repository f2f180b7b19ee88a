# SPDX-License-Identifier: Apache-2.0
"""When setup.py compiles csrc/, what it says when it does not, and what the archives hold."""

import os
import subprocess
import sys
import tarfile
import zipfile

import pytest

SWITCH = "VLLM_KVCOMPRESS_BUILD_CUDA"


def run_setup(source, *arguments, **environ):
    """setup.py of a copy; a variable given as None is unset."""
    merged = {**os.environ, SWITCH: None, **environ}
    merged = {name: str(value) for name, value in merged.items() if value is not None}
    command = [sys.executable, "setup.py", "--quiet", *arguments]
    return subprocess.run(command, cwd=source, capture_output=True, text=True, env=merged)


@pytest.fixture
def fake_cuda(tmp_path):
    """A CUDA_HOME whose nvcc tells its version and nothing else."""

    def make(release: str):
        (tmp_path / "cuda" / "bin").mkdir(parents=True)
        nvcc = tmp_path / "cuda" / "bin" / "nvcc"
        nvcc.write_text(f"#!/bin/sh\n[ $1 = --version ] && echo 'Cuda compilation tools, release {release}, V0'\n")
        nvcc.chmod(0o755)
        return tmp_path / "cuda"

    return make


@pytest.fixture
def fake_torch(tmp_path):
    """A folder for PYTHONPATH with a torch of which setup.py sees version and headers."""

    def make(version: str, cuda: str | None, headers: bool = True):
        folder = tmp_path / "site" / "torch"
        (folder / "include" / "torch" / "csrc" / "stable").mkdir(parents=True)
        if headers:
            (folder / "include" / "torch" / "csrc" / "stable" / "library.h").touch()
        (folder / "version.py").write_text(f"__version__ = {version!r}\ncuda: Optional[str] = {cuda!r}\n")
        return folder.parent

    return make


def wheel_facts(path):
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        (record,) = (name for name in names if name.endswith(".dist-info/WHEEL"))
        lines = archive.read(record).decode().splitlines()
    return [name for name in names if name.endswith(".so")], [
        line for line in lines if line.startswith(("Root", "Tag"))
    ]


def test_wheel_without_the_extension_serves_every_platform(pure_wheel):
    assert pure_wheel.name.endswith("-py3-none-any.whl")
    assert wheel_facts(pure_wheel) == ([], ["Root-Is-Purelib: true", "Tag: py3-none-any"])


def test_wheel_with_the_extension_serves_every_python(cuda_wheel):
    platform = f"linux_{os.uname().machine}"
    assert cuda_wheel.name.endswith(f"-py3-none-{platform}.whl")
    expected = (["vllm_kvcompress/_C.so"], ["Root-Is-Purelib: false", f"Tag: py3-none-{platform}"])
    assert wheel_facts(cuda_wheel) == expected


def test_source_archive_holds_what_the_extension_is_built_from(source):
    (source / "vllm_kvcompress" / "_C.so").touch()  # an editable install leaves one
    done = run_setup(source, "sdist", **{SWITCH: "1"}, CUDA_HOME="/nonexistent")
    assert done.returncode == 0, done.stderr
    (archive,) = (source / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    sources = {f"csrc/{path.name}" for path in (source / "csrc").iterdir()}
    assert sources and sources | {"setup.py", "pyproject.toml"} <= names
    assert not any(name.endswith(".so") for name in names)


def test_a_binary_in_the_tree_stays_out_of_a_pure_wheel(source):
    (source / "vllm_kvcompress" / "_C.so").touch()
    done = run_setup(source, "bdist_wheel", **{SWITCH: "0"})
    assert done.returncode == 0, done.stderr
    (path,) = (source / "dist").glob("*.whl")
    assert wheel_facts(path) == ([], ["Root-Is-Purelib: true", "Tag: py3-none-any"])


REASONS = {
    "switched off": ({SWITCH: "0"}, "13.0", ("2.13.0", "13.0"), f"{SWITCH}=0"),
    "no nvcc": ({"CUDA_HOME": "/nonexistent"}, None, ("2.13.0", "13.0"), "no working nvcc in CUDA_HOME=/nonexistent"),
    "old nvcc": ({}, "12.0", ("2.13.0", "13.0"), "nvcc >= 12.4 is needed"),
    "old torch": ({}, "13.0", ("2.10.2", "13.0"), "torch >= 2.11 is needed"),
    "torch for the CPU": ({}, "13.0", ("2.13.0+cpu", None), "torch 2.13.0+cpu is built without CUDA"),
    "torch without headers": ({}, "13.0", ("2.13.0", "13.0", False), "has no headers"),
    "no C++ compiler": ({"NVCC_CCBIN": "nonexistent"}, "13.0", ("2.13.0", "13.0"), "no C++ compiler"),
}


@pytest.mark.parametrize("case", REASONS)
def test_what_is_missing_is_said_in_one_line(case, source, fake_cuda, fake_torch):
    environ, nvcc, torch, reason = REASONS[case]
    environ = {"PYTHONPATH": fake_torch(*torch), **({"CUDA_HOME": fake_cuda(nvcc)} if nvcc else {}), **environ}
    done = run_setup(source, "bdist_wheel", **environ)
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stderr.splitlines() if "CUDA" in line)
    assert reason in line and f"{SWITCH}=1" in line
    (path,) = (source / "dist").iterdir()
    assert path.name.endswith("-py3-none-any.whl")

    if case not in ("switched off", "torch for the CPU"):  # the former is no demand; the latter compiles
        done = run_setup(source, "bdist_wheel", **{**environ, SWITCH: "1"})
        assert done.returncode != 0 and reason in done.stderr


def test_a_compiler_that_fails_stops_the_install(source, fake_cuda, fake_torch):
    """Everything is there: installing without the kernel would hide it."""
    done = run_setup(source, "bdist_wheel", PYTHONPATH=fake_torch("2.11.0", "13.0"), CUDA_HOME=fake_cuda("12.4"))
    assert done.returncode != 0
    assert f"nvcc failed, see above; {SWITCH}=0 installs without" in done.stderr


def test_an_unknown_switch_is_refused(source):
    done = run_setup(source, "bdist_wheel", **{SWITCH: "yes"})
    assert done.returncode != 0 and f"{SWITCH} must be 0, 1 or auto, got 'yes'" in done.stderr
