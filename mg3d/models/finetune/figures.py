"""Figures of a validation epoch, and which of them chooses the best one.

Pure numpy: n cases, K outputs, T targets (one class index, or K values 0, 1 or -1 unknown). NaN is an undefined figure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from mg3d.errors import ConfigError
from mg3d.metrics.classification import binary_report, multiclass_report

if TYPE_CHECKING:
    from mg3d.finetuning.benchmark import ClassificationTask

__all__ = ["figures", "monitored"]


def figures(
    task: ClassificationTask, ids: Sequence[str], probabilities: np.ndarray, targets: np.ndarray
) -> dict[str, float]:
    """Figures of the cases: ``auroc``, ``accuracy``, ``macro_f1``, and those of the benchmark itself.

    Binary outputs: each is the mean over the outputs where it is defined. Classes: the AUROC is the mean of one class
    against the rest.

    Args:
        task: what is predicted.
        ids: [n].
        probabilities: [n, K].
        targets: [n, T].
    """
    if task.kind == "multiclass":
        report = multiclass_report(probabilities, targets[:, 0], task.outputs)
        found = {"auroc": report["macro_auroc"], "accuracy": report["accuracy"], "macro_f1": report["macro_f1"]}
    else:
        reports = [
            binary_report(scores, values, false_positive_rates=())
            for scores, values in zip(probabilities.T, targets.T, strict=True)
        ]
        names = {"auroc": "auroc", "accuracy": "accuracy", "macro_f1": "f1"}
        found = {name: _mean([report[theirs] for report in reports]) for name, theirs in names.items()}
    if task.metrics is not None:
        found |= {name: float(value) for name, value in task.metrics(list(ids), probabilities, targets).items()}
    if task.entries is not None:
        means = {name: entry["mean"] for name, entry in task.entries(list(ids), probabilities, targets, 0, 0).items()}
        found |= {name: float("nan") if mean is None else float(mean) for name, mean in means.items()}
    return found


def monitored(task: ClassificationTask, found: Mapping[str, float]) -> float:
    """The figure that chooses the best epoch (higher is better); NaN where there is none.

    Raises:
        ConfigError: ``task.monitor`` names no figure.
    """
    auto = "accuracy" if task.kind == "multiclass" else "auroc"
    name = auto if task.monitor == "auto" else task.monitor
    if name not in found and "auroc" in found:
        raise ConfigError(f"monitor={name!r} is no figure of this benchmark", f"choose one of {', '.join(found)}")
    return found.get(name, float("nan"))


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if np.isfinite(value)]
    return float(np.mean(finite)) if finite else float("nan")
