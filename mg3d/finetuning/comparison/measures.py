"""A headline figure of a run from its rows, as a function of case weights, so that two runs can be compared in pairs.

n rows, R bootstrap rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mg3d.metrics.classification import weighted_binary, weighted_multiclass
from mg3d.metrics.patients import weighted_stoic

__all__ = ["HEADLINES", "headline", "measure_rows", "row_key"]

Row = Mapping[str, str]
Measure = Callable[[np.ndarray], np.ndarray]
HEADLINES = {
    "Luna16": "auroc",
    "cc-ccii": "accuracy",
    "stoic2021": "aucSevere",
    "CTRG": "bleu_4",
}
"""Benchmarks whose headline figure is not the first of `_USUAL` that they have (spec downstream 0.1)."""
_USUAL = ("dice", "auroc", "macro_auroc", "accuracy")


def headline(benchmark: str, metrics: Mapping[str, Any]) -> str:
    """Name of the figure that a benchmark is compared by; empty when a run has none."""
    candidates = (HEADLINES.get(benchmark, ""), *_USUAL)
    return next((name for name in candidates if isinstance(metrics.get(name), Mapping)), "")


def row_key(row: Row) -> tuple[str, str]:
    """What tells the rows of a run apart: the case, and in segmentation the class."""
    return row["id"], row.get("class", "")


def measure_rows(rows: Sequence[Row], metric: str) -> Measure | None:
    """The figure of rows as a function of their weights [R, n] -> [R]; None for figures that rows do not give.

    Args:
        rows: lines of ``per_case.csv``.
        metric: name of the figure, as in ``metrics.json``.
    """
    if not rows:
        return None
    if "class" in rows[0] and metric in rows[0]:
        return _class_mean(rows, metric)
    outputs = [name for name in rows[0] if name.startswith("prob_")]
    if not outputs:
        return None
    probs = np.asarray([[float(row[name]) for name in outputs] for row in rows])
    named = [name for name in rows[0] if name == "target" or name.startswith("target_")]
    targets = np.asarray([[int(float(row[name])) for name in named] for row in rows])
    if metric.startswith(("aucSevere", "aucCOVID", "accSevere", "accCOVID")) and probs.shape[1] == 2:
        return lambda weights: weighted_stoic(probs, targets, weights)[metric]
    if len(named) == 1 and len(outputs) > 1:
        return _chosen(lambda weights: weighted_multiclass(probs, targets[:, 0], weights), metric, len(rows))
    if len(named) != len(outputs):
        return None
    each = [_chosen(_of_output(probs[:, k], targets[:, k]), metric, len(rows)) for k in range(len(outputs))]
    known = [measure for measure in each if measure is not None]
    return (lambda weights: np.mean([measure(weights) for measure in known], axis=0)) if known else None


def _of_output(probs: np.ndarray, targets: np.ndarray) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    return lambda weights: weighted_binary(probs, targets, weights)


def _chosen(compute: Callable[[np.ndarray], dict[str, np.ndarray]], metric: str, count: int) -> Measure | None:
    if metric not in compute(np.ones((1, count))):
        return None
    return lambda weights: compute(weights)[metric]


def _class_mean(rows: Sequence[Row], metric: str) -> Measure:
    """Mean over the classes of each class's mean over finite values, as in ``metrics.json``."""
    values = np.asarray([float(row[metric] or "nan") for row in rows])
    known = np.isfinite(values)
    classes = sorted({row["class"] for row in rows})
    of_class = np.asarray([[row["class"] == name for name in classes] for row in rows])
    filled = np.where(known, values, 0.0)[:, None] * of_class
    counted = known[:, None] & of_class

    def measure(weights: np.ndarray) -> np.ndarray:
        total, count = weights @ filled, weights @ counted
        means = np.where(count > 0, total / np.where(count > 0, count, 1.0), 0.0)
        defined = (count > 0).sum(1)
        return np.where(defined > 0, means.sum(1) / np.maximum(defined, 1), np.nan)

    return measure
