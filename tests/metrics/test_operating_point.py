"""Thresholds, decisions and their intervals: recorded values, scikit-learn, and missing classes."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score

from mg3d.metrics.classification import auroc
from mg3d.metrics.operating_point import corner_threshold, corner_thresholds, decision_scores, multilabel_entries

PROBABILITIES = np.array([0.05, 0.1, 0.2, 0.3, 0.35, 0.4, 0.55, 0.6, 0.8, 0.9])
TARGETS = np.array([0, 0, 0, 1, 0, 0, 1, 1, 1, 1])


def one(probabilities: np.ndarray, targets: np.ndarray, threshold: float) -> dict[str, float]:
    found = decision_scores(probabilities, targets, threshold, np.ones((1, len(targets))))
    return {name: float(values[0]) for name, values in found.items()}


def test_the_recorded_threshold() -> None:
    threshold = corner_threshold(PROBABILITIES, TARGETS)
    assert threshold == pytest.approx(0.545455, abs=1e-6)
    found = one(PROBABILITIES, TARGETS, threshold)
    assert 1 - found["recall"] == pytest.approx(0.2)
    assert (found["accuracy"], found["precision"]) == (pytest.approx(0.9), 1.0)
    assert found["f1_weighted"] == pytest.approx(0.898990, abs=1e-6)
    assert auroc(PROBABILITIES, TARGETS) == pytest.approx(0.92)


def test_decisions_equal_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    probabilities, targets = rng.random(90), rng.integers(0, 2, 90)
    decided = probabilities > 0.3
    found = one(probabilities, targets, 0.3)
    assert found["f1_weighted"] == pytest.approx(f1_score(targets, decided, average="weighted"))
    assert found["f1"] == pytest.approx(f1_score(targets, decided))
    assert found["accuracy"] == pytest.approx(accuracy_score(targets, decided))
    assert found["precision"] == pytest.approx(precision_score(targets, decided))
    assert found["recall"] == pytest.approx(recall_score(targets, decided))


def test_a_missing_class_has_no_threshold_and_no_score() -> None:
    assert np.isnan(corner_threshold(PROBABILITIES, np.zeros(10)))
    found, undefined = corner_thresholds(np.column_stack([PROBABILITIES] * 2), np.column_stack([TARGETS, TARGETS * 0]))
    assert found == pytest.approx([0.545455, 0.5], abs=1e-6) and undefined == [1]
    assert all(np.isnan(value) for value in one(PROBABILITIES, np.zeros(10), 0.5).values())
    assert one(PROBABILITIES, TARGETS, 1.0)["precision"] == 0.0
    for wrong in (PROBABILITIES * 2, np.where(TARGETS == 1, np.nan, PROBABILITIES)):
        with pytest.raises(ValueError, match="outside"):
            corner_threshold(wrong, TARGETS)
    with pytest.raises(ValueError, match="one length"):
        corner_threshold(PROBABILITIES[:4], TARGETS)


def test_bootstrap_intervals_are_real_and_seeded() -> None:
    rng = np.random.default_rng(0)
    targets = (rng.random((400, 3)) < 0.4).astype(int)
    probabilities = np.clip(0.5 + 0.25 * (targets - 0.5) + 0.2 * rng.normal(size=(400, 3)), 0, 1)
    settings = {"rounds": 200, "seed": 5}
    thresholds = np.full(3, 0.5)
    entries, notes = multilabel_entries(probabilities, targets, list("abc"), thresholds, **settings)
    assert notes == []
    for name, entry in entries.items():
        low, high = entry["ci95"]
        assert 0.005 < high - low < 0.2 and entry["rounds_used"] == 200, name
        assert abs(entry["mean"] - (low + high) / 2) < 0.02, name
        assert entry["mean"] == pytest.approx(np.mean([each["mean"] for each in entry["per_class"].values()]))
    assert entries["auroc"]["per_class"]["b"]["mean"] == pytest.approx(auroc(probabilities[:, 1], targets[:, 1]))
    assert multilabel_entries(probabilities, targets, list("abc"), thresholds, **settings)[0] == entries
    other = multilabel_entries(probabilities, targets, list("abc"), thresholds, rounds=200, seed=6)[0]
    assert other["auroc"]["ci95"] != entries["auroc"]["ci95"]


def test_a_class_without_positives_is_left_out_and_named() -> None:
    rng = np.random.default_rng(1)
    targets = np.column_stack([rng.integers(0, 2, 50), np.zeros(50, dtype=int)])
    entries, notes = multilabel_entries(rng.random((50, 2)), targets, ["a", "never"], np.full(2, 0.5), rounds=30)
    assert "never" in notes[0]
    assert entries["auroc"]["per_class"]["never"]["mean"] is None
    assert entries["auroc"]["mean"] == entries["auroc"]["per_class"]["a"]["mean"]
    empty, _ = multilabel_entries(rng.random((50, 2)), targets * 0, ["a", "b"], np.full(2, 0.5), rounds=5)
    assert empty["f1"]["mean"] is None and empty["f1"]["ci95"] is None
