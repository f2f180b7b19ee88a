# SPDX-License-Identifier: Apache-2.0
"""Table, JSON and figure of made-up outcomes."""

import json

import pytest

from vllm_kvcompress.evaluation.metrics import Estimate, TextFigures
from vllm_kvcompress.evaluation.recall import RecallFigures
from vllm_kvcompress.evaluation.report import Report, Row, draw, table, write_json, write_plot
from vllm_kvcompress.evaluation.specs import FormatSpec

CONTEXTS = [2048, 8192, 10000]
# Ratio and KL by format, times one to three over the contexts.
EXCESS = {"auto": 0.0, "fp8": 0.01, "int2": 0.4}


def outcome(contexts, failing=()):
    """As the command makes it: format after format, contexts of each in ascending order."""
    rows = []
    for label, excess in EXCESS.items():
        for index, context in enumerate(contexts):
            spec = FormatSpec(label, label)
            if label in failing:
                rows.append(Row(spec, context, error="it broke"))
                continue
            value = excess * (index + 1)
            text = TextFigures(
                positions=100,
                perplexity=Estimate(20 + value, 19, 21),
                ratio=Estimate(1 + value, 1 + value / 2, 1 + 2 * value),
                kl=Estimate(value, value / 2, 2 * value),
                top1=Estimate(1 - value / 10, 0.5, 1),
            )
            # One depth fewer at every further context, none at the third.
            curve = [RecallFigures(100 * depth + context, 3, 0.1, 0.0, 0.25 * depth, 2.0) for depth in (1, 2)]
            rows.append(Row(spec, context, text, curve[: 2 - index]))
    settings = {"model": "tiny", "chunks": [len(contexts)] * len(contexts), "first_position": 320, "feed": 64}
    return Report(settings, rows, ["mind this"])


def test_table_groups_rows_by_context():
    lines = table(outcome(CONTEXTS)).splitlines()
    assert lines[0].split("  ")[0] == "context"
    assert lines[0].endswith("recall@depth  recall@depth")
    cells = [line.split()[:2] for line in lines[2:11]]
    assert cells == [[str(context), label] for context in CONTEXTS for label in EXCESS]
    assert lines[3].endswith("0.25@2148     0.50@2248")
    assert lines[6].endswith("0.25@8292")
    # No probe at the third context: the row ends with the interval of top-1 agreement.
    assert lines[9].endswith("0.9970 [0.5000, 1.0000]")
    assert lines[11:] == ["Note: mind this"]


def test_a_failed_engine_is_told_once():
    lines = table(outcome(CONTEXTS, failing=["fp8"])).splitlines()
    assert [line for line in lines if "fp8" in line] == ["fp8: failed: it broke"]
    assert len(lines) == 2 + 6 + 2


def test_json_has_an_entry_a_context_and_format(tmp_path):
    write_json(outcome(CONTEXTS, failing=["fp8"]), tmp_path / "eval.json")
    document = json.loads((tmp_path / "eval.json").read_text())
    assert document["schema"] == 2
    entries = document["formats"]
    assert [(entry["context"], entry["format"]) for entry in entries] == [
        (context, label) for context in CONTEXTS for label in EXCESS
    ]
    assert entries[5]["text"]["kl"] == {"value": 0.8, "low": 0.4, "high": 1.6}
    assert [len(entry["recall"]) for entry in entries] == [2, 0, 2, 1, 0, 1, 0, 0, 0]
    assert [entry["error"] for entry in entries] == [None, "it broke", None] * 3


def test_one_context_is_drawn_as_bars():
    pytest.importorskip("matplotlib")
    kl, ratio, recall = draw(outcome([2048])).axes
    assert [bar.get_height() for bar in kl.patches] == [0.01, 0.4]
    assert [bar.get_height() for bar in ratio.patches] == pytest.approx([0.01, 0.4])
    # 40 times apart: on a linear axis the smaller could not be read.
    assert kl.get_yscale() == "log"
    assert [line.get_xdata().tolist() for line in recall.lines] == [[2148, 2248]] * 3


def test_several_contexts_are_drawn_as_lines():
    pytest.importorskip("matplotlib")
    figure = draw(outcome(CONTEXTS))
    kl, ratio, *recalls = figure.axes
    assert len(recalls) == 3
    for axes in (kl, ratio):
        assert axes.get_xscale() == "log"
        assert [label.get_text() for label in axes.get_xticklabels()] == ["2K", "8K", "10000"]
        fp8, int2 = axes.containers
        # Beside each other by 3 %, around their context.
        assert fp8.lines[0].get_xdata() == pytest.approx([context / 1.03**0.5 for context in CONTEXTS])
        assert int2.lines[0].get_xdata() == pytest.approx([context * 1.03**0.5 for context in CONTEXTS])
        assert fp8.lines[0].get_ydata() == pytest.approx([0.01, 0.02, 0.03])
        assert int2.lines[0].get_ydata() == pytest.approx([0.4, 0.8, 1.2])
        low, high = zip(*(segment[:, 1] for segment in int2.lines[2][0].get_segments()), strict=True)
        assert low == pytest.approx([0.2, 0.4, 0.6])
        assert high == pytest.approx([0.8, 1.6, 2.4])
    assert [len(axes.lines) for axes in recalls] == [3, 3, 0]
    assert recalls[1].get_title() == "verbatim recall, share of tokens, context 8K"
    assert "3 x 2048, 3 x 8192, 3 x 10000 tokens" in figure.get_suptitle()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(EXCESS)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("formats", [["auto"], ["auto", "fp8", "int2"]])
@pytest.mark.parametrize("contexts", [[2048], CONTEXTS])
def test_png(tmp_path, contexts, formats):
    pytest.importorskip("matplotlib")
    report = outcome(contexts)
    rows = [row for row in report.rows if row.spec.label in formats]
    assert write_plot(Report(report.settings, rows), tmp_path / "eval.png")
    assert (tmp_path / "eval.png").read_bytes().startswith(b"\x89PNG")


def test_the_stress_is_named():
    report = outcome([2048])
    report.settings["stress"] = "outliers=16"
    # A second auto, on the stressed model: nothing to draw, like the reference.
    spec = FormatSpec("auto on the copy", "auto")
    report.rows.insert(1, Row(spec, 2048, report.rows[0].text))
    assert table(report).splitlines()[0] == "Stressed model: outliers=16"
    pytest.importorskip("matplotlib")
    figure = draw(report)
    assert figure.get_suptitle().endswith("fed 64 at a time, stress outliers=16")
    assert [bar.get_height() for bar in figure.axes[0].patches] == [0.01, 0.4]
