# SPDX-License-Identifier: Apache-2.0
"""`--report DIR`: report.md, report.json and three plots of a calibration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from vllm_kvcompress.calibration.pipeline import Calibration
from vllm_kvcompress.calibration.statistics import eigenbasis
from vllm_kvcompress.errors import KVCompressError


def report_rows(result: Calibration) -> list[dict[str, Any]]:
    """One row a layer: errors at the chosen and at no clip (mean over heads), clips, spectra, sensitivity."""
    metadata = result.rotation.metadata
    rows = []
    for index, (layer_id, layer) in enumerate(result.rotation.layers.items()):
        moments = result.moments.layers[layer_id]
        grid = list(result.errors.grid)
        errors = result.errors.mean(layer_id)
        row: dict[str, Any] = {"layer": layer_id, "sensitivity": metadata.sensitivity[index]}
        for name, error, clip in (("key", errors[0], layer.k_clip), ("value", errors[1], layer.v_clip)):
            # Clips are float32, the grid is not: nearest rather than equal.
            chosen = (clip.unsqueeze(-1) - torch.tensor(grid)).abs().argmin(-1)
            picked = error.gather(0, chosen.unsqueeze(0))
            row[f"{name}_error"] = float(picked.mean())
            row[f"{name}_error_unclipped"] = float(error[grid.index(1.0)].mean()) if 1.0 in grid else None
            row[f"{name}_clips"] = [grid[i] for i in chosen.tolist()]
        for name, covariance in (("query", moments.query), ("value", moments.value)):
            spectrum = eigenbasis(covariance)[0].mean(0)
            row[f"{name}_spectrum"] = (spectrum / spectrum.sum().clamp(min=1e-30)).tolist()
        row["key_mean_norm"] = float(layer.k_mean.norm(dim=-1).mean())
        rows.append(row)
    return rows


def write_report(folder: Path, result: Calibration) -> None:
    """Write the report; plots need matplotlib and are left out, with a note in report.md, where it is missing.

    Raises:
        KVCompressError: the folder cannot be written.
    """
    rows = report_rows(result)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        plots = _plot(folder, rows)
        content = {"metadata": result.rotation.metadata.model_dump(), "layers": rows}
        (folder / "report.json").write_text(json.dumps(content, indent=1), encoding="utf-8")
        (folder / "report.md").write_text(_markdown(result, rows, plots), encoding="utf-8")
    except OSError as error:
        raise KVCompressError(f"--report {folder}: cannot be written: {error.strerror or error}") from None


def _markdown(result: Calibration, rows: list[dict[str, Any]], plots: list[str]) -> str:
    metadata = result.rotation.metadata
    lines = [
        f"# Calibration of {metadata.model}",
        "",
        f"{metadata.tokens} tokens, {metadata.data}, seed {metadata.seed}; {len(rows)} layers of "
        f"{metadata.num_kv_heads} KV heads of size {metadata.head_dim}; fingerprint `{metadata.fingerprint}`.",
        "",
        "Errors are squared errors of the attention output over its squared norm, on held-back text; tokens "
        f"past the first {metadata.recipe['sinks']} and before the last {metadata.recipe['recent']} are quantised. "
        "Means over KV heads.",
        "",
        "| layer | key error | min-max | key clips | value error | min-max | value clips | mean key | sensitivity |",
        "|--:|--:|--:|:--|--:|--:|:--|--:|--:|",
    ]
    for row in rows:
        clips = [" ".join(f"{c:g}" for c in row[f"{name}_clips"]) for name in ("key", "value")]
        lines.append(
            f"| {row['layer']} | {row['key_error']:.4f} | {row['key_error_unclipped']:.4f} | {clips[0]} "
            f"| {row['value_error']:.4f} | {row['value_error_unclipped']:.4f} | {clips[1]} "
            f"| {row['key_mean_norm']:.2f} | {row['sensitivity']:.4f} |"
        )
    lines += ["", *(f"![{name}]({name})" for name in plots)]
    if not plots:
        lines.append("No plots: matplotlib is not installed.")
    return "\n".join(lines) + "\n"


def _plot(folder: Path, rows: list[dict[str, Any]]) -> list[str]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return []
    layers = [row["layer"] for row in rows]

    def draw(name: str, titles: tuple[str, str], xlabel: str, ylabel: str, paint: Any) -> str:
        figure = Figure(figsize=(11, 4), layout="constrained")
        FigureCanvasAgg(figure)
        for index, (axes, title) in enumerate(zip(figure.subplots(1, 2), titles, strict=True)):
            paint(axes, index)
            axes.set(title=title, xlabel=xlabel, ylabel=ylabel)
            axes.grid(alpha=0.3)
        figure.savefig(folder / name, dpi=120)
        return name

    def spectra(axes: Any, index: int) -> None:
        for row in rows:
            shade = row["layer"] / max(layers[-1], 1)
            axes.semilogy(row[f"{('query', 'value')[index]}_spectrum"], color=(shade, 0.3, 1 - shade), linewidth=0.8)

    def errors(axes: Any, index: int) -> None:
        name = ("key", "value")[index]
        axes.plot(layers, [row[f"{name}_error_unclipped"] for row in rows], "o--", label="min-max", markersize=3)
        axes.plot(layers, [row[f"{name}_error"] for row in rows], "o-", label="chosen clip", markersize=3)
        axes.set_ylim(bottom=0)
        axes.legend()

    def clips(axes: Any, index: int) -> None:
        for row in rows:
            found = row[f"{('key', 'value')[index]}_clips"]
            axes.plot([row["layer"]] * len(found), found, "o", color="tab:blue", alpha=0.5)
        axes.set_ylim(0, 1.05)

    return [
        draw(
            "spectra.png",
            ("query covariance", "weighted value covariance"),
            "eigenvalue (blue: first layer)",
            "share",
            spectra,
        ),
        draw("errors.png", ("keys", "values"), "layer", "relative squared output error", errors),
        draw("clips.png", ("keys", "values"), "layer", "clip, one dot a KV head", clips),
    ]
