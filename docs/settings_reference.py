# SPDX-License-Identifier: Apache-2.0
"""Write the tables of settings.md from the models that check the settings: `python docs/settings_reference.py`."""

from __future__ import annotations

from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from vllm_kvcompress.config import Settings
from vllm_kvcompress.episodic.settings import EpisodicSettings

PAGE = Path(__file__).with_name("settings.md")
MODELS: dict[str, type[BaseModel]] = {"settings": Settings, "episodic": EpisodicSettings}
"""Name of a table's marks in the page -> what it lists."""
_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below", "multiple_of": "a multiple of"}
_KINDS = {int: "whole number", float: "number", str: "text", Path: "path"}


def table(model: type[BaseModel]) -> str:
    """Markdown: one row a field.

    Raises:
        ValueError: a field without a description.
    """
    rows = ["| setting | default | values | meaning |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        if not field.description:
            raise ValueError(f"{model.__name__}.{name} has no description")
        rows.append(f"| `{name}` | {_default(field)} | {_values(field)} | {field.description} |")
    return "\n".join(rows)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "needed"
    return "not set" if field.default is None else f"`{field.default}`"


def _values(field: FieldInfo) -> str:
    annotation: Any = field.annotation
    if get_origin(annotation) in (Union, UnionType):
        (annotation,) = (kind for kind in get_args(annotation) if kind is not type(None))
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    if issubclass(annotation, BaseModel):
        return "object, see below"
    bounds = [
        f"{words} {value:g}"
        for part in field.metadata
        for key, words in _BOUNDS.items()
        if (value := getattr(part, key, None)) is not None
    ]
    return ", ".join([_KINDS[annotation], *bounds])


def updated(page: str) -> str:
    """The page with its tables as they should be."""
    for name, model in MODELS.items():
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
        before, _, rest = page.partition(begin)
        _, found, after = rest.partition(end)
        if not found:
            raise ValueError(f"{PAGE.name} lacks the line {begin.strip()}, or {end.strip()} after it")
        page = f"{before}{begin}\n{table(model)}\n\n{end}{after}"
    return page


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
