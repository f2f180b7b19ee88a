# SPDX-License-Identifier: Apache-2.0
"""What an image build and its container do, as far as a folder and a virtual environment can do it.

Test files get it by `runpy.run_path`: test folders are no packages.
"""

import fnmatch
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from dockerfile_parse import DockerfileParser

ROOT = Path(__file__).resolve().parents[2]
OF_THE_SYSTEM = ("apt-get ", "useradd ")
"""RUN instructions that begin so change the machine's packages and users: they are not run."""


def instructions(dockerfile: Path) -> list[tuple[str, str]]:
    """(instruction, value), comments left out."""
    parsed = DockerfileParser(fileobj=io.BytesIO(dockerfile.read_bytes())).structure
    return [(line["instruction"], line["value"]) for line in parsed if line["instruction"] != "COMMENT"]


def last_stage(found: list[tuple[str, str]]) -> list[tuple[str, str]]:
    start = max(index for index, (name, _) in enumerate(found) if name == "FROM")
    return found[start:]


def healthcheck(found: list[tuple[str, str]]) -> list[str]:
    (value,) = (value for name, value in found if name == "HEALTHCHECK")
    return json.loads(value.partition("CMD")[2])


def context_names() -> list[str]:
    """What .dockerignore, which excludes everything first, lets into the build at the top level."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert lines[0] == "*"
    return [line[1:] for line in lines if line.startswith("!")]


def ignored(folder: str, names: list[str]) -> set[str]:
    """For `shutil.copytree`: the patterns of .dockerignore that hold at every depth."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    patterns = [line[3:] for line in lines if line.startswith("**/")]
    return {name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)}


class Image:
    """A Dockerfile carried out below a folder that stands for the image's root.

    Args:
        root: absolute paths of ENV, WORKDIR and COPY lie below it; commands have none but in variables.
        arguments: of the build, as of --build-arg; one that is None is unset.
    """

    def __init__(self, dockerfile: Path, root: Path, arguments: dict[str, str | None]) -> None:
        self.root, self.arguments = root, arguments
        self.entrypoint: list[str] = []
        self.skipped: list[str] = []
        self.instructions = instructions(dockerfile)
        (root / "base").mkdir(parents=True)
        python = root / "base" / "python"
        python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys._base_executable)} "$@"\n')
        python.chmod(0o755)
        bare = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        self.base = {**bare, "PATH": f"{root / 'base'}:/usr/local/bin:/usr/bin:/bin"}

    def build(self) -> None:
        for name, value in self.instructions:
            getattr(self, f"_{name.lower()}", lambda value: None)(value)

    def path(self, path: str) -> Path:
        return Path(f"{self.root}{path}") if path.startswith("/") else self.cwd / path

    def _from(self, value: str) -> None:
        self.cwd, self.environ, self.build_environ = self.root, dict(self.base), {}

    def _arg(self, value: str) -> None:
        name, _, default = value.partition("=")
        given = self.arguments.get(name, default)
        if given is not None:
            self.build_environ[name] = given

    def _env(self, value: str) -> None:
        for word in shlex.split(value):
            name, _, text = word.partition("=")
            text = re.sub(r"(^|:)/", rf"\g<1>{self.root}/", text)
            self.environ[name] = re.sub(r"\$(\w+)", lambda found: self.environ[found[1]], text)

    def _workdir(self, value: str) -> None:
        self.cwd = self.path(value)
        self.cwd.mkdir(parents=True, exist_ok=True)

    def _copy(self, value: str) -> None:
        if value.startswith("--from="):
            _, source, target = value.split()
            assert self.path(source) == self.path(target) and self.path(source).exists()
            return
        assert value == ". ."
        for name in context_names():
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, self.cwd / name, ignore=ignored)
            else:
                shutil.copy(ROOT / name, self.cwd / name)

    def _run(self, value: str) -> None:
        if value.startswith(OF_THE_SYSTEM):
            self.skipped.append(value)
            return
        done = self.start(["sh", "-c", value], self.build_environ)
        assert done.returncode == 0, f"{value}\n{done.stdout}\n{done.stderr}"

    def _entrypoint(self, value: str) -> None:
        self.entrypoint = json.loads(value)

    def start(self, command: list[str], environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
        environ = {**self.environ, **environ}
        return subprocess.run(command, cwd=self.cwd, env=environ, capture_output=True, text=True)
