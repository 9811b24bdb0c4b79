"""The evaluation as one picture: AUROC per finding with intervals, and retrieval beside chance."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mg3d.atomic import atomic_path

SERIES = (
    ("linear_probe_auroc_trained", "probe, pre-trained", "tab:blue"),
    ("linear_probe_auroc_random", "probe, random encoder", "tab:gray"),
    ("zero_shot_auroc", "zero-shot", "tab:orange"),
)


def _interval(entry: Mapping[str, Any]) -> list[list[float]]:
    low, high = entry["ci95"] or (entry["mean"], entry["mean"])
    return [[max(entry["mean"] - low, 0.0)], [max(high - entry["mean"], 0.0)]]


def _draw_findings(axes: Any, metrics: Mapping[str, Any]) -> None:
    names = [*metrics["linear_probe_auroc_trained"]["per_class"], "mean"]
    for shift, (key, label, colour) in enumerate(SERIES):
        entry = metrics.get(key)
        if not entry:
            continue
        for row, name in enumerate(names):
            value = entry if name == "mean" else entry["per_class"][name]
            if value["mean"] is not None:
                style = {"fmt": "o", "color": colour, "capsize": 2, "markersize": 4}
                axes.errorbar(value["mean"], row + 0.22 * (shift - 1), xerr=_interval(value), **style)
        axes.plot([], [], "o", color=colour, label=label)
    axes.axvline(0.5, color="black", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("area under the ROC curve (95 % interval)")
    axes.legend(loc="lower left", fontsize="small")


def _draw_retrieval(axes: Any, metrics: Mapping[str, Any]) -> None:
    names = [name for name in metrics if "_recall_at_" in name]
    for row, name in enumerate(names):
        entry = metrics[name]
        axes.barh(row, entry["mean"], xerr=_interval(entry), color="tab:orange", height=0.6, capsize=2)
        axes.plot([entry["chance"]] * 2, [row - 0.4, row + 0.4], color="black", label="chance" if row == 0 else None)
    axes.set_yticks(range(len(names)), [name.replace("_recall_at_", " R@").replace("_", " ") for name in names])
    axes.invert_yaxis()
    axes.set_xlabel("recall (95 % interval)")
    if names:
        axes.legend(loc="lower right", fontsize="small")


def draw_figure(metrics: Mapping[str, Any], path: Path) -> None:
    """Write the picture.

    Args:
        metrics: entries of :func:`mg3d.evaluation.report.evaluation_entries`.
        path: PNG to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = len(metrics["linear_probe_auroc_trained"]["per_class"]) + 1
    retrieval = any("_recall_at_" in name for name in metrics)
    figure = Figure(figsize=(12 if retrieval else 7, max(3.5, 0.45 * rows + 1.2)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2 if retrieval else 1, squeeze=False)[0]
    _draw_findings(panels[0], metrics)
    panels[0].set_title("Findings")
    if retrieval:
        _draw_retrieval(panels[1], metrics)
        panels[1].set_title("Retrieval, held-out pool")
    with atomic_path(path) as partial:
        figure.savefig(partial, dpi=120, format=path.suffix[1:])
