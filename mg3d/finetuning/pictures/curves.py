"""ROC, precision-recall, FROC and training curves, and the confusion matrix."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mg3d.finetuning.pictures.canvas import colour, new_figure, save
from mg3d.metrics.classification import auroc, average_precision, curve_points

FROC = "froc@"
SMOOTHED_FROM = 30  # steps from which a running mean is drawn over the losses
MAX_DRAWN_POINTS = 2000


def roc_pr_png(scores: np.ndarray, targets: np.ndarray, names: Sequence[str], path: Path, *, title: str = "") -> Path:
    """Draw the ROC and the precision-recall curve of every output.

    Args:
        scores: [n, K] probabilities.
        targets: [n, K] with 1 and 0, other values left out; or [n] class index, each class then against the rest.
        names: K names of the outputs.
        path: PNG to write.
        title: line above the picture.

    Returns:
        the path.

    Raises:
        ValueError: shapes that disagree.
    """
    scores, targets = np.asarray(scores, dtype=np.float64), np.asarray(targets)
    if targets.ndim == 1 and scores.ndim == 2 and scores.shape[1] > 1:
        targets = (targets[:, None] == np.arange(scores.shape[1])).astype(int)
    targets = targets.reshape(len(targets), -1)
    if scores.shape != targets.shape or len(names) != scores.shape[1]:
        raise ValueError(f"scores {scores.shape}, targets {targets.shape} and {len(names)} names do not agree")
    figure = new_figure(10.5, 4.9)
    roc, pr = figure.subplots(1, 2)
    for k, name in enumerate(names):
        _draw_output(roc, pr, scores[:, k], targets[:, k], name, colour(k))
    roc.plot([0, 1], [0, 1], color="0.6", linewidth=0.8, linestyle=":")
    roc.set(xlabel="false positive rate (1 - specificity)", ylabel="sensitivity", title="ROC")
    pr.set(xlabel="recall (sensitivity)", ylabel="precision", title="precision-recall (dotted: prevalence)")
    for axes in (roc, pr):
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
        axes.grid(alpha=0.25)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8, loc="lower right" if axes is roc else "lower left")
    figure.suptitle(title, fontsize=11)
    return save(figure, path)


def _draw_output(roc: Any, pr: Any, scores: np.ndarray, targets: np.ndarray, name: str, shade: str) -> None:
    positive, negative = int((targets == 1).sum()), int((targets == 0).sum())
    if not positive or not negative:
        roc.plot([], [], color=shade, label=f"{name}: one class only")
        return
    points = curve_points(scores, targets)
    keep = _thinned(len(points["fpr"]))
    roc.plot(
        points["fpr"][keep],
        points["sensitivity"][keep],
        color=shade,
        label=f"{name}, area {auroc(scores, targets):.3f}",
    )
    pr.step(
        points["sensitivity"][keep],
        points["precision"][keep],
        where="pre",
        color=shade,
        label=f"{name}, average precision {average_precision(scores, targets):.3f}",
    )
    pr.axhline(positive / (positive + negative), color=shade, linewidth=0.8, linestyle=":")


def _thinned(count: int) -> np.ndarray:
    """Indices of at most ``MAX_DRAWN_POINTS`` points, first and last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, MAX_DRAWN_POINTS)).round().astype(int))


def confusion_png(matrix: np.ndarray | Sequence[Sequence[int]], names: Sequence[str], path: Path) -> Path:
    """Draw a confusion matrix with counts and the share of each true class.

    Args:
        matrix: [C, C] counts, truth in rows.
        names: C class names.
        path: PNG to write.

    Returns:
        the path.

    Raises:
        ValueError: matrix and names do not fit.
    """
    counts = np.asarray(matrix)
    if counts.shape != (len(names), len(names)):
        raise ValueError(f"a matrix of shape {counts.shape} does not fit {len(names)} classes")
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    size = max(3.6, 1.1 + 0.85 * len(names))
    figure = new_figure(size + 0.9, size)
    axes = figure.subplots()
    shown = axes.imshow(share, cmap="Blues", vmin=0.0, vmax=1.0)
    for (row, column), count in np.ndenumerate(counts):
        ink = "white" if share[row, column] > 0.55 else "black"
        words = f"{count}\n{share[row, column]:.0%}"
        axes.text(column, row, words, ha="center", va="center", color=ink, fontsize=9)
    axes.set_xticks(
        range(len(names)), names, rotation=30 if len(names) > 3 else 0, ha="right" if len(names) > 3 else "center"
    )
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="predicted", ylabel="truth")
    figure.colorbar(shown, ax=axes, label="share of the true class", fraction=0.046)
    return save(figure, path)


