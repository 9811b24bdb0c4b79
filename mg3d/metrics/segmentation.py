"""Scores of a predicted label map, class by class, and their means over cases.

Policy, the same everywhere in this project:

* class absent from truth and prediction: every score is NaN, the case says nothing about the class;
* class absent from the truth alone: Dice and IoU are NaN (the case is left out of their means), the surface Dice is 0;
* class absent from the prediction alone: Dice, IoU and surface Dice are 0;
* when exactly one of the two is empty, no distance exists: HD95 and ASSD are infinite (``definition="monai"``: HD95 is
  NaN, as MONAI gives it). Means are taken over finite values and say how many there were.

Definitions: ``deepmind`` (default) and ``monai`` name the tool that the surface scores agree with, see
:mod:`mg3d.metrics.surface`. Dice and IoU are the same in both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import ndimage

from mg3d.metrics.bootstrap import bootstrap_weights, summary
from mg3d.metrics.surface import DEFINITIONS, surface_distances

Box = tuple[slice, ...]


def score_label_maps(
    truth: np.ndarray,
    pred: np.ndarray,
    spacing_mm: Sequence[float],
    labels: Mapping[int, str],
    *,
    definition: str = "deepmind",
    tolerances_mm: Sequence[float] = (1, 2),
) -> dict[str, dict[str, float]]:
    """Score a label map against the truth on the same grid.

    Each class is looked at inside the box that holds it in either map, so the size of the image hardly matters.

    Args:
        truth: integer or bool [X,Y,Z].
        pred: integer or bool of the same shape.
        spacing_mm: voxel size along the three array axes.
        labels: label -> name of the classes to score; other labels are ignored.
        definition: whose surface scores: ``deepmind`` or ``monai``.
        tolerances_mm: tolerances of the normalised surface Dice.

    Returns:
        ``{name: {"dice", "iou", "hd95", "nsd@1", "nsd@2", "assd"}}`` with distances in mm, one ``nsd@T`` per tolerance.

    Raises:
        ValueError: other shapes or number types, labels below 1 or with the same name, bad spacing or definition.
    """
    _check(truth, pred, labels, definition, tolerances_mm)
    boxes = _boxes(truth, labels), _boxes(pred, labels)
    scores = {}
    for label, name in labels.items():
        box = _union(boxes[0].get(label), boxes[1].get(label))
        scores[name] = _score(truth[box] == label, pred[box] == label, spacing_mm, definition, tolerances_mm)
    return scores


def metric_names(tolerances_mm: Sequence[float] = (1, 2)) -> list[str]:
    """Names of the scores, in the order in which :func:`score_label_maps` gives them."""
    return ["dice", "iou", "hd95", *(f"nsd@{tolerance:g}" for tolerance in tolerances_mm), "assd"]


def mean_score(values: Iterable[float], groups: Sequence[str], rounds: int = 1000, seed: int = 0) -> dict[str, Any]:
    """Mean of one score over cases, with a bootstrap interval over patients.

    Args:
        values: score of each case; NaN (undefined) and infinite ones (a structure wholly missed) are left out.
        groups: patient of each case.
        rounds: bootstrap rounds, 0 for no interval.
        seed: seed of the bootstrap.

    Returns:
        ``{"mean", "ci95", "n", "undefined", "infinite"}``; ``n`` counts the cases behind the mean.

    Raises:
        ValueError: as many groups as values are needed.
    """
    scores = np.asarray(list(values), dtype=np.float64)
    if len(scores) != len(groups):
        raise ValueError(f"{len(scores)} values do not fit {len(groups)} groups")
    known = np.isfinite(scores)
    counts = {"undefined": int(np.isnan(scores).sum()), "infinite": int(np.isinf(scores).sum())}
    if not known.any():
        return summary(float("nan"), np.full(1, np.nan), 0, **counts)
    kept = scores[known]
    members = [group for group, used in zip(groups, known, strict=True) if used]
    drawn = np.full(1, np.nan)
    if rounds:
        weights = bootstrap_weights(members, rounds, seed)
        drawn = weights @ kept / weights.sum(axis=1)
    return summary(float(kept.mean()), drawn, len(kept), **counts)


def _check(
    truth: np.ndarray, pred: np.ndarray, labels: Mapping[int, str], definition: str, tolerances: Sequence[float]
) -> None:
    if truth.shape != pred.shape or truth.ndim != 3:
        raise ValueError(f"two label maps of one shape [X,Y,Z] are needed, got {truth.shape} and {pred.shape}")
    for name, array in (("truth", truth), ("prediction", pred)):
        if array.dtype.kind not in "iub":
            raise ValueError(f"the {name} holds {array.dtype}: label maps are integers, round them knowingly")
    if not labels or min(labels) < 1 or len(set(labels.values())) < len(labels):
        raise ValueError(f"labels need distinct names and values from 1 on, got {dict(labels)}")
    if definition not in DEFINITIONS:
        raise ValueError(f"definition must be one of {', '.join(DEFINITIONS)}, got {definition!r}")
    if not all(tolerance >= 0 for tolerance in tolerances):
        raise ValueError(f"tolerances_mm must not be negative, got {tuple(tolerances)}")


def _boxes(array: np.ndarray, labels: Iterable[int]) -> dict[int, Box]:
    """Bounding box of every label that occurs, in one pass over the array."""
    wanted = max(labels)
    if array.dtype.kind == "b":
        array = array.view(np.uint8)
    found = ndimage.find_objects(array, max_label=wanted)
    return {label: found[label - 1] for label in labels if label <= len(found) and found[label - 1] is not None}


def _union(first: Box | None, second: Box | None) -> Box:
    given = [box for box in (first, second) if box is not None]
    if not given:
        return (slice(0, 0),) * 3
    return tuple(
        slice(min(part.start for part in along), max(part.stop for part in along)) for along in zip(*given, strict=True)
    )


def _score(
    truth: np.ndarray, pred: np.ndarray, spacing_mm: Sequence[float], definition: str, tolerances: Sequence[float]
) -> dict[str, float]:
    in_truth, in_pred = int(np.count_nonzero(truth)), int(np.count_nonzero(pred))
    both = int(np.count_nonzero(truth & pred))
    surfaces = surface_distances(truth, pred, spacing_mm, definition)
    nothing = float("nan")
    return {
        "dice": 2 * both / (in_truth + in_pred) if in_truth else nothing,
        "iou": both / (in_truth + in_pred - both) if in_truth else nothing,
        "hd95": surfaces.hausdorff(95.0) if in_truth or in_pred else nothing,
        **{f"nsd@{tolerance:g}": surfaces.surface_dice(tolerance) for tolerance in tolerances},
        "assd": surfaces.assd(),
    }
