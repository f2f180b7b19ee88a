# SPDX-License-Identifier: Apache-2.0
"""The outcome of a run as a terminal table, eval.json and eval.png."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_kvcompress.evaluation.engine import Summary
from vllm_kvcompress.evaluation.metrics import Estimate, TextFigures
from vllm_kvcompress.evaluation.recall import RecallFigures
from vllm_kvcompress.evaluation.specs import FormatSpec

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Row:
    """One format's outcome at one context; `error` instead of figures where its engine failed."""

    spec: FormatSpec
    context: int
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

    def by_context(self) -> list[Row]:
        """Rows of the smallest context first; formats in the order they ran, so the reference leads each context."""
        return sorted(self.rows, key=lambda row: row.context)


def table(report: Report) -> str:
    """Aligned text, one line a context and format; intervals are 95 %. Recall is followed by its depth."""
    points = max((len(row.recall) for row in report.rows), default=0)
    header = ["context", "format", "perplexity", "ratio to auto", "KL to auto (nat)", "top-1 agreement"]
    lines = [header + ["recall@depth"] * points]
    for row in report.by_context():
        if row.text is None:
            continue
        text = row.text
        recall = [f"{figures.forced:.2f}@{figures.depth}" for figures in row.recall]
        lines.append(
            [
                str(row.context),
                row.spec.label,
                f"{text.perplexity.value:.3f}",
                interval(text.ratio, 4),
                interval(text.kl, 4),
                interval(text.top1, 4),
                *recall,
                *[""] * (points - len(recall)),
            ]
        )
    rendered = aligned(lines)
    if stress := report.settings.get("stress"):
        rendered.insert(0, f"Stressed model: {stress}")
    # An engine serves all contexts, so its failure is told once.
    rendered += dict.fromkeys(f"{row.spec.label}: failed: {row.error}" for row in report.rows if row.error)
    rendered += [f"Note: {note}" for note in report.notes]
    return "\n".join(rendered)


def aligned(lines: list[list[str]]) -> list[str]:
    """Rows of cells, the header first, as lines with a rule below the header."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rendered = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    ]
    rendered.insert(1, "  ".join("-" * width for width in widths))
    return rendered


def interval(estimate: Estimate, digits: int) -> str:
    """`value [low, high]`."""
    return f"{estimate.value:.{digits}f} [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"


def write_json(report: Report, path: Path) -> None:
    """All figures, settings and versions.

    Schema 2: an entry of `formats` is one format at one `context`, smallest context first; `engine` (whose seconds are
    those of all contexts together) and `error` repeat in each. `context`, `chunks`, `recall_depths` and
    `recall_sentences` in `settings` are lists with one number a context. Schema 1 had one context and no lists.
    """
    rows = []
    for row in report.by_context():
        rows.append(
            {
                "format": row.spec.label,
                "context": row.context,
                "kv_cache_dtype": row.spec.kv_cache_dtype,
                "additional_config": row.spec.additional_config,
                "text": None if row.text is None else asdict(row.text),
                "recall": [asdict(figures) for figures in row.recall],
                "engine": None if row.summary is None else row.summary.model_dump(),
                "error": row.error,
            }
        )
    document = {"schema": 2, "settings": report.settings, "notes": report.notes, "formats": rows}
    path.write_text(json.dumps(document, indent=2, default=str) + "\n", encoding="utf-8")


def write_plot(report: Report, path: Path) -> bool:
    """Draw the figure into a PNG. False where matplotlib is not installed."""
    return save_figure(lambda: draw(report), path)


def save_figure(draw: Callable[[], Figure], path: Path) -> bool:
    """Save what is drawn as a PNG. False where matplotlib, which `draw` imports, is not installed."""
    try:
        figure = draw()
    except ImportError:
        return False
    figure.savefig(path, dpi=110)
    return True


def draw(report: Report) -> Figure:
    """KL, perplexity ratio and recall by depth: bars for one context, lines over the context for several.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    scored = [(row, row.text) for row in report.by_context() if row.text is not None]
    # The reference is 0 and 1 by definition, as it is on a stressed model; showing it would only take room.
    compared = [(row, text) for row, text in scored if row.spec.kv_cache_dtype != report.rows[0].spec.kv_cache_dtype]
    contexts = list(dict.fromkeys(row.context for row, _ in scored))
    labels = dict.fromkeys(row.spec.label for row, _ in scored)
    colours = {label: f"C{index % 10}" for index, label in enumerate(labels)}
    several = len(contexts) > 1
    figure = Figure(figsize=(15, 9) if several else (15, 4.5), layout="constrained")
    if several:
        # Two panels above, one a context below.
        grid = figure.add_gridspec(2, 2 * len(contexts))
        measures = [figure.add_subplot(grid[0, : len(contexts)]), figure.add_subplot(grid[0, len(contexts) :])]
        recalls = [figure.add_subplot(grid[1, 2 * index : 2 * index + 2]) for index in range(len(contexts))]
    else:
        *measures, last = figure.subplots(1, 3)
        recalls = [last]
    figures_by_title = (
        ("KL(auto || format), nat a token", [text.kl for _, text in compared], 0.0),
        ("perplexity / auto - 1", [text.ratio for _, text in compared], 1.0),
    )
    for axes, (title, estimates, base) in zip(measures, figures_by_title, strict=True):
        (_lines if several else _bars)(axes, [row for row, _ in compared], estimates, base, colours)
        heights = [estimate.value - base for estimate in estimates]
        # A format that collapses would flatten all others to nothing.
        if heights and min(heights) > 0 and max(heights) > 20 * min(heights):
            axes.set_yscale("log")
        axes.set_title(title)
    for axes, context in zip(recalls, contexts, strict=True):
        _recall(axes, [row for row, _ in scored if row.context == context and row.recall], colours)
        axes.set_title("verbatim recall, share of tokens" + (f", context {_short(context)}" if several else ""))
    if several:
        keys = [Line2D([], [], color=colour, marker="o", label=label) for label, colour in colours.items()]
        figure.legend(handles=keys, loc="outside lower center", ncols=3)
    elif recalls[0].lines:
        recalls[0].legend()
    settings = report.settings
    sizes = ", ".join(f"{chunks} x {context}" for chunks, context in zip(settings["chunks"], contexts, strict=True))
    figure.suptitle(
        f"{settings['model']}: {sizes} tokens, positions from {settings['first_position']}, fed {settings['feed']} "
        "at a time" + (f", stress {settings['stress']}" if settings.get("stress") else "")
    )
    return figure


