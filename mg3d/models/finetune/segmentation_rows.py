"""Rows of ``per_case.csv`` in segmentation: one a case and class.

Columns: the tags, ``id``, ``patient``, ``class``, ``volume_ml`` (predicted), ``truth_volume_ml`` and the scores. Dice
without the structure in the truth is NaN and left out of means, see `mg3d.metrics.segmentation`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mg3d.metrics.segmentation import score_label_maps

if TYPE_CHECKING:
    from mg3d.finetuning.benchmark import Case, SegmentationTask

__all__ = ["class_means", "dice_rows", "scored_rows"]

_PLANES = 32


def dice_rows(
    case: Case, truth: np.ndarray, found: np.ndarray, spacing_mm: Sequence[float], task: SegmentationTask
) -> list[dict[str, Any]]:
    """Rows with Dice alone, in one pass over the label maps.

    Args:
        case: the case.
        truth: class indices [X,Y,Z].
        found: predicted class indices of the same shape.
        spacing_mm: voxel size along the axes.
        task: names the classes.
    """
    table = _pairs(truth, found, len(task.classes) + 1)
    voxel_ml = math.prod(spacing_mm) / 1000
    rows = []
    for index, name in enumerate(task.classes, start=1):
        in_truth, in_found = int(table[index].sum()), int(table[:, index].sum())
        dice = 2 * int(table[index, index]) / (in_truth + in_found) if in_truth else math.nan
        rows.append(_row(case, name, in_found * voxel_ml, in_truth * voxel_ml, {"dice": dice}))
    return rows


def scored_rows(
    case: Case, truth: np.ndarray, found: np.ndarray, spacing_mm: Sequence[float], task: SegmentationTask
) -> list[dict[str, Any]]:
    """Rows with all scores, surface distances included (arguments as `dice_rows`)."""
    names = dict(enumerate(task.classes, start=1))
    scores = score_label_maps(truth, found, spacing_mm, names, tolerances_mm=task.tolerances_mm)
    rows = dice_rows(case, truth, found, spacing_mm, task)
    return [{**row, **scores[row["class"]]} for row in rows]


def class_means(rows: Iterable[Mapping[str, Any]], score: str) -> dict[str, float]:
    """Mean of a score by class over the cases where it is defined; classes without any are absent."""
    found: dict[str, list[float]] = {}
    for row in rows:
        value = float(row[score])
        if math.isfinite(value):
            found.setdefault(str(row["class"]), []).append(value)
    return {name: math.fsum(values) / len(values) for name, values in found.items()}


def _pairs(truth: np.ndarray, found: np.ndarray, labels: int) -> np.ndarray:
    """How often true label i meets predicted label j, [i, j]; a few planes at a time."""
    counts = np.zeros(labels**2, dtype=np.int64)
    for first in range(0, len(truth), _PLANES):
        block = slice(first, first + _PLANES)
        index = truth[block].astype(np.int64) * labels + found[block]
        counts += np.bincount(index.ravel(), minlength=labels**2)
    return counts.reshape(labels, labels)


def _row(case: Case, name: str, volume_ml: float, truth_ml: float, scores: Mapping[str, float]) -> dict[str, Any]:
    place = {**case.tags, "id": case.id, "patient": case.patient, "class": name}
    return {**place, "volume_ml": volume_ml, "truth_volume_ml": truth_ml, **scores}
