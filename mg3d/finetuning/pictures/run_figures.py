"""The pictures that belong to a finished run, chosen by what its rows hold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from mg3d.finetuning.pictures.canvas import colour, new_figure, save
from mg3d.finetuning.pictures.curves import FROC, confusion_png, curves_png, froc_png, roc_pr_png
from mg3d.finetuning.pictures.overlay import best_median_worst, overlay_png
from mg3d.metrics.classification import confusion_matrix

FOLDER = "pictures"
Rows = Sequence[Mapping[str, Any]]


def draw_run_figures(run_dir: Path, rows: Rows, metrics: Mapping[str, Any] | None = None) -> dict[str, Path]:
    """Draw what a run's rows, metrics and step log can show, into ``run_dir/pictures``.

    Training curves from ``metrics.jsonl``; for classification rows (``target`` or ``target_NAME``, ``prob_NAME``) ROC
    and precision-recall curves and confusion matrices; for segmentation rows (``class``, ``dice``) the scores of all
    cases; for metrics with ``froc@RATE`` the FROC points.

    Args:
        run_dir: folder of the run.
        rows: rows of ``per_case.csv``; numbers may be text.
        metrics: content of ``metrics.json``.

    Returns:
        caption -> PNG, in the order of a report.
    """
    folder = run_dir / FOLDER
    figures: dict[str, Path] = {}
    if any(name.startswith(FROC) and entry["mean"] is not None for name, entry in (metrics or {}).items()):
        figures["Free-response ROC"] = froc_png(metrics or {}, folder / "froc.png")
    if rows and "dice" in rows[0]:
        figures["Dice of every case, with the median of each class"] = case_scores_png(
            rows, "dice", folder / "dice.png"
        )
    if rows and any(name.startswith("prob_") for name in rows[0]):
        figures |= _classification(rows, folder)
    curves = curves_png(run_dir / "metrics.jsonl", folder / "training.png")
    if curves is not None:
        figures["Training"] = curves
    return figures


def draw_overlays(
    run_dir: Path,
    rows: Rows,
    files: Mapping[str, tuple[Path, Path, Path]],
    classes: Sequence[str],
    label_map: Mapping[int, int],
    *,
    window: tuple[float, float] | None = None,
    metric: str = "dice",
) -> dict[str, Path]:
    """Draw the best, the median and the worst case with the contours of truth and prediction.

    Args:
        run_dir: folder of the run; the pictures go to ``pictures`` in it.
        rows: rows of ``per_case.csv``.
        files: case id -> files of image, truth and prediction on one grid; cases that are not named are not drawn.
        classes: names of the foreground classes.
        label_map: label in the file of the truth -> class index (0 background); the prediction's file has class
            indices.
        window: grey values shown as black and white; None takes percentiles.
        metric: column that ranks the cases.

    Returns:
        caption -> PNG.
    """
    figures = {}
    for role, case in best_median_worst([row for row in rows if str(row["id"]) in files], metric).items():
        scores = {str(row.get("class", "")): _number(row.get(metric)) for row in rows if str(row["id"]) == case}
        shown = ", ".join(f"{name} {value:.3f}" for name, value in scores.items() if math.isfinite(value))
        title = f"{role} case {case}: {metric} {shown}"
        image, truth, pred = files[case]
        path = run_dir / FOLDER / f"overlay_{role}.png"
        figures[title] = overlay_files_png(image, truth, pred, classes, label_map, path, title=title, window=window)
    return figures


def overlay_files_png(
    image: Path,
    truth: Path,
    pred: Path,
    classes: Sequence[str],
    label_map: Mapping[int, int],
    path: Path,
    *,
    title: str = "",
    window: tuple[float, float] | None = None,
) -> Path:
    """Draw :func:`~mg3d.finetuning.pictures.overlay.overlay_png` from files.

    Args:
        image: scan in any format of the project.
        truth: label map on its grid, with the labels of the data set.
        pred: label map on its grid, with class indices.
        classes: names of the foreground classes.
        label_map: label of the truth -> class index.
        path: PNG to write.
        title: line above the picture.
        window: grey values shown as black and white.

    Returns:
        the path.
    """
    from mg3d.scans.label_maps import grid_affine, on_axes_of, whole_labels
    from mg3d.scans.read import read_scan

    scan, true, found = (read_scan(file) for file in (image, truth, pred))
    raw, _ = on_axes_of(whole_labels(true, truth), grid_affine(true), grid_affine(scan))
    mapped = np.zeros(raw.shape, dtype=np.uint8)
    for label, index in label_map.items():
        mapped[raw == label] = index
    return overlay_png(
        scan.voxels_xyz * scan.slope + scan.intercept,
        mapped,
        found.voxels_xyz,
        scan.spacing_mm or (1.0, 1.0, 1.0),
        classes,
        path,
        orientation="".join(nib.aff2axcodes(scan.affine)),
        title=title,
        window=window,
    )


def case_scores_png(rows: Rows, metric: str, path: Path) -> Path:
    """Draw one score of every case, a column of dots for each class.

    Args:
        rows: rows of ``per_case.csv`` with the metric and perhaps ``class``.
        metric: column to draw; undefined and infinite values are counted below the name of the class.
        path: PNG to write.

    Returns:
        the path.
    """
    by_class: dict[str, list[float]] = {}
    for row in rows:
        by_class.setdefault(str(row.get("class", "")), []).append(_number(row.get(metric)))
    figure = new_figure(max(3.4, 1.2 + 1.15 * len(by_class)), 3.8)
    axes = figure.subplots()
    names = []
    for k, (name, values) in enumerate(by_class.items()):
        known = np.array([value for value in values if math.isfinite(value)])
        spread = np.random.default_rng(0).uniform(-0.18, 0.18, len(known))
        axes.plot(k + spread, known, "o", color=colour(k), markersize=4, alpha=0.7)
        if len(known):
            axes.hlines(np.median(known), k - 0.3, k + 0.3, color="black", linewidth=1.5)
        missing = len(values) - len(known)
        names.append(f"{name}\nn = {len(known)}" + (f", {missing} without" if missing else ""))
    axes.set_xticks(range(len(names)), names, fontsize=8)
    axes.set(ylabel=metric, xlim=(-0.6, len(names) - 0.4))
    if metric in ("dice", "iou") or metric.startswith("nsd"):
        axes.set_ylim(-0.03, 1.03)
    axes.grid(axis="y", alpha=0.25)
    return save(figure, path)


def _classification(rows: Rows, folder: Path) -> dict[str, Path]:
    columns = [name for name in rows[0] if name.startswith("prob_")]
    names = [name.removeprefix("prob_") for name in columns if any(math.isfinite(_number(r[name])) for r in rows)]
    probs = np.array([[_number(row[f"prob_{name}"]) for name in names] for row in rows])
    if "target" in rows[0]:
        targets = np.array([int(_number(row["target"])) for row in rows])
    else:
        targets = np.array([[int(_number(row[f"target_{name}"])) for name in names] for row in rows])
    figures = {"ROC and precision-recall curves": roc_pr_png(probs, targets, names, folder / "roc_pr.png")}
    if targets.ndim == 1 and len(names) > 1:
        counts = confusion_matrix(targets, probs.argmax(axis=1), len(names))
        return figures | {"Confusion matrix": confusion_png(counts, names, folder / "confusion.png")}
    for k, name in enumerate(names):
        target = targets.reshape(len(rows), -1)[:, k]
        known = np.isin(target, (0, 1))
        counts = confusion_matrix(target[known], (probs[known, k] >= 0.5).astype(int), 2)
        path = confusion_png(counts, [f"no {name}", name], folder / f"confusion_{k}.png")
        figures[f"Confusion matrix of {name} at 0.5"] = path
    return figures


def _number(value: Any) -> float:
    return float(value) if value not in (None, "") else math.nan