def errors(estimates: list[Estimate]) -> list[list[float]]:
    """[2, n]: lengths of the bars below and above each value, as matplotlib takes them."""
    return [
        [max(0.0, estimate.value - estimate.low) for estimate in estimates],
        [max(0.0, estimate.high - estimate.value) for estimate in estimates],
    ]


def _bars(axes: Axes, rows: list[Row], estimates: list[Estimate], base: float, colours: dict[str, str]) -> None:
    labels = [row.spec.label for row in rows]
    heights = [estimate.value - base for estimate in estimates]
    axes.bar(labels, heights, yerr=errors(estimates), capsize=4, color=[colours[label] for label in labels])
    for index, height in enumerate(heights):
        axes.annotate(
            f"{height:.3g}", (index, height), ha="right", va="bottom", xytext=(-3, 2), textcoords="offset points"
        )
    axes.tick_params(axis="x", rotation=20)


def _lines(axes: Axes, rows: list[Row], estimates: list[Estimate], base: float, colours: dict[str, str]) -> None:
    """One line a format over the context, on a logarithmic axis."""
    series: dict[str, list[tuple[int, Estimate]]] = {}
    for row, estimate in zip(rows, estimates, strict=True):
        series.setdefault(row.spec.label, []).append((row.context, estimate))
    for number, (label, points) in enumerate(series.items()):
        # Side by side, or the intervals hide each other.
        shift = 1.03 ** (number - (len(series) - 1) / 2)
        axes.errorbar(
            [context * shift for context, _ in points],
            [estimate.value - base for _, estimate in points],
            yerr=errors([estimate for _, estimate in points]),
            marker="o",
            capsize=3,
            label=label,
            color=colours[label],
        )
    contexts = sorted({row.context for row in rows})
    axes.set_xscale("log")
    axes.set_xticks(contexts, [_short(context) for context in contexts])
    axes.minorticks_off()
    axes.set_xlabel("context, tokens")


def _recall(axes: Axes, rows: list[Row], colours: dict[str, str]) -> None:
    for row in rows:
        axes.plot(
            [figures.depth for figures in row.recall],
            [figures.forced for figures in row.recall],
            marker="o",
            label=row.spec.label,
            color=colours[row.spec.label],
        )
    axes.set_xlabel("tokens between the sentence and the question")
    axes.set_ylim(-0.03, 1.03)


def _short(tokens: int) -> str:
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)
