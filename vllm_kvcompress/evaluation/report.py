# SPDX-License-Identifier: Apache-2.0
"""The outcome of a run as a terminal table, eval.json and eval.png."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vllm_kvcompress.evaluation.engine import Summary
from vllm_kvcompress.evaluation.metrics import Estimate, TextFigures
from vllm_kvcompress.evaluation.recall import RecallFigures
from vllm_kvcompress.evaluation.specs import FormatSpec


@dataclass(frozen=True)
class Row:
    """One format's outcome; `error` instead of figures where its engine failed."""

    spec: FormatSpec
    text: TextFigures | None = None
    recall: list[RecallFigures] = field(default_factory=list)
    summary: Summary | None = None
    error: str | None = None


@dataclass(frozen=True)
class Report:
    """A whole run."""

    settings: dict[str, Any]
    """Everything that determines the figures, as given or resolved."""
    rows: list[Row]
    notes: list[str] = field(default_factory=list)


def table(report: Report) -> str:
    """Aligned text, one line a format; intervals are 95 %."""
    depths = next((row.recall for row in report.rows if row.recall), [])
    header = ["format", "perplexity", "ratio to auto", "KL to auto (nat)", "top-1 agreement"]
    header += [f"recall@{figures.depth}" for figures in depths]
    lines = [header]
    for row in report.rows:
        if row.text is None:
            continue
        text = row.text
        lines.append(
            [
                row.spec.label,
                f"{text.perplexity.value:.3f}",
                _interval(text.ratio, 4),
                _interval(text.kl, 4),
                _interval(text.top1, 4),
                *(f"{figures.forced:.2f}" for figures in row.recall),
            ]
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    rendered = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    ]
    rendered.insert(1, "  ".join("-" * width for width in widths))
    rendered += [f"{row.spec.label}: failed: {row.error}" for row in report.rows if row.error]
    rendered += [f"Note: {note}" for note in report.notes]
    return "\n".join(rendered)


def _interval(estimate: Estimate, digits: int) -> str:
    return f"{estimate.value:.{digits}f} [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"


def write_json(report: Report, path: Path) -> None:
    """All figures, settings and versions."""
    rows = []
    for row in report.rows:
        rows.append(
            {
                "format": row.spec.label,
                "kv_cache_dtype": row.spec.kv_cache_dtype,
                "additional_config": row.spec.additional_config,
                "text": None if row.text is None else asdict(row.text),
                "recall": [asdict(figures) for figures in row.recall],
                "engine": None if row.summary is None else row.summary.model_dump(),
                "error": row.error,
            }
        )
    document = {"schema": 1, "settings": report.settings, "notes": report.notes, "formats": rows}
    path.write_text(json.dumps(document, indent=2, default=str) + "\n", encoding="utf-8")


def write_plot(report: Report, path: Path) -> bool:
    """Bars of KL and perplexity ratio, recall by depth. False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    scored = [(row, row.text) for row in report.rows if row.text is not None]
    # The reference is 0 and 1 by definition; a bar for it would only take room.
    compared = [(row, text) for row, text in scored if row is not report.rows[0]]
    with_recall = [row for row, _ in scored if row.recall]
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    kl_axes, ratio_axes, recall_axes = figure.subplots(1, 3)
    labels = [row.spec.label for row, _ in compared]
    colours = {row.spec.label: f"C{index % 10}" for index, (row, _) in enumerate(scored)}
    for axes, title, estimates, base in (
        (kl_axes, "KL(auto || format), nat a token", [text.kl for _, text in compared], 0.0),
        (ratio_axes, "perplexity / auto - 1", [text.ratio for _, text in compared], 1.0),
    ):
        heights = [estimate.value - base for estimate in estimates]
        errors = [
            [max(0.0, estimate.value - estimate.low) for estimate in estimates],
            [max(0.0, estimate.high - estimate.value) for estimate in estimates],
        ]
        axes.bar(labels, heights, yerr=errors, capsize=4, color=[colours[label] for label in labels])
        for index, height in enumerate(heights):
            axes.annotate(
                f"{height:.3g}", (index, height), ha="right", va="bottom", xytext=(-3, 2), textcoords="offset points"
            )
        positive = [height for height in heights if height > 0]
        # A format that collapses would flatten all others to nothing.
        if len(positive) == len(heights) and positive and max(positive) > 20 * min(positive):
            axes.set_yscale("log")
        axes.set_title(title)
        axes.tick_params(axis="x", rotation=20)
    for row in with_recall:
        recall_axes.plot(
            [figures.depth for figures in row.recall],
            [figures.forced for figures in row.recall],
            marker="o",
            label=row.spec.label,
            color=colours[row.spec.label],
        )
    recall_axes.set_title("verbatim recall, share of tokens")
    recall_axes.set_xlabel("tokens between the sentence and the question")
    recall_axes.set_ylim(-0.03, 1.03)
    if with_recall:
        recall_axes.legend()
    settings = report.settings
    figure.suptitle(
        f"{settings['model']}: {settings['chunks']} x {settings['context']} tokens, positions from "
        f"{settings['first_position']}, fed {settings['feed']} at a time"
    )
    figure.savefig(path, dpi=110)
    return True
