# SPDX-License-Identifier: Apache-2.0
"""What a release promises: the same bytes from the same sources, licences told, one version, pinned requirements."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

import pytest

import vllm_kvcompress

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
HEADER = "SPDX-License-Identifier: Apache-2.0"
CODE = {".py", ".sh", ".cu", ".cuh", ".cpp", ".h", ".yaml"}


def digests(source: Path, epoch: int | None) -> dict[str, str]:
    """Archive -> sha256, built in `source`."""
    environ = {**os.environ, "VLLM_KVCOMPRESS_BUILD_CUDA": "0"}
    environ.pop("SOURCE_DATE_EPOCH", None)
    if epoch is not None:
        environ["SOURCE_DATE_EPOCH"] = str(epoch)
    command = [sys.executable, "setup.py", "--quiet", "sdist", "bdist_wheel"]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, env=environ)
    assert done.returncode == 0, done.stderr
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (source / "dist").iterdir()}


@pytest.mark.parametrize("epoch", [1_700_000_000, None])
def test_archives_are_reproducible(epoch, source, tmp_path):
    """In another folder, from files of other times, which are in the archives without SOURCE_DATE_EPOCH."""
    other = shutil.copytree(source, tmp_path / "other" / "place")
    for path in other.rglob("*"):
        os.utime(path, (1_600_000_000, 1_600_000_000))
    first, second = digests(source, epoch), digests(other, epoch)
    version = vllm_kvcompress.__version__
    expected = [f"vllm_kvcompress-{version}-py3-none-any.whl", f"vllm_kvcompress-{version}.tar.gz"]
    assert sorted(first) == sorted(second) == expected
    assert [first[name] == second[name] for name in expected] == [epoch is not None] * 2


@pytest.mark.parametrize("project", [ROOT, ROOT / "docker" / "vllm-cpu-alias"], ids=lambda path: path.name)
def test_build_requirements_are_pinned(project):
    found = tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))
    assert found["build-system"]["requires"] and all("==" in line for line in found["build-system"]["requires"])


def test_changelog_begins_with_the_version():
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings[0] == vllm_kvcompress.__version__
    assert len(set(headings)) == len(headings)


def names(lines: list[str]) -> set[str]:
    return {re.match(r"[\w.-]+", line)[0].lower() for line in lines}


def test_licences_of_dependencies_are_listed():
    """All that pyproject.toml names, and no more; licences as the installed packages tell them."""
    text = (ROOT / "THIRD_PARTY.md").read_text(encoding="utf-8")
    rows = {name.lower(): licence for name, licence in re.findall(r"^\| `([^`]+)` \| ([^|]+) \|", text, re.MULTILINE)}
    extras = PROJECT["project"]["optional-dependencies"].values()
    declared = names(PROJECT["project"]["dependencies"]).union(*map(names, extras))
    declared |= names(PROJECT["build-system"]["requires"])
    assert rows.keys() == declared
    checked = 0
    for name, licence in rows.items():
        try:
            found = metadata(name)
        except PackageNotFoundError:
            continue
        if expression := found["License-Expression"]:
            assert licence == expression, name
            checked += 1
    assert checked


def test_code_carries_the_licence():
    found = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if found.returncode:
        pytest.skip("no git checkout")
    checked = [ROOT / name for name in found.stdout.split("\0") if name]
    checked = [path for path in checked if path.suffix in CODE or path.name.startswith("Dockerfile")]
    assert len(checked) > 100
    missing = [str(path) for path in checked if path.is_file() and HEADER not in path.read_text(encoding="utf-8")[:500]]
    assert not missing
