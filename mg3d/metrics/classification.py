"""Area under the ROC curve, weighted, for the whole set and all bootstrap rounds at once."""

from __future__ import annotations

import numpy as np


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
    scores, targets = np.asarray(scores, dtype=np.float64), np.asarray(targets)
    if not scores.shape == targets.shape == weights.shape[1:]:
        raise ValueError(f"scores {scores.shape}, targets {targets.shape} and weights {weights.shape} do not agree")
    if not np.isfinite(scores).all():
        raise ValueError("scores hold NaN or infinity: the model's outputs are broken")
    positive, negative = targets == 1, targets == 0
    above = scores[positive][:, None] - scores[negative][None, :]
    wins = (above > 0) + 0.5 * (above == 0)
    weight_positive, weight_negative = weights[:, positive], weights[:, negative]
    pairs = weight_positive.sum(1) * weight_negative.sum(1)
    total = np.einsum("rp,pq,rq->r", weight_positive, wins, weight_negative, optimize=True)
    return np.where(pairs > 0, total / np.where(pairs > 0, pairs, 1.0), np.nan)


def auroc(scores: np.ndarray, targets: np.ndarray) -> float:
    """Area under the ROC curve of one finding.

    Args:
        scores: [n] real values.
        targets: [n] with 1 present and 0 absent; other values are left out.

    Returns:
        The area, or NaN when one class is missing.
    """
    return float(weighted_auroc(scores, targets, np.ones((1, len(np.asarray(scores)))))[0])
