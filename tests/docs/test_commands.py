# SPDX-License-Identifier: Apache-2.0
"""Commands of README.md and of the pages in docs/: what a block is marked with decides what happens to it.

`<!-- run -->`: run, in the page's order, in a folder with a small random model, where every word stands as in the page.
`<!-- needs a GPU -->`, `<!-- needs a container engine -->`, or no mark (what starts an engine, or installs): given to
the parser that reads it, or its files looked for.
"""

import argparse
import ast
import importlib
import itertools
import json
import os
import re
import runpy
import shlex
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from vllm_kvcompress import cli
from vllm_kvcompress.config import load_settings
from vllm_kvcompress.evaluation.specs import parse_formats

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGES = {"bash", "python", "json", "text"}
_FENCE = re.compile(r"(?:<!-- ([^>]*) -->\n)?^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
MARKS = {"", "run", "needs a GPU", "needs a container engine"}
_INLINE = re.compile(r"`((?:kvcompress|vllm serve|make) [^`…\[]*)`")


class Block(NamedTuple):
    mark: str
    language: str
    text: str


class Command(NamedTuple):
    environ: dict[str, str]
    words: list[str]


def blocks(page: Path) -> list[Block]:
    return [Block(mark or "", *rest) for mark, *rest in _FENCE.findall(page.read_text(encoding="utf-8"))]


def commands(text: str) -> list[Command]:
    """A command a line, joined where a line ends with a backslash."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        environ = {}
        while words and re.match(r"[A-Z_]+=", words[0]):
            name, _, value = words.pop(0).partition("=")
            environ[name] = value
        if words:
            found.append(Command(environ, words))
    return found


def named(*parts: str):
    """Pages with a block of which all of the parts are."""
    pages = [page for page in PAGES if any(set(parts) <= set(block[:2]) for block in blocks(page))]
    return pytest.mark.parametrize("page", pages, ids=lambda page: page.stem)


@pytest.fixture(scope="module")
def serve_parser() -> argparse.ArgumentParser:
    """Of `vllm serve`, our formats included."""
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.plugins import load_general_plugins
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    load_general_plugins()
    parser = FlexibleArgumentParser()
    ServeSubcommand().subparser_init(parser.add_subparsers(dest="subparser"))
    return parser


@pytest.fixture
def check(serve_parser, monkeypatch):
    """Gives a command to the parser that reads it; fails for one that no parser here reads."""
    parsed = []
    for name in cli._COMMANDS.values():
        monkeypatch.setattr(importlib.import_module(name), "run", parsed.append)

    def check(command: Command) -> None:
        program, *arguments = command.words
        if program == "kvcompress":
            assert cli.main(arguments) == 0
            given = parsed.pop()
            if given.command == "eval":
                assert parse_formats(given.formats, common={}, additional_config=given.additional_config)
        elif program == "vllm":
            load_settings(serve_parser.parse_args(arguments).additional_config, command.environ)
        elif program == "make":
            makefile = (ROOT / "Makefile").read_text()
            targets = [word for word in arguments if "=" not in word]
            variables = [word.partition("=")[0] for word in arguments if "=" in word]
            assert targets
            for target in targets:
                assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), f"no target {target}"
            for variable in variables:
                assert re.search(rf"^{re.escape(variable)} \?=", makefile, re.MULTILINE), f"no variable {variable}"
        elif program == "docker/install.sh":
            assert os.access(ROOT / program, os.X_OK) and set(arguments) <= {"cpu", "cuda"}
            assert all(f"${{{name}:-" in (ROOT / program).read_text() for name in command.environ)
        elif program in ("docker", "kubectl"):
            if arguments[0] == "run":
                image = next(i for i, word in enumerate(arguments) if word.startswith("vllm-kvcompress:"))
                options, inside = arguments[:image], arguments[image + 1 :]
                check(Command({}, [*(["kvcompress"] if "kvcompress" in options else ["vllm", "serve"]), *inside]))
            files = [path for flag, path in itertools.pairwise(arguments) if flag == "-f"]
            assert all((ROOT / path).is_file() for path in files) and (files or arguments[0] == "run")
        else:
            pytest.fail(f"no parser here reads {shlex.join(command.words)!r}: mark its block, or add one")

    return check


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_blocks(page):
    """None is missed, and each has a language and a mark that the tests below know."""
    text = page.read_text(encoding="utf-8")
    found = blocks(page)
    assert len(re.findall(r"^\s*(?:```|~~~)", text, re.MULTILINE)) == 2 * len(found)
    for block in found:
        assert block.language in LANGUAGES
        assert block.mark in MARKS
        assert not block.mark or block.language in ("bash", "python")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_are_read(page, check):
    """Those in the text too, unless they have left something out."""
    for block in blocks(page):
        if block.language == "bash":
            found = commands(block.text)
            assert found
            for command in found:
                check(command)
    for text in _INLINE.findall(_FENCE.sub("", page.read_text(encoding="utf-8"))):
        words = shlex.split(text)
        if words[0] != "kvcompress" or len(words) > 2:  # else a command's name
            check(Command({}, words))
        else:
            assert words[1] in cli._COMMANDS


@pytest.mark.parametrize(
    "line",
    [
        "kvcompress calibrate MODEL --token 5x",
        "kvcompress calibrate",
        "kvcompress eval MODEL --data FILE.txt --formats oscar-int3",
        "vllm serve MODEL --kv-cache-dtype oscar-int3",
        """vllm serve MODEL --additional-config '{"kvcompress": {"sinks": 1}}'""",
        "VLLM_KVCOMPRESS_EPISODIC='{}' vllm serve MODEL",
        "make tests",
        "docker compose -f docker/compose.yml up",
        "docker run vllm-kvcompress:cuda MODEL --kv-cache-dtype oscar-int3",
        "curl http://localhost:8000",
    ],
)
def test_wrong_commands_are_found(line, check):
    (command,) = commands(line)
    with pytest.raises((SystemExit, ValueError, AssertionError, pytest.fail.Exception)):
        check(command)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What the pages name: MODEL, FILE.txt, K.pt and V.pt."""
    base = tmp_path_factory.mktemp("docs")
    tiny = runpy.run_path(str(ROOT / "tests/calibration/conftest.py"))
    config = tiny["CONFIGS"]["llama"]
    tiny["build"](base / "MODEL", config)
    (base / "FILE.txt").write_text((ROOT / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    for name in ("K.pt", "V.pt"):
        shape = config.num_key_value_heads, config.head_dim, config.head_dim
        layers = {
            i: {"layer_id": i, "rotation": torch.linalg.qr(torch.randn(shape))[0]}
            for i in range(config.num_hidden_layers)
        }
        torch.save({"format_version": 2, "layers": layers}, base / name)
    return base


@named("run", "bash")
def test_commands_run(page, folder, tmp_path, monkeypatch):
    copy = shutil.copytree(folder, tmp_path / "page")
    monkeypatch.chdir(copy)
    monkeypatch.setenv("VLLM_KVCOMPRESS_CACHE", str(tmp_path / "cache"))
    for block in blocks(page):
        if (block.mark, block.language) == ("run", "bash"):
            for command in commands(block.text):
                program, *arguments = command.words
                assert program == "kvcompress" and not command.environ
                assert cli.main(arguments) == 0, shlex.join(command.words)


@named("run", "python")
def test_python_runs(page):
    for block in blocks(page):
        if (block.mark, block.language) == ("run", "python"):
            exec(compile(block.text, page.name, "exec"), {"__name__": "page"})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_other_blocks_are_read(page):
    for block in blocks(page):
        if block.language == "json":
            json.loads(block.text)
        elif block.language == "python":
            for node in ast.walk(ast.parse(block.text)):
                if isinstance(node, ast.ImportFrom):
                    module = importlib.import_module(node.module)
                    assert all(hasattr(module, alias.name) for alias in node.names)
