"""Figures of a validation epoch, and which of them chooses the best one.

Pure numpy: n cases, K outputs, T targets (one class index, or K values 0, 1 or -1 unknown). NaN is an undefined figure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from mg3d.errors import ConfigError
from mg3d.metrics.classification import auroc

if TYPE_CHECKING:
    from mg3d.finetuning.benchmark import ClassificationTask

__all__ = ["figures", "macro_f1", "mean_auroc", "monitored"]


def figures(
    task: ClassificationTask, ids: Sequence[str], probabilities: np.ndarray, targets: np.ndarray
) -> dict[str, float]:
    """Figures of the cases: ``auroc``, ``accuracy``, ``macro_f1``, and those of the benchmark (``task.metrics``).

    Args:
        task: what is predicted.
        ids: [n].
        probabilities: [n, K].
        targets: [n, T].
    """
    truth = _one_hot(targets[:, 0], len(task.outputs)) if task.kind == "multiclass" else targets
    found = {"auroc": mean_auroc(probabilities, truth)}
    if task.kind == "multiclass":
        predicted = probabilities.argmax(axis=1)
        found["accuracy"] = float((predicted == targets[:, 0]).mean())
        found["macro_f1"] = macro_f1(predicted, targets[:, 0], len(task.outputs))
    else:
        known = np.isin(targets, (0, 1))
        right = (probabilities >= 0.5) == (targets == 1)
        found["accuracy"] = float(right[known].mean()) if known.any() else float("nan")
        found["macro_f1"] = _mean([_binary_f1(p, t) for p, t in zip(probabilities.T, targets.T, strict=True)])
    if task.metrics is not None:
        found |= {name: float(value) for name, value in task.metrics(list(ids), probabilities, targets).items()}
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


def mean_auroc(probabilities: np.ndarray, truth: np.ndarray) -> float:
    """Mean area under the ROC curve over the outputs where it is defined.

    Args:
        probabilities: [n, K].
        truth: [n, K] of 0 and 1; other values leave a case out.
    """
    return _mean([auroc(scores, values) for scores, values in zip(probabilities.T, truth.T, strict=True)])


def macro_f1(predicted: np.ndarray, targets: np.ndarray, num_classes: int) -> float:
    """Mean F1 over the classes; a class that is neither present nor predicted is left out.

    Args:
        predicted: [n] class indices.
        targets: [n] class indices.
        num_classes: K.
    """
    scores = []
    for index in range(num_classes):
        hits = float(((predicted == index) & (targets == index)).sum())
        size = float((predicted == index).sum() + (targets == index).sum())
        scores.append(2 * hits / size if size else float("nan"))
    return _mean(scores)


def _binary_f1(probabilities: np.ndarray, targets: np.ndarray) -> float:
    known = np.isin(targets, (0, 1))
    predicted, truth = probabilities[known] >= 0.5, targets[known] == 1
    size = float(predicted.sum() + truth.sum())
    return 2 * float((predicted & truth).sum()) / size if size else float("nan")


def _one_hot(classes: np.ndarray, count: int) -> np.ndarray:
    return (classes[:, None] == np.arange(count)).astype(np.int64)


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if np.isfinite(value)]
    return float(np.mean(finite)) if finite else float("nan")