def froc_png(entries: Mapping[str, Mapping[str, Any]], path: Path) -> Path:
    """Draw the points of a FROC curve that make up the CPM, with their intervals, on the usual logarithmic axis.

    Args:
        entries: of :meth:`mg3d.metrics.froc.FrocResult.entries`: ``cpm`` and ``froc@RATE``; others are passed over.
        path: PNG to write.

    Returns:
        the path.

    Raises:
        ValueError: no point with a value.
    """
    points = {float(name.removeprefix(FROC)): each for name, each in entries.items() if name.startswith(FROC)}
    points = {rate: each for rate, each in sorted(points.items()) if each["mean"] is not None}
    if not points:
        raise ValueError(f"no {FROC}RATE with a value among {', '.join(entries)}")
    figure = new_figure(6.4, 4.6)
    axes = figure.subplots()
    rates, values = list(points), [each["mean"] for each in points.values()]
    cpm = entries.get("cpm", {}).get("mean")
    axes.plot(rates, values, "o-", color=colour(6), label="sensitivity" if cpm is None else f"mean (CPM) {cpm:.3f}")
    known = {rate: each["ci95"] for rate, each in points.items() if each["ci95"]}
    if known:
        low, high = np.array(list(known.values())).T
        axes.vlines(list(known), low, high, color=colour(6), linewidth=1, label="95 % interval over scans")
    axes.set_xscale("log", base=2)
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.minorticks_off()
    axes.set(xlabel="false positives per scan", ylabel="sensitivity", ylim=(-0.02, 1.02))
    axes.set_title(f"{next(iter(points.values()))['n']} scans", fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(loc="lower right", fontsize=8)
    return save(figure, path)


def curves_png(metrics_jsonl: Path, path: Path) -> Path | None:
    """Draw loss, validation metrics and learning rate over the optimizer steps.

    Args:
        metrics_jsonl: the run's ``metrics.jsonl``: objects with ``step`` and ``loss``, ``lr``, ``val/...`` where known;
            those of ``validation.jsonl`` beside it are added.
        path: PNG to write.

    Returns:
        the path, or None when the file holds no step yet.
    """
    records = [*_records(metrics_jsonl), *_records(metrics_jsonl.with_name("validation.jsonl"))]
    losses = _series(records, "loss")
    validation = {key: _series(records, key) for key in _validation_keys(records)}
    rates = _learning_rates(records)
    panels: list[Callable[[Any], None]] = []
    if losses:
        panels.append(partial(_losses, losses=losses))
    if validation:
        panels.append(partial(_validations, validation=validation))
    if rates:
        panels.append(partial(_rates, rates=rates))
    if not panels:
        return None
    figure = new_figure(4.6 * len(panels), 3.6)
    for axes, draw in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
        draw(axes)
        axes.set_xlabel("optimizer step")
        axes.grid(alpha=0.25)
    return save(figure, path)


def _records(path: Path) -> list[dict[str, Any]]:
    """Objects of a JSONL file; a last line cut by a kill is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return [record for record in records if isinstance(record, dict) and "step" in record]


def _series(records: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    pairs = [(record["step"], record[key]) for record in records if isinstance(record.get(key), (int, float))]
    return [(float(step), float(value)) for step, value in pairs if math.isfinite(value)]


def _validation_keys(records: Sequence[Mapping[str, Any]]) -> list[str]:
    keys = dict.fromkeys(key for record in records for key in record if key.startswith("val/"))
    return [key for key in keys if key != "val/the_metric" and _series(records, key)]


def _learning_rates(records: Sequence[Mapping[str, Any]]) -> list[tuple[float, float, float]]:
    """Step with the smallest and largest rate of the parameter groups."""
    found = []
    for record in records:
        given = record.get("lr")
        rates = given if isinstance(given, list) else [given]
        numbers = [float(rate) for rate in rates if isinstance(rate, (int, float))]
        if numbers:
            found.append((float(record["step"]), min(numbers), max(numbers)))
    return found


def _losses(axes: Any, losses: list[tuple[float, float]]) -> None:
    steps, values = np.array(losses).T
    many = len(values) >= SMOOTHED_FROM
    axes.plot(steps, values, color=colour(6), alpha=0.35 if many else 1.0, linewidth=1, marker="" if many else ".")
    if many:
        width = max(len(values) // 20, 5)
        smooth = np.convolve(values, np.ones(width) / width, mode="valid")
        axes.plot(steps[width - 1 :], smooth, color=colour(6), label=f"mean of the last {width} steps")
        axes.legend(fontsize=8)
    axes.set_title("training loss", fontsize=10)


def _validations(axes: Any, validation: Mapping[str, list[tuple[float, float]]]) -> None:
    for k, (key, pairs) in enumerate(validation.items()):
        steps, values = np.array(pairs).T
        axes.plot(steps, values, color=colour(k), marker=".", label=key.removeprefix("val/"))
    axes.set_title("validation", fontsize=10)
    axes.legend(fontsize=8)


def _rates(axes: Any, rates: list[tuple[float, float, float]]) -> None:
    steps, low, high = np.array(rates).T
    axes.plot(steps, high, color=colour(2))
    if (low < high).any():
        axes.fill_between(steps, low, high, color=colour(2), alpha=0.25, label="range over the parameter groups")
        axes.legend(fontsize=8)
    axes.set_title("learning rate", fontsize=10)
