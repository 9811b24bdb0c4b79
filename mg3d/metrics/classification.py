"""Classification scores for the whole set and all bootstrap rounds at once.

Every ``weighted_*`` function takes case weights [R, n], one row per bootstrap round, and returns R values, so that an
interval costs one matrix operation. The reports are the same with all weights one.

Policy, the same everywhere: recall, AUROC and average precision of a class that the targets do not hold are NaN, and so
are precision and F1 of a class that is neither there nor predicted; NaN is left out of every mean over classes. A class
that is there but never predicted has precision 0, one that is predicted but not there has precision and F1 0. Without
NaN all values equal those of scikit-learn. Ties count one half in the AUROC and are passed in one step by curves.
Scores must be finite: NaN is an error, not a low score.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

FALSE_POSITIVE_RATES = (0.01, 0.05, 0.1, 0.2)


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Quotient, NaN where the denominator is 0."""
    return np.where(whole > 0, part / np.where(whole > 0, whole, 1.0), np.nan)


def _by_threshold(scores: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weight of the positive and negative cases [R, G] at each of the G distinct scores, highest score first."""
    scores, targets = np.asarray(scores, dtype=np.float64), np.asarray(targets)
    if not scores.shape == targets.shape == weights.shape[1:]:
        raise ValueError(f"scores {scores.shape}, targets {targets.shape} and weights {weights.shape} do not agree")
    if not np.isfinite(scores).all():
        raise ValueError("scores hold NaN or infinity: the model's outputs are broken")
    order = np.argsort(-scores, kind="stable")
    if not len(order):
        return np.zeros((len(weights), 0)), np.zeros((len(weights), 0))
    starts = np.flatnonzero(np.diff(scores[order], prepend=np.inf))
    sums = (np.add.reduceat((weights * (targets == value))[:, order], starts, axis=1) for value in (1, 0))
    positive, negative = sums
    return positive, negative


def weighted_auroc(scores: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Probability that a positive case scores above a negative one; ties count one half.

    Args:
        scores: [n] real values, higher means more likely present.
        targets: [n] with 1 present and 0 absent; any other value leaves the case out.
        weights: [R, n] case weights, one row per bootstrap round.

    Returns:
        [R] values in [0, 1]; NaN in rounds where one of the classes has no weight.

    Raises:
        ValueError: if the lengths disagree or a score is not finite.
    """
    positive, negative = _by_threshold(scores, targets, weights)
    below = negative.sum(1, keepdims=True) - np.cumsum(negative, axis=1)
    wins = (positive * (below + 0.5 * negative)).sum(1)
    return _ratio(wins, positive.sum(1) * negative.sum(1))


def auroc(scores: np.ndarray, targets: np.ndarray) -> float:
    """Area under the ROC curve of one finding.

    Args:
        scores: [n] real values.
        targets: [n] with 1 present and 0 absent; other values are left out.

    Returns:
        The area, or NaN when one class is missing.
    """
    return float(weighted_auroc(scores, targets, np.ones((1, len(np.asarray(scores)))))[0])


def weighted_average_precision(scores: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Area under the precision-recall curve as a sum of steps, without interpolation.

    Args:
        scores: [n] real values.
        targets: [n] with 1 present and 0 absent; other values are left out.
        weights: [R, n] case weights.

    Returns:
        [R] values in [0, 1]; NaN in rounds without a positive case.

    Raises:
        ValueError: if the lengths disagree or a score is not finite.
    """
    positive, negative = _by_threshold(scores, targets, weights)
    found = np.cumsum(positive, axis=1)
    precision = np.nan_to_num(_ratio(found, found + np.cumsum(negative, axis=1)))
    return _ratio((positive * precision).sum(1), positive.sum(1))


def average_precision(scores: np.ndarray, targets: np.ndarray) -> float:
    """Average precision of one finding; NaN without a positive case (see :func:`weighted_average_precision`)."""
    return float(weighted_average_precision(scores, targets, np.ones((1, len(np.asarray(scores)))))[0])


def curve_points(scores: np.ndarray, targets: np.ndarray) -> dict[str, np.ndarray]:
    """Operating points of every distinct threshold, from "nothing is positive" on.

    Args:
        scores: [n] real values.
        targets: [n] with 1 present and 0 absent; other values are left out.

    Returns:
        ``threshold`` (first infinite), ``fpr``, ``sensitivity`` and ``precision`` (first 1), all [G + 1].
    """
    ones = np.ones((1, len(np.asarray(scores))))
    positive, negative = (part[0] for part in _by_threshold(scores, targets, ones))
    found, false = (np.concatenate([[0.0], np.cumsum(part)]) for part in (positive, negative))
    precision = _ratio(found, found + false)
    precision[0] = 1.0
    thresholds = np.concatenate([[np.inf], np.unique(np.asarray(scores, dtype=np.float64))[::-1]])
    return {
        "threshold": thresholds,
        "fpr": _ratio(false, np.full_like(false, false[-1])),
        "sensitivity": _ratio(found, np.full_like(found, found[-1])),
        "precision": precision,
    }


def weighted_sensitivity_at_fpr(
    scores: np.ndarray, targets: np.ndarray, weights: np.ndarray, false_positive_rate: float
) -> np.ndarray:
    """Highest sensitivity of a threshold whose false positive rate does not exceed the given one.

    Args:
        scores: [n] real values.
        targets: [n] with 1 present and 0 absent; other values are left out.
        weights: [R, n] case weights.
        false_positive_rate: in [0, 1].

    Returns:
        [R] values in [0, 1]; NaN in rounds where one of the classes has no weight.

    Raises:
        ValueError: if the lengths disagree, a score is not finite, or the rate is no rate.
    """
    if not 0.0 <= false_positive_rate <= 1.0:
        raise ValueError(f"a false positive rate lies between 0 and 1, got {false_positive_rate}")
    positive, negative = _by_threshold(scores, targets, weights)
    allowed = false_positive_rate * negative.sum(1, keepdims=True) * (1 + 1e-12)
    within = np.cumsum(negative, axis=1) <= allowed
    found = (positive * within).sum(1)
    return np.where(negative.sum(1) > 0, _ratio(found, positive.sum(1)), np.nan)


def sensitivity_at_fpr(scores: np.ndarray, targets: np.ndarray, false_positive_rate: float) -> float:
    """Highest sensitivity at no more than the given false positive rate (see the weighted function)."""
    ones = np.ones((1, len(np.asarray(scores))))
    return float(weighted_sensitivity_at_fpr(scores, targets, ones, false_positive_rate)[0])


def weighted_binary(
    scores: np.ndarray,
    targets: np.ndarray,
    weights: np.ndarray,
    *,
    threshold: float = 0.5,
    false_positive_rates: Sequence[float] = FALSE_POSITIVE_RATES,
) -> dict[str, np.ndarray]:
    """All scores of one binary output in every bootstrap round.

    Args:
        scores: [n] probabilities.
        targets: [n] with 1 present and 0 absent; other values are left out.
        weights: [R, n] case weights.
        threshold: scores from here on are called positive.
        false_positive_rates: rates for ``sensitivity@``.

    Returns:
        name -> [R]: auroc, ap, accuracy, sensitivity, specificity, precision, f1, sensitivity@RATE.
    """
    scores, targets = np.asarray(scores), np.asarray(targets)
    called = scores >= threshold
    hits, false = weights @ (called & (targets == 1)), weights @ (called & (targets == 0))
    positive, negative = weights @ (targets == 1), weights @ (targets == 0)
    return {
        "auroc": weighted_auroc(scores, targets, weights),
        "ap": weighted_average_precision(scores, targets, weights),
        "accuracy": _ratio(hits + negative - false, positive + negative),
        "sensitivity": _ratio(hits, positive),
        "specificity": _ratio(negative - false, negative),
        "precision": _precision(hits, hits + false, positive),
        "f1": _ratio(2 * hits, hits + false + positive),
        **{
            f"sensitivity@{rate:g}": weighted_sensitivity_at_fpr(scores, targets, weights, rate)
            for rate in false_positive_rates
        },
    }


def binary_report(
    scores: np.ndarray,
    targets: np.ndarray,
    *,
    threshold: float = 0.5,
    false_positive_rates: Sequence[float] = FALSE_POSITIVE_RATES,
) -> dict[str, Any]:
    """Scores of one binary output.

    Args:
        scores: [n] probabilities.
        targets: [n] with 1 present and 0 absent; other values are left out.
        threshold: scores from here on are called positive.
        false_positive_rates: rates for ``sensitivity@``.

    Returns:
        the scores of :func:`weighted_binary`, ``n``, ``positives``, and ``confusion`` [[TN, FP], [FN, TP]].
    """
    scores, targets = np.asarray(scores), np.asarray(targets)
    values = weighted_binary(
        scores,
        targets,
        np.ones((1, len(scores))),
        threshold=threshold,
        false_positive_rates=false_positive_rates,
    )
    known = np.isin(targets, (0, 1))
    matrix = confusion_matrix(targets[known].astype(int), (scores >= threshold)[known].astype(int), 2)
    report: dict[str, Any] = {name: float(value[0]) for name, value in values.items()}
    return report | {"n": int(known.sum()), "positives": int((targets == 1).sum()), "confusion": matrix.tolist()}


def confusion_matrix(targets: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """Count cases [classes, classes]: rows are the truth, columns what was predicted.

    Args:
        targets: [n] class index.
        predicted: [n] class index.
        classes: number of classes.
    """
    counts = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(counts, (np.asarray(targets, dtype=np.int64), np.asarray(predicted, dtype=np.int64)), 1)
    return counts


def weighted_multiclass(
    probs: np.ndarray, targets: np.ndarray, weights: np.ndarray, names: Sequence[str] = ()
) -> dict[str, np.ndarray]:
    """All scores of a choice among several classes in every bootstrap round.

    Args:
        probs: [n, C]; the first of the largest is the prediction.
        targets: [n] class index.
        weights: [R, n] case weights.
        names: C class names; given, the scores of each class are added as ``f1/NAME`` and so on.

    Returns:
        name -> [R]: accuracy, balanced_accuracy, macro_precision, macro_f1, weighted_f1, macro_auroc and macro_ap (one
        class against the rest), then the classes. A mean leaves out NaN.

    Raises:
        ValueError: shapes that disagree, a target that is no class, or probabilities that are not finite.
    """
    probs, targets = np.asarray(probs, dtype=np.float64), np.asarray(targets)
    _check_multiclass(probs, targets)
    predicted = probs.argmax(axis=1)
    classes = range(probs.shape[1])
    each = [_one_class(probs[:, k], targets == k, predicted == k, weights) for k in classes]
    stacked = {name: np.stack([scores[name] for scores in each], axis=1) for name in each[0]}
    support = np.stack([weights @ (targets == k) for k in classes], axis=1)
    scores = {
        "accuracy": _ratio(weights @ (predicted == targets), weights.sum(1)),
        "balanced_accuracy": _mean(stacked["recall"]),
        "macro_precision": _mean(stacked["precision"]),
        "macro_f1": _mean(stacked["f1"]),
        "weighted_f1": _ratio((np.nan_to_num(stacked["f1"]) * support).sum(1), support.sum(1)),
        "macro_auroc": _mean(stacked["auroc"]),
        "macro_ap": _mean(stacked["ap"]),
    }
    for k, name in enumerate(names):
        scores |= {f"{score}/{name}": values[:, k] for score, values in stacked.items()}
    return scores


def _check_multiclass(probs: np.ndarray, targets: np.ndarray) -> None:
    if probs.ndim != 2 or targets.shape != probs.shape[:1]:
        raise ValueError(f"probabilities [n, C] and targets [n] are needed, got {probs.shape} and {targets.shape}")
    if len(targets) and not np.isin(targets, np.arange(probs.shape[1])).all():
        raise ValueError(f"targets must be class indices 0..{probs.shape[1] - 1}, got {np.unique(targets)}")
    if not np.isfinite(probs).all():
        raise ValueError("probabilities hold NaN or infinity: the model's outputs are broken")


def _one_class(score: np.ndarray, is_it: np.ndarray, called: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    hits, calls, cases = weights @ (called & is_it), weights @ called, weights @ is_it
    return {
        "precision": _precision(hits, calls, cases),
        "recall": _ratio(hits, cases),
        "f1": _ratio(2 * hits, calls + cases),
        "auroc": weighted_auroc(score, is_it.astype(int), weights),
        "ap": weighted_average_precision(score, is_it.astype(int), weights),
    }


def _precision(hits: np.ndarray, calls: np.ndarray, cases: np.ndarray) -> np.ndarray:
    return np.where(calls + cases > 0, np.nan_to_num(_ratio(hits, calls)), np.nan)


def _mean(values: np.ndarray) -> np.ndarray:
    """Mean over the classes [R, C] that have a value."""
    known = np.isfinite(values)
    return _ratio(np.where(known, values, 0.0).sum(1), known.sum(1))


def multiclass_report(probs: np.ndarray, targets: np.ndarray, names: Sequence[str]) -> dict[str, Any]:
    """Scores of a choice among several classes.

    Args:
        probs: [n, C].
        targets: [n] class index.
        names: C class names.

    Returns:
        the scores of :func:`weighted_multiclass`; ``per_class`` name -> precision, recall, f1, auroc, ap and support;
        ``confusion`` [C, C] with the truth in rows; ``n``.

    Raises:
        ValueError: see :func:`weighted_multiclass`; or names that do not fit the columns.
    """
    probs, targets = np.asarray(probs, dtype=np.float64), np.asarray(targets)
    if probs.ndim != 2 or len(names) != probs.shape[1] or len(set(names)) < len(names):
        raise ValueError(f"{probs.shape} probabilities need as many distinct names, got {list(names)}")
    values = weighted_multiclass(probs, targets, np.ones((1, len(probs))), names)
    report: dict[str, Any] = {name: float(value[0]) for name, value in values.items() if "/" not in name}
    counts = confusion_matrix(targets, probs.argmax(axis=1), len(names))
    report["per_class"] = {
        name: {
            **{score: float(values[f"{score}/{name}"][0]) for score in ("precision", "recall", "f1", "auroc", "ap")},
            "support": int(counts[k].sum()),
        }
        for k, name in enumerate(names)
    }
    return report | {"confusion": counts.tolist(), "n": len(targets)}
