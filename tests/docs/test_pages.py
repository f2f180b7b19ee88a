# SPDX-License-Identifier: Apache-2.0
"""Pages of docs/: the site is built without warnings, links lead somewhere, and pages say what the code says.

README.md repeats a little of them.
"""

import ast
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from vllm_kvcompress import recipes
from vllm_kvcompress.episodic import request
from vllm_kvcompress.episodic.settings import Policy
from vllm_kvcompress.formats import format_names, get_format
from vllm_kvcompress.formats.base import PAGE_TOKENS

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))


def build(root: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    return subprocess.run(command, cwd=root, capture_output=True, text=True)


def test_site(tmp_path):
    done = build(ROOT, tmp_path)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    for page in PAGES:
        html = (tmp_path / page.with_suffix(".html").name).read_text(encoding="utf-8")
        for target in re.findall(r'(?:src|href)="(?!https?:|#|mailto:)([^"#]+)', html):
            assert (tmp_path / target).exists(), f"{page.name} -> {target}"
    assert not list(tmp_path.rglob("*.py"))


@pytest.mark.parametrize("fault", ["[a](nowhere.md)", "[a](formats.md#nowhere)", "[a](../README.md)", "![a](a.png)"])
def test_faults_fail_the_build(fault, tmp_path):
    for name in ("mkdocs.yml", "docs", "csrc/README.md", "benchmarks/results"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        copy(ROOT / name, tmp_path / name)
    with (tmp_path / "docs/index.md").open("a", encoding="utf-8") as page:
        page.write(f"\n{fault}\n")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode != 0 and "WARNING" in done.stderr


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda page: page.stem)
def test_links_in_the_repository(page):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)", page.read_text(encoding="utf-8")):
        other = page.parent / target if target else page
        assert other.exists(), target
        assert not anchor or anchor in anchors(other), f"{target}#{anchor}"


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_settings_reference_is_current():
    reference = runpy.run_path(str(DOCS / "settings_reference.py"))
    page = (DOCS / "settings.md").read_text(encoding="utf-8")
    assert reference["updated"](page) == page, "run: python docs/settings_reference.py"


def rows(page: str, heading: str) -> dict[str, list[str]]:
    """Of the first table below a heading: name in its first column -> the other cells."""
    text = "\n" + (DOCS / page).read_text(encoding="utf-8")
    text = text.split(f"\n{heading}\n")[1]
    table = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    return {first.strip("`"): rest for first, *rest in cells}


def test_formats():
    found = rows("formats.md", "# Formats")
    assert found.keys() == set(format_names())
    for name, (rotation, centring, calibration, sizes, ratio) in found.items():
        page_format = get_format(name)
        per_token = [page_format.layout(dim, PAGE_TOKENS).bytes_per_token for dim in (64, 96, 128, 256)]
        assert sizes == " / ".join(map(str, per_token))
        assert ratio.split("x")[0] == f"{512 / per_token[2]:.1f}"
        assert rotation.lower() == page_format.rotation
        assert centring == {"page": "mean per page", "static": "calibrated mean", "none": "none"}[page_format.centring]
        optional = "optional" if page_format.splits_channels else "no"
        assert calibration == ("yes" if page_format.needs_calibration else optional)


def test_formats_of_the_readme():
    pages = rows("formats.md", "# Formats")
    measured = rows("accuracy.md", "### SmolLM2-135M-Instruct")
    for name, (calibration, size, ratio, kl) in rows("../README.md", "## Formats").items():
        _, _, expected, sizes, times = pages[name]
        assert [calibration, size, ratio] == [expected, sizes.split(" / ")[2], times]
        assert kl == (measured[name][3].split()[0] if name in measured else "")


def test_speeds_of_the_readme():
    pages = rows("performance.md", "## Decode attention")
    for name, cells in rows("../README.md", "## Performance").items():
        assert cells == pages[name][: len(cells)]


def test_figures_of_the_readme():
    """None stands there alone."""
    pages = " ".join(page.read_text(encoding="utf-8") for page in PAGES)
    text = re.sub(r"arXiv \S+", "", (ROOT / "README.md").read_text(encoding="utf-8"))
    alone = set(re.findall(r"\d+\.\d+", text)) - set(re.findall(r"\d+\.\d+", pages))
    assert not alone


def test_recipes():
    found = {
        name: (int(sinks), int(recent), why) for name, (sinks, recent, why) in rows("settings.md", "## Recipes").items()
    }
    assert found == {r.pattern.replace("\\", ""): (r.sink_tokens, r.recent_tokens, r.reason) for r in recipes.RECIPES}


