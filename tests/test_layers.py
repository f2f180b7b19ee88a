# SPDX-License-Identifier: Apache-2.0
"""Imports point one way: the layers of the package, and that nothing imports from a layer above its own."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "vllm_kvcompress"
# From the bottom. A module is in the layer that names it, or the longest part of its name; imports inside of functions
# count too, those for types alone do not. Modules of one layer may import each other, but not in a circle.
LAYERS = (
    "errors logs recipes __version__",
    "quantizers weight_files capacity.text",
    "formats rotations",
    "episodic.policies episodic.request episodic.segment episodic.settings attention.plan",
    "config compat",
    "kernels.transfer kernels.workspace kernels.cuda_ops kernels.selection",
    "triton_kernels",
    "kernels",
    "checks sliding",
    "attention",
    "episodic",
    "plugin operations capacity",
    "calibration serving",
    "evaluation demo",
    "cli",
    "__main__",
)


def modules():
    """{name without the package: file}, `""` for the package itself."""
    found = {}
    for top in (PACKAGE, "triton_kernels", "calibration"):
        # An editable install may link the others into the package.
        for path in (ROOT / top).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if top == PACKAGE and parts[1] in ("triton_kernels", "calibration"):
                continue
            parts = parts[1:] if top == PACKAGE else parts
            found[".".join(part for part in parts if part != "__init__")] = path
    return found


MODULES = modules()


def imported(path):
    """(module, is it when the module itself is imported) of everything that a file imports from the package."""

    def visit(node, at_once):
        for child in ast.iter_child_nodes(node):
            in_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for_types = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            if for_types:
                continue
            assert not (isinstance(child, ast.ImportFrom) and child.level), f"{path}: a relative import"
            if isinstance(child, ast.ImportFrom) and child.module.split(".")[0] == PACKAGE:
                for alias in child.names:
                    full = f"{child.module}.{alias.name}".removeprefix(f"{PACKAGE}.")
                    outer = child.module.removeprefix(PACKAGE).removeprefix(".")
                    yield (full if full in MODULES or not outer else outer), at_once
            if isinstance(child, ast.Import):
                for alias in child.names:
                    if alias.name.split(".")[0] == PACKAGE:
                        yield alias.name.removeprefix(f"{PACKAGE}."), at_once
            yield from visit(child, at_once and not in_function)

    return set(visit(ast.parse(path.read_text()), True))


def layer(name):
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        for number, names in enumerate(LAYERS):
            if ".".join(parts[:length]) in names.split():
                return number
    raise AssertionError(f"{name} is in no layer")


@pytest.mark.parametrize("name", sorted(name for name in MODULES if name))
def test_nothing_is_imported_from_above(name):
    above = {other for other, _ in imported(MODULES[name]) if layer(other) > layer(name)}
    assert not above, f"{name} is below {', '.join(sorted(above))}"


def test_no_circles():
    """Among imports that happen at once; others are there to break one, or to spare what is seldom needed."""
    edges = {name: {o for o, at_once in imported(path) if at_once} - {name} for name, path in MODULES.items()}
    while leaves := [name for name in edges if not edges[name] & edges.keys()]:
        for name in leaves:
            del edges[name]
    assert not edges, f"these import each other: {', '.join(sorted(edges))}"


def test_every_layer_is_there():
    unknown = [n for names in LAYERS for n in names.split() if n != "__version__" and n not in MODULES]
    assert not unknown


LONG = {
    "csrc/decode_sm90.cuh": "one kernel, a template whose parts share registers and shared memory by name",
}
"""Longer than 500 lines, and why."""


def test_modules_are_short():
    """Benchmarks are not modules but scripts: each in one file, to be run where it lies."""
    sources = [p for top in (PACKAGE, "triton_kernels", "calibration", "csrc") for p in (ROOT / top).rglob("*.*")]
    sources = [p for p in sources if p.suffix in (".py", ".cu", ".cuh", ".cpp")]
    long = {p.relative_to(ROOT).as_posix() for p in sources if len(p.read_text().splitlines()) > 500}
    assert long == LONG.keys()
