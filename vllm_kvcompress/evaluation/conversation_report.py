# SPDX-License-Identifier: Apache-2.0
"""The outcome of `kvcompress eval-conversations` as a terminal table, conversations.json and conversations.png."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_kvcompress.evaluation.conversation_figures import BASELINE, FULL, Setup, SetupFigures
from vllm_kvcompress.evaluation.metrics import Estimate
from vllm_kvcompress.evaluation.report import aligned, errors, interval, save_figure
from vllm_kvcompress.evaluation.routing import RoutingFigures

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class ConversationRow:
    """One setup under one format; `error` instead of figures where its engine failed."""

    format: str
    setup: Setup
    budget: int | None = None
    """Tokens, of the longest history"""
    figures: SetupFigures | None = None
    questions: list[dict[str, Any]] = field(default_factory=list)
    """Of each question what was said, its F1 and the mean ln p of its gold answer"""
    error: str | None = None


@dataclass(frozen=True)
class ConversationReport:
    """A whole run."""

    settings: dict[str, Any]
    """Everything that determines the figures, as given or resolved."""
    routing: RoutingFigures | None
    """None if no question names evidence"""
    rows: list[ConversationRow]
    notes: list[str] = field(default_factory=list)


def table(report: ConversationReport) -> str:
    """Aligned text, one line a format and setup; intervals are 95 %."""
    header = ["format", "policy", "budget", "ln p(gold)", "minus full", f"minus {BASELINE}"]
    header += ["F1", "minus full", f"minus {BASELINE}", "s/question"]
    lines = [header]
    for row in report.rows:
        if (figures := row.figures) is None:
            continue
        evicts = row.setup != FULL
        lines.append(
            [
                row.format,
                row.setup.policy or "full cache",
                f"{row.budget} ({row.setup.share:.1%})" if evicts else "all",
                f"{figures.likelihood.value:.3f}",
                interval(figures.likelihood_to_full, 3) if evicts else "",
                "" if figures.likelihood_to_baseline is None else interval(figures.likelihood_to_baseline, 3),
                f"{figures.f1.value:.3f}",
                interval(figures.f1_to_full, 3) if evicts else "",
                "" if figures.f1_to_baseline is None else interval(figures.f1_to_baseline, 3),
                f"{figures.seconds:.1f}",
            ]
        )
    rendered = aligned(lines)
    rendered += dict.fromkeys(f"{row.format}: failed: {row.error}" for row in report.rows if row.error)
    if routing := report.routing:
        rendered.append(
            f"Routing, {routing.questions} questions: {routing.found:.0%} of a question's windows with evidence are in "
            f"the episode it is routed to, which has {routing.size:.0%} of all windows; at least one is for "
            f"{routing.any_found:.0%} of the questions; the largest episode has {routing.largest:.0%}"
        )
    rendered += [f"Note: {note}" for note in report.notes]
    return "\n".join(rendered)


def write_json(report: ConversationReport, path: Path) -> None:
    """All figures, settings and answers; see the dataclasses for the fields."""
    document = {
        "schema": 1,
        "settings": report.settings,
        "notes": report.notes,
        "routing": None if report.routing is None else asdict(report.routing),
        "rows": [asdict(row) for row in report.rows],
    }
    path.write_text(json.dumps(document, indent=2, default=str) + "\n", encoding="utf-8")


def write_plot(report: ConversationReport, path: Path) -> bool:
    """Draw the figure into a PNG. False where matplotlib is not installed."""
    return save_figure(lambda: draw(report), path)


def draw(report: ConversationReport) -> Figure:
    """Likelihood and F1 against the full cache by budget, a line a policy, a row of panels a format.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    evicting = [row for row in report.rows if row.figures is not None and row.setup != FULL]
    formats = list(dict.fromkeys(row.format for row in evicting))
    policies = list(dict.fromkeys(row.setup.policy for row in evicting))
    figure = Figure(figsize=(12, 0.8 + 3.8 * max(1, len(formats))), layout="constrained")
    panels = figure.subplots(max(1, len(formats)), 2, squeeze=False)
    for name, pair in zip(formats, panels, strict=False):
        for axes, title, pick in (
            (pair[0], "ln p a token of the gold answer, minus full cache", _likelihood),
            (pair[1], "F1 of the answer, minus full cache", _f1),
        ):
            for number, policy in enumerate(policies):
                rows = [row for row in evicting if row.format == name and row.setup.policy == policy]
                rows.sort(key=lambda row: row.setup.share or 0)
                estimates = [pick(row) for row in rows]
                # Side by side, or the intervals hide each other.
                shift = 1.03 ** (number - (len(policies) - 1) / 2)
                axes.errorbar(
                    [(row.setup.share or 0) * shift for row in rows],
                    [estimate.value for estimate in estimates],
                    yerr=errors(estimates),
                    marker="o",
                    capsize=3,
                    label=policy,
                    color=f"C{number % 10}",
                )
            axes.axhline(0, color="grey", linewidth=0.8)
            axes.set_xscale("log")
            shares = sorted({row.setup.share or 0 for row in evicting})
            axes.set_xticks(shares, [f"{share:.4g}" for share in shares])
            axes.minorticks_off()
            axes.set_xlim(shares[0] / 1.3, shares[-1] * 1.3)
            axes.set_xlabel("budget, share of the history")
            axes.set_title(f"{name}: {title}", fontsize=10)
    if evicting:
        panels[0][0].legend()
    settings = report.settings
    figure.suptitle(f"{settings['model']}: {settings['asked']} questions, histories up to {settings['history']} tokens")
    return figure


def _likelihood(row: ConversationRow) -> Estimate:
    assert row.figures is not None
    return row.figures.likelihood_to_full


def _f1(row: ConversationRow) -> Estimate:
    assert row.figures is not None
    return row.figures.f1_to_full
