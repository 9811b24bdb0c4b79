"""From scans to patients, and the scores of a disease together with its severity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mg3d.metrics.classification import weighted_binary


@dataclass(frozen=True)
class PatientVote:
    """One row per patient, sorted by name.

    Attributes:
        patients: [P] names.
        probs: [P, C] mean probabilities, or shares of the votes.
        targets: [P] class index.
        scans: [P] number of scans behind each row.
    """

    patients: list[str]
    probs: np.ndarray
    targets: np.ndarray
    scans: np.ndarray


def patient_vote(probs: np.ndarray, targets: np.ndarray, patients: Sequence[str], how: str = "mean") -> PatientVote:
    """Let the scans of a patient decide together.

    Args:
        probs: [n, C] class probabilities of each scan.
        targets: [n] class index; the same for all scans of a patient.
        patients: patient of each scan.
        how: ``mean`` averages the probabilities; ``majority`` lets each scan vote for its likeliest class, where the
            mean probability decides between classes with as many votes.

    Returns:
        the patients with their probabilities and classes.

    Raises:
        ValueError: unknown ``how``, shapes that disagree, or a patient whose scans have different targets.
    """
    probs, targets = np.asarray(probs, dtype=np.float64), np.asarray(targets)
    if how not in ("mean", "majority"):
        raise ValueError(f"how must be mean or majority, got {how!r}")
    if probs.ndim != 2 or not len(probs) == len(targets) == len(patients):
        raise ValueError(f"{probs.shape} probabilities, {len(targets)} targets, {len(patients)} patients do not agree")
    names, first, index = np.unique(np.asarray(patients), return_index=True, return_inverse=True)
    split = np.flatnonzero(targets != targets[first][index])
    if len(split):
        raise ValueError(f"patient {patients[split[0]]} has scans of different classes: one target a patient is needed")
    scans = np.bincount(index, minlength=len(names))
    mean = _group_mean(probs, index, scans)
    if how == "majority":
        votes = _group_mean(np.eye(probs.shape[1])[probs.argmax(axis=1)], index, scans)
        # less than one vote of the patient with most scans, so it only decides between equals
        mean = votes + mean * 0.5 / scans.max()
        mean = mean / mean.sum(axis=1, keepdims=True)
    return PatientVote([str(name) for name in names], mean, targets[first], scans)


def _group_mean(values: np.ndarray, index: np.ndarray, counts: np.ndarray) -> np.ndarray:
    total = np.zeros((len(counts), values.shape[1]))
    np.add.at(total, index, values)
    return np.asarray(total / counts[:, None])


def weighted_stoic(probs: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """The four STOIC 2021 scores in every bootstrap round; severity is judged among COVID-positive patients only.

    The challenge ranks by ``aucSevere``.

    Args:
        probs: [n, 2] probability of COVID-19 and of a severe course.
        targets: [n, 2] with 0 or 1.
        weights: [R, n] case weights.

    Returns:
        ``accCOVID``, ``aucCOVID`` over all patients, ``accSevere``, ``aucSevere`` over those with COVID-19, each [R];
        accuracies at 0.5; NaN where a class is missing.

    Raises:
        ValueError: other shapes.
    """
    probs, targets = np.asarray(probs, dtype=np.float64), np.asarray(targets)
    if probs.ndim != 2 or probs.shape[1] != 2 or probs.shape != targets.shape:
        raise ValueError(f"probabilities and targets [n, 2] are needed, got {probs.shape} and {targets.shape}")
    covid = weighted_binary(probs[:, 0], targets[:, 0], weights, false_positive_rates=())
    among = np.where(targets[:, 0] == 1, targets[:, 1], -1)  # -1 leaves a case out
    severe = weighted_binary(probs[:, 1], among, weights, false_positive_rates=())
    return {
        "accCOVID": covid["accuracy"],
        "aucCOVID": covid["auroc"],
        "accSevere": severe["accuracy"],
        "aucSevere": severe["auroc"],
    }


def stoic_metrics(probs: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """The four STOIC 2021 scores of a set of patients (see :func:`weighted_stoic`)."""
    values = weighted_stoic(probs, targets, np.ones((1, len(probs))))
    return {name: float(value[0]) for name, value in values.items()}
