# SPDX-License-Identifier: Apache-2.0
"""Writes docs/features.md from the tests that are marked `@pytest.mark.feature(name, state, note)`.

    python tests/feature_table.py

`state` is "works", asserted by a real engine, or "refused", asserted at start. Marks are read from the source: nothing
is imported. A test, or one case of it (`pytest.param(..., marks=...)`), may have several; so may a feature have tests.
"""

import ast
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "features.md"
FEATURES = (
    "prefix caching",
    "chunked prefill",
    "preemption",
    "n > 1",
    "beam search",
    "log-probabilities of answers and prompts",
    "structured output",
    "LoRA",
    "n-gram speculative decoding",
    "drafts of a model (draft model, EAGLE, MTP)",
    "torch.compile and --enforce-eager",
    "CUDA graphs",
    "OpenAI HTTP server",
    "eviction and episodes",
    "tensor parallelism",
    "pipeline parallelism",
    "data parallelism",
    "context parallelism",
    "micro-batching (--enable-dbo)",
    "KV connectors and offloading",
    "sleep mode",
    "--kv-cache-dtype-skip-layers",
    "models in bf16, fp16 and fp32",
    "sliding windows beside full attention",
    "models with nothing but sliding windows",
    "chunked local attention",
    "attention sinks in the model",
    "ALiBi",
    "soft-capped attention logits",
    "MLA",
    "hybrids with state-space layers",
    "encoder-decoder models",
    "embedding and other pooling models",
)
"""What users ask for, in the table's order; each must have a test."""
STATES = ("works", "refused")
HEAD = """# Features

What goes with `--kv-cache-dtype oscar-int2` and the other formats. "works": a real engine gives what the model itself
or `--kv-cache-dtype auto` gives, within the rounding of 16-bit windows that hold every token, or as the test says.
"refused": the engine does not start, and says why. Where the table names no GPU, none was tried.
Written by `python tests/feature_table.py` from the tests named here; those marked * take minutes (`make test-long`).

| feature | | tested on | by |
|---|---|---|---|
"""


@dataclass
class Feature:
    state: str
    notes: list[str] = field(default_factory=list)
    tests: list[str] = field(default_factory=list)
    """`file::function`, the file relative to tests/; a * behind it: long"""

    def row(self, name: str) -> str:
        places = [place for place, on_gpu in (("CPU", False), ("GPU", True)) if on_gpu in map(is_on_gpu, self.tests)]
        tests = ", ".join(f"`{test.rstrip('*')}`{'*' * test.endswith('*')}" for test in self.tests)
        return f"| {name} | {'; '.join([self.state, *self.notes])} | {', '.join(places)} | {tests} |\n"


def is_on_gpu(test: str) -> bool:
    return test.startswith("gpu/")


def collect(folder: Path) -> dict[str, Feature]:
    """Features by name.

    Raises:
        ValueError: a mark that is not (name, state) or (name, state, note) of strings, or two states of one feature.
    """
    found: dict[str, Feature] = {}
    for path in sorted(folder.rglob("test_*.py")):
        module = ast.parse(path.read_text(encoding="utf-8"))
        all_long = any("pytestmark" in ast.unparse(x) and "mark.long" in ast.unparse(x) for x in module.body)
        for function in module.body:
            if isinstance(function, ast.FunctionDef):
                is_long = all_long or any(ast.unparse(x) == "pytest.mark.long" for x in function.decorator_list)
                test = f"{path.relative_to(folder).as_posix()}::{function.name}{'*' * is_long}"
                for mark in marks(function):
                    add(found, test, mark)
    return found


def marks(function: ast.FunctionDef) -> list[ast.Call]:
    nodes = [node for decorator in function.decorator_list for node in ast.walk(decorator)]
    return [node for node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.feature"]


def add(found: dict[str, Feature], test: str, mark: ast.Call) -> None:
    values = [argument.value for argument in mark.args if isinstance(argument, ast.Constant)]
    if mark.keywords or len(values) != len(mark.args) or len(values) not in (2, 3) or values[1] not in STATES:
        raise ValueError(f"{test}: {ast.unparse(mark)} is not (name, state) or (name, state, note), state of {STATES}")
    name, state, *notes = map(str, values)
    feature = found.setdefault(name, Feature(state))
    if feature.state != state:
        raise ValueError(f"{test}: {name!r} {state}, and {feature.state} by {feature.tests}")
    feature.notes += [note for note in notes if note not in feature.notes]
    feature.tests += [test] if test not in feature.tests else []


def page(found: dict[str, Feature]) -> str:
    return HEAD + "".join(found[name].row(name) for name in FEATURES)


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(collect(ROOT / "tests")), encoding="utf-8")
