"""The files in which CT-CLIP's scripts leave labels and probabilities (spec downstream 7.6).

n cases, L findings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mg3d.files import write_csv
from mg3d.metrics.classification import auroc

__all__ = ["positive_weights", "write_label_tables"]


def write_label_tables(folder: Path, rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    """Write ``labels_weights.npz``, ``predicted_weights.npz`` (key ``data``), ``accessions.txt`` and ``aurocs.csv``.

    Args:
        folder: made if absent.
        rows: of ``per_case.csv`` with ``target_<name>`` and ``prob_<name>``.
        names: L findings.
    """
    folder.mkdir(exist_ok=True)
    truth, found = (
        np.asarray([[row[f"{part}_{name}"] for name in names] for row in rows]) for part in ("target", "prob")
    )
    np.savez(folder / "labels_weights.npz", data=truth)
    np.savez(folder / "predicted_weights.npz", data=found)
    (folder / "accessions.txt").write_text("".join(f"{row['id']}.nii.gz\n" for row in rows), encoding="utf-8")
    areas = [_cell(p, t) for p, t in zip(found.T, truth.T, strict=True)]
    write_csv(folder / "aurocs.csv", [f"{name}_auc" for name in names], [areas])


def _cell(probabilities: np.ndarray, truth: np.ndarray) -> float | str:
    """AUROC; empty where it is undefined."""
    value = float("nan") if np.isnan(probabilities).all() else auroc(probabilities, truth)
    return value if np.isfinite(value) else ""


def positive_weights(labels: np.ndarray) -> tuple[float, ...]:
    """Negatives over positives of every finding, the weight of positives in a loss; 1 where one of them is missing.

    Args:
        labels: [n, L]; 1 present, 0 absent, others unknown.
    """
    positive, negative = (labels == 1).sum(axis=0), (labels == 0).sum(axis=0)
    return tuple(float(n / p) if p and n else 1.0 for p, n in zip(positive, negative, strict=True))
