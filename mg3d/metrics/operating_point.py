"""Decision thresholds chosen on one set and applied to another, and scores of decisions with intervals.

n cases, L findings, R bootstrap rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mg3d.metrics.bootstrap import bootstrap_weights, summary
from mg3d.metrics.classification import weighted_auroc

CANDIDATES = 100
DEFAULT_THRESHOLD = 0.5
DECISION_SCORES = ("f1_weighted", "f1", "accuracy", "precision", "recall")


def corner_threshold(probabilities: np.ndarray, targets: np.ndarray) -> float:
    """Threshold nearest to the corner of the ROC diagram where all positives and no negatives are found.

    Of 100 values from 0 to 1 the one with the least sqrt((1 - sensitivity)^2 + (1 - specificity)^2), where a case
    counts as positive when its probability is above the threshold; of equal ones the largest (downstream spec 7.7).

    Args:
        probabilities: [n] in [0, 1].
        targets: [n] with 1 present and 0 absent; other values are left out.

    Returns:
        The threshold, or NaN when one class is missing.

    Raises:
        ValueError: if the lengths differ or a probability is not in [0, 1].
    """
    scores, truth = _check(probabilities, targets)
    positive, negative = scores[truth == 1], scores[truth == 0]
    if not positive.size or not negative.size:
        return float("nan")
    thresholds = np.linspace(0.0, 1.0, CANDIDATES)
    missed = (positive[None, :] <= thresholds[:, None]).mean(axis=1)
    false = (negative[None, :] > thresholds[:, None]).mean(axis=1)
    distance = np.sqrt(missed**2 + false**2)
    return float(thresholds[np.flatnonzero(distance <= distance.min() + 1e-12)[-1]])


def corner_thresholds(probabilities: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """Threshold of every finding, to be chosen on a tuning split and used on another.

    Args:
        probabilities: [n, L].
        targets: [n, L].

    Returns:
        Thresholds [L], and the findings that have only one class and therefore get ``DEFAULT_THRESHOLD``.
    """
    found = np.asarray([corner_threshold(p, t) for p, t in zip(probabilities.T, targets.T, strict=True)])
    undefined = np.flatnonzero(np.isnan(found))
    found[undefined] = DEFAULT_THRESHOLD
    return found, [int(number) for number in undefined]


def decision_scores(
    probabilities: np.ndarray, targets: np.ndarray, threshold: float, weights: np.ndarray
) -> dict[str, np.ndarray]:
    """Scores of the decision "probability above the threshold" under case weights.

    Args:
        probabilities: [n].
        targets: [n], 1 present, 0 absent, others left out.
        threshold: the operating point.
        weights: [R, n] case weights.

    Returns:
        ``f1_weighted`` (over both classes, by their share), ``f1``, ``accuracy``, ``precision``, ``recall`` of the
        positive class, each [R]; 0/0 counts 0, and NaN marks rounds in which a class is missing.
    """
    scores, truth = _check(probabilities, targets)
    yes, positive, negative = scores > threshold, truth == 1, truth == 0
    hit, false = weights @ (yes & positive), weights @ (yes & negative)
    missed, refused = weights @ (~yes & positive), weights @ (~yes & negative)
    present, absent = hit + missed, false + refused
    f1 = _ratio(2 * hit, 2 * hit + false + missed)
    f1_negative = _ratio(2 * refused, 2 * refused + false + missed)
    found = {
        "f1_weighted": _ratio(present * f1 + absent * f1_negative, present + absent),
        "f1": f1,
        "accuracy": _ratio(hit + refused, present + absent),
        "precision": _ratio(hit, hit + false),
        "recall": _ratio(hit, present),
    }
    usable = (present > 0) & (absent > 0)
    return {name: np.where(usable, values, np.nan) for name, values in found.items()}


def multilabel_entries(
    probabilities: np.ndarray,
    targets: np.ndarray,
    names: Sequence[str],
    thresholds: np.ndarray,
    *,
    rounds: int = 1000,
    groups: Sequence[str] | None = None,
    seed: int = 0,
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """AUROC and the scores of the decisions: per finding and as their mean, with bootstrap intervals over patients.

    Cases are drawn with replacement; a round in which a finding has one class only is left out of that finding's
    interval and of the mean's. Findings with one class in the whole set are left out of the means and named.

    Args:
        probabilities: [n, L] in [0, 1].
        targets: [n, L].
        names: L names.
        thresholds: [L], chosen on other cases.
        rounds: bootstrap rounds R, at least 1.
        groups: patient of each case; each case its own when None.
        seed: seed of the bootstrap.

    Returns:
        metric -> mean, ci95, n, rounds_used, per_class (name -> mean, ci95, n); and notes.
    """
    cases = len(probabilities)
    drawn = bootstrap_weights(list(groups or [str(case) for case in range(cases)]), rounds, seed)
    weights = np.vstack([np.ones((1, cases)), drawn])
    values: dict[str, list[np.ndarray]] = {name: [] for name in ("auroc", *DECISION_SCORES)}
    for column, threshold in enumerate(thresholds):
        scores, truth = probabilities[:, column], targets[:, column]
        values["auroc"].append(weighted_auroc(scores, truth, weights))
        for name, found in decision_scores(scores, truth, float(threshold), weights).items():
            values[name].append(found)
    entries = {name: _entry(np.stack(found), names, cases) for name, found in values.items()}
    left_out = [name for name, value in zip(names, values["auroc"], strict=True) if not np.isfinite(value[0])]
    notes = [f"one class only, left out of the means: {', '.join(left_out)}"] if left_out else []
    return entries, notes


def _entry(values: np.ndarray, names: Sequence[str], cases: int) -> dict[str, Any]:
    """Summary of values [L, 1 + R], the first column being the set as it is."""
    defined = np.isfinite(values[:, 0])
    mean = values[defined].mean(axis=0) if defined.any() else np.full(values.shape[1], np.nan)
    per_class = {name: summary(row[0], row[1:], cases) for name, row in zip(names, values, strict=True)}
    used = int(np.isfinite(mean[1:]).sum())
    return summary(mean[0], mean[1:], cases, rounds_used=used, per_class=per_class)


def _check(probabilities: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scores, truth = np.asarray(probabilities, dtype=np.float64), np.asarray(targets)
    if scores.shape != truth.shape or scores.ndim != 1:
        raise ValueError(f"probabilities {scores.shape} and targets {truth.shape} must be two lists of one length")
    if not ((scores >= 0) & (scores <= 1)).all():
        raise ValueError("a probability lies outside [0, 1] or is NaN")
    return scores, truth


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.where(whole > 0, part / np.where(whole > 0, whole, 1.0), 0.0)
