"""The rows of two runs, matched and compared; see ``tools/compare_runs.py``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from mg3d.errors import DataError
from mg3d.files import read_csv
from mg3d.metrics.classification import weighted_binary, weighted_multiclass
from mg3d.metrics.paired import Comparison, compare_rows, paired_difference

Rows = list[dict[str, str]]
Measure = Callable[[np.ndarray], np.ndarray]
BINARY_SCORES = ("auroc", "ap", "accuracy")
CLASS_SCORES = ("accuracy", "macro_f1", "macro_auroc")
PROBABILITY, TARGET = "prob_", "target"


def read_rows(path: Path) -> Rows:
    """Rows of a ``per_case.csv``.

    Args:
        path: the file.

    Returns:
        a dictionary of texts per row.

    Raises:
        DataError: no table with an ``id`` column, or no row.
    """
    rows = list(read_csv(path, whole_rows=True).rows)
    if not rows or "id" not in rows[0]:
        raise DataError("no rows with an id column", "name the per_case.csv of a run", path=str(path))
    return rows


def compare(
    rows_a: Rows, rows_b: Rows, metrics: Sequence[str] | None = None, rounds: int = 2000, seed: int = 0
) -> dict[str, Comparison]:
    """Compare two runs of the same benchmark.

    Args:
        rows_a: rows of run A.
        rows_b: rows of run B.
        metrics: columns of segmentation rows; None takes the usual ones.
        rounds: bootstrap rounds.
        seed: seed of the draws.

    Returns:
        ``SCORE`` or ``SCORE/CLASS`` -> comparison.

    Raises:
        DataError: the runs have other columns, classes or targets, or share no case.
    """
    try:
        if any(name.startswith(PROBABILITY) for name in rows_a[0]):
            return _classification(rows_a, rows_b, rounds, seed)
        return _segmentation(rows_a, rows_b, metrics or _scores(rows_a[0]), rounds, seed)
    except ValueError as problem:
        raise DataError(str(problem), "compare runs of one benchmark and one test set") from problem


def _scores(row: dict[str, str]) -> list[str]:
    usual = [name for name in row if name in ("dice", "iou", "hd95", "assd") or name.startswith("nsd@")]
    if not usual:
        raise ValueError(f"no score among the columns {', '.join(row)}")
    return usual


def _segmentation(rows_a: Rows, rows_b: Rows, metrics: Sequence[str], rounds: int, seed: int) -> dict[str, Comparison]:
    found = {}
    classes = list(dict.fromkeys(row.get("class", "") for row in rows_a))
    for metric in metrics:
        for name in classes:
            parts = [[row for row in rows if row.get("class", "") == name] for rows in (rows_a, rows_b)]
            key = f"{metric}/{name}" if name else metric
            found[key] = compare_rows(parts[0], parts[1], metric, rounds=rounds, seed=seed)
    return found


def _classification(rows_a: Rows, rows_b: Rows, rounds: int, seed: int) -> dict[str, Comparison]:
    names = [name.removeprefix(PROBABILITY) for name in rows_a[0] if name.startswith(PROBABILITY)]
    targets = [name for name in rows_a[0] if name == TARGET or name.startswith(f"{TARGET}_")]
    missing = [name for name in rows_a[0] if name.startswith((PROBABILITY, TARGET)) and name not in rows_b[0]]
    if missing or not targets:
        raise ValueError(f"run B has no column {', '.join(missing) or TARGET}")
    table_a, table_b = ({row["id"]: row for row in rows} for rows in (rows_a, rows_b))
    ids = sorted(set(table_a) & set(table_b))
    if not ids:
        raise ValueError(f"the runs share no case: {rows_a[0]['id']} ... against {rows_b[0]['id']} ...")
    truth, other = (np.array([[float(table[i][t]) for t in targets] for i in ids]) for table in (table_a, table_b))
    if not np.array_equal(truth, other):
        raise ValueError(f"case {ids[int(np.argmax((truth != other).any(axis=1)))]} has other targets in run B")
    patients = [table_a[i].get("patient") or i for i in ids]
    probs = [np.array([[float(t[i][PROBABILITY + n]) for n in names] for i in ids]) for t in (table_a, table_b)]
    left_out = len(set(table_a) ^ set(table_b))
    found = {}
    for name, (first, second) in _measures(probs, truth.astype(int), names).items():
        comparison = paired_difference(first, second, patients, rounds, seed)
        found[name] = Comparison(**vars(comparison) | {"left_out": left_out})
    return found


def _measures(probs: Sequence[np.ndarray], truth: np.ndarray, names: Sequence[str]) -> dict[str, list[Measure]]:
    """Score -> the measure of either run."""
    if truth.shape[1] == 1 and len(names) > 1:
        return {score: [partial(_of_classes, p, truth[:, 0], score) for p in probs] for score in CLASS_SCORES}
    return {
        f"{score}/{name}": [partial(_of_output, p[:, k], truth[:, k], score) for p in probs]
        for score in BINARY_SCORES
        for k, name in enumerate(names)
    }


def _of_classes(probs: np.ndarray, targets: np.ndarray, score: str, weights: np.ndarray) -> np.ndarray:
    return weighted_multiclass(probs, targets, weights)[score]


def _of_output(probs: np.ndarray, targets: np.ndarray, score: str, weights: np.ndarray) -> np.ndarray:
    return weighted_binary(probs, targets, weights, false_positive_rates=())[score]
