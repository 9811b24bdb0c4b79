"""Classification reports: values by hand and against scikit-learn, golden STOIC scores, absent classes, votes."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn import metrics as sk

from mg3d.metrics.classification import (
    average_precision,
    binary_report,
    curve_points,
    multiclass_report,
    sensitivity_at_fpr,
    weighted_average_precision,
    weighted_binary,
    weighted_multiclass,
)
from mg3d.metrics.patients import patient_vote, stoic_metrics


def test_average_precision_and_curves_equal_scikit_learn_with_ties() -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        scores, targets = rng.integers(0, 9, 70).astype(float), rng.integers(0, 2, 70)
        assert average_precision(scores, targets) == pytest.approx(sk.average_precision_score(targets, scores))
        points = curve_points(scores, targets)
        fpr, tpr, _ = sk.roc_curve(targets, scores, drop_intermediate=False)
        np.testing.assert_allclose(points["fpr"], fpr)
        np.testing.assert_allclose(points["sensitivity"], tpr)
        assert (np.diff(points["threshold"][1:]) < 0).all() and len(points["threshold"]) == len(fpr)


def test_weighted_scores_equal_repeated_cases() -> None:
    rng = np.random.default_rng(1)
    scores, targets, counts = rng.normal(size=30), rng.integers(0, 2, 30), rng.integers(0, 4, 30)
    weights = counts[None].astype(float)
    many = np.repeat(scores, counts), np.repeat(targets, counts)
    assert weighted_average_precision(scores, targets, weights)[0] == pytest.approx(average_precision(*many))
    repeated = binary_report(*many, threshold=0.2)
    for name, value in weighted_binary(scores, targets, weights, threshold=0.2).items():
        assert value[0] == pytest.approx(repeated[name]), name
    probs, classes = rng.dirichlet(np.ones(3), 30), rng.integers(0, 3, 30)
    report = multiclass_report(np.repeat(probs, counts, axis=0), np.repeat(classes, counts), ["a", "b", "c"])
    for name, value in weighted_multiclass(probs, classes, weights).items():
        assert value[0] == pytest.approx(report[name]), name


def test_sensitivity_at_a_false_positive_rate_by_hand() -> None:
    scores = np.array([0.9, 0.8, 0.7, 0.6, 0.6, 0.5, 0.4, 0.3])
    targets = np.array([1, 0, 1, 1, 0, 1, 0, 0])  # 4 of each
    assert sensitivity_at_fpr(scores, targets, 0.0) == 0.25
    assert sensitivity_at_fpr(scores, targets, 0.25) == 0.5  # the tie at 0.6 brings the second false positive
    assert sensitivity_at_fpr(scores, targets, 0.5) == 1.0
    assert sensitivity_at_fpr(scores, targets, 0.49) == 0.5
    assert math.isnan(sensitivity_at_fpr(scores, np.ones(8), 0.5))
    with pytest.raises(ValueError, match="rate"):
        sensitivity_at_fpr(scores, targets, 1.5)


def test_binary_report_by_hand_and_with_one_class() -> None:
    report = binary_report(np.array([0.9, 0.5, 0.4, 0.2, 0.7]), np.array([1, 0, 1, 0, -1]))
    assert report["confusion"] == [[1, 1], [1, 1]] and (report["n"], report["positives"]) == (4, 2)
    assert report["accuracy"] == report["sensitivity"] == report["specificity"] == report["precision"] == 0.5
    assert report["auroc"] == 0.75
    only = binary_report(np.array([0.1, 0.2]), np.array([0, 0]))
    assert only["specificity"] == only["accuracy"] == 1.0
    for name in ("auroc", "ap", "sensitivity", "precision", "f1", "sensitivity@0.1"):
        assert math.isnan(only[name]), name
    never = binary_report(np.array([0.1, 0.2]), np.array([0, 1]))
    assert never["precision"] == never["f1"] == 0.0


PROBS = np.array(
    [
        *([0.7, 0.2, 0.1], [0.6, 0.3, 0.1], [0.3, 0.6, 0.1]),
        *([0.1, 0.8, 0.1], [0.2, 0.5, 0.3], [0.5, 0.3, 0.2]),
        *([0.1, 0.1, 0.8], [0.2, 0.1, 0.7], [0.1, 0.6, 0.3]),
    ]
)
TRUTH = np.array([0, 0, 0, 1, 1, 1, 2, 2, 2])


def test_three_classes_by_hand_and_against_scikit_learn() -> None:
    report = multiclass_report(PROBS, TRUTH, ["Normal", "CP", "NCP"])
    assert report["confusion"] == [[2, 1, 0], [1, 2, 0], [0, 1, 2]]
    assert report["accuracy"] == pytest.approx(6 / 9)
    predicted = PROBS.argmax(axis=1)
    assert report["macro_f1"] == pytest.approx(sk.f1_score(TRUTH, predicted, average="macro"))
    assert report["weighted_f1"] == pytest.approx(sk.f1_score(TRUTH, predicted, average="weighted"))
    area = sk.roc_auc_score(TRUTH, PROBS, multi_class="ovr", average="macro")
    assert report["macro_auroc"] == pytest.approx(area)
    assert report["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(TRUTH, predicted))
    normal = report["per_class"]["Normal"]
    assert normal["precision"] == normal["recall"] == pytest.approx(2 / 3) and normal["support"] == 3


def test_a_class_without_cases_is_left_out_of_means() -> None:
    report = multiclass_report(PROBS[:6], TRUTH[:6], ["Normal", "CP", "NCP"])
    absent = report["per_class"]["NCP"]
    assert absent["support"] == 0
    assert all(math.isnan(absent[name]) for name in ("precision", "recall", "f1", "auroc", "ap"))
    kept = [report["per_class"][name] for name in ("Normal", "CP")]
    assert report["macro_f1"] == pytest.approx(np.mean([entry["f1"] for entry in kept]))
    assert report["macro_auroc"] == pytest.approx(np.mean([entry["auroc"] for entry in kept]))
    invented = multiclass_report(PROBS[[0, 3, 6]], np.array([0, 1, 1]), ["Normal", "CP", "NCP"])
    assert invented["per_class"]["NCP"]["f1"] == 0.0 and math.isnan(invented["per_class"]["NCP"]["recall"])


def test_bad_probabilities_are_errors() -> None:
    with pytest.raises(ValueError, match="class indices"):
        multiclass_report(PROBS, TRUTH + 1, ["a", "b", "c"])
    with pytest.raises(ValueError, match="NaN"):
        multiclass_report(np.full((9, 3), np.nan), TRUTH, ["a", "b", "c"])
    with pytest.raises(ValueError, match="names"):
        multiclass_report(PROBS, TRUTH, ["a", "b"])


def test_golden_stoic_scores() -> None:
    covid, severe = [1, 1, 1, 1, 0, 0, 1, 0], [1, 0, 1, 0, 0, 0, 0, 0]
    p_covid, p_severe = [0.9, 0.6, 0.4, 0.8, 0.3, 0.55, 0.7, 0.2], [0.8, 0.3, 0.45, 0.5, 0.1, 0.6, 0.2, 0.05]
    found = stoic_metrics(np.array([p_covid, p_severe]).T, np.array([covid, severe]).T)
    golden = {"accCOVID": 0.75, "aucCOVID": 0.933333, "accSevere": 0.6, "aucSevere": 0.833333}
    assert found == pytest.approx(golden, abs=1e-6)
    with pytest.raises(ValueError, match=r"\[n, 2\]"):
        stoic_metrics(np.zeros((3, 1)), np.zeros((3, 1)))


def test_scans_of_a_patient_decide_together() -> None:
    probs = np.array([[0.9, 0.1], [0.4, 0.6], [0.4, 0.6], [0.2, 0.8]])
    patients, targets = ["b", "b", "b", "a"], np.array([0, 0, 0, 1])
    mean = patient_vote(probs, targets, patients)
    assert mean.patients == ["a", "b"] and mean.targets.tolist() == [1, 0] and mean.scans.tolist() == [1, 3]
    np.testing.assert_allclose(mean.probs, [[0.2, 0.8], [1.7 / 3, 1.3 / 3]])
    majority = patient_vote(probs, targets, patients, how="majority")
    assert majority.probs.argmax(axis=1).tolist() == [1, 1]
    np.testing.assert_allclose(majority.probs.sum(axis=1), 1)
    tie = patient_vote(probs[:2], targets[:2], patients[:2], how="majority")
    assert tie.probs.argmax() == 0  # one vote each, and the mean probability is higher for the first
    with pytest.raises(ValueError, match="patient b"):
        patient_vote(probs, np.array([0, 1, 0, 1]), patients)