def test_request_arguments():
    names = request.BUDGET, request.POLICY, request.GUIDE, request.PROTECT, request.KEEP, request.EPISODE
    assert rows("conversations.md", "## By hand").keys() == set(names)
    assert rows("conversations.md", "## Policies").keys() == set(get_args(Policy))


def test_metrics():
    from vllm_kvcompress.operations import metrics

    counters = {name for name, metric in metrics.METRICS.items() if metric.kind == "counter"}
    found = rows("operations.md", "## Metrics")
    known = {f"{metrics.PREFIX}{name}{'_total' * (name in counters)}" for name in metrics.METRICS}
    assert found.keys() == known | {f"{metrics.PREFIX}info", f"{metrics.PREFIX}compression_ratio"}
    for name, (kind, _) in found.items():
        assert kind == ("1" if name.endswith("info") else "counter" if name.endswith("_total") else "gauge")


SOURCES = {
    path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
    for top in ("vllm_kvcompress", "calibration")
    for path in sorted((ROOT / top).rglob("*.py"))
    if not path.is_relative_to(ROOT / "vllm_kvcompress/calibration")  # a link to the other
}
CONSTANTS = {
    node.targets[0].id: node.value.value
    for tree in SOURCES.values()
    for node in tree.body
    if isinstance(node, ast.Assign)
    and isinstance(node.targets[0], ast.Name)
    and isinstance(node.value, ast.Constant)
    and isinstance(node.value.value, str)
}


def template(node: ast.expr) -> str:
    """A string of the source; NUL for what is put in, but for constants of a module."""
    if isinstance(node, ast.JoinedStr):
        return "".join(map(template, node.values))
    if isinstance(node, ast.Constant):
        return re.sub("%[sd]", "\0", str(node.value))  # of a logger
    if isinstance(node, ast.BinOp):
        return template(node.left) + template(node.right)
    inner = node.value if isinstance(node, ast.FormattedValue) else node
    return CONSTANTS.get(inner.id, "\0") if isinstance(inner, ast.Name) else "\0"


def says(text: str, message: str) -> bool:
    """Whether the fixed parts of a message occur in a text of the source in their order, things put in between."""
    end = 0
    for number, part in enumerate(message.split("…")):
        if number:
            end = text.find("\0", end) + 1
            if end == 0:
                return False
        begin = text.find(part, end)
        if begin < 0:
            return False
        end = begin + len(part)
    return True


def quoted() -> list[str]:
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert len(messages) == len(re.findall(r"^\| (?!message)", page, re.MULTILINE))
    return messages


def test_quoted_messages_are_said():
    """… stands for one or more things put in."""
    strings = [
        template(node)
        for tree in SOURCES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))
    ]
    assert not [message for message in quoted() if not any(says(text, message) for text in strings)]


REFUSALS = {"KVCompressError", "RotationError", "UnsupportedModelError"}
TO_PROGRAMMERS = {
    "layers … do not match the metadata's …",
    "layer …: … is …, expected …",
    "a request cannot change the embedder: …",
    "a window needs at least 1 utterance, …",
}
EXPLAINED = (
    "calibration/",
    *(
        f"vllm_kvcompress/{name}"
        for name in ("checks", "config", "rotations/", "episodic/", "kernels/", "formats/base")
    ),
    *(
        f"vllm_kvcompress/{name}"
        for name in ("attention/", "serving/", "compat", "capacity/command", "capacity/weights")
    ),
)


def test_refusals_are_explained():
    """Each of a server, of calibration and of planning is found on the page."""
    messages = [*quoted(), *TO_PROGRAMMERS]
    missing = []
    for path, tree in SOURCES.items():
        for node in ast.walk(tree) if path.startswith(EXPLAINED) else ():
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in REFUSALS:
                text = template(node.args[0])
                if set(text) - {"\0"} and not any(says(text, message) for message in messages):
                    missing.append(f"{path}:{node.lineno}: {text}".replace("\0", "…"))
    assert not missing, "\n".join(missing)


def test_messages_that_nobody_says():
    text = "layer \0 of \0 is lost; calibrate \0"
    assert says(text, "layer … of … is lost") and says(text, "is lost; calibrate …")
    for message in ("layer … is last", "is lost; layer …", "layer of …", "… layer"):
        assert not says(text, message)
