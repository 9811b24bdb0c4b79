"""Metrics: values by hand, against scikit-learn, and their behaviour at the edges."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mg3d.metrics.bootstrap import bootstrap_weights, interval, metric_entries, summary
from mg3d.metrics.classification import auroc, curve_points, weighted_auroc
from mg3d.metrics.probe import linear_probe_scores, multiclass_probe_probabilities
from mg3d.metrics.representation import effective_rank
from mg3d.metrics.retrieval import chance_recall, group_identical, ranks_with_ties_last


def test_auroc_equals_scikit_learn_with_ties() -> None:
    rng = np.random.default_rng(0)
    scores, targets = rng.integers(0, 6, 80).astype(float), rng.integers(0, 2, 80)
    assert auroc(scores, targets) == pytest.approx(roc_auc_score(targets, scores))


def test_weighted_auroc_equals_repeated_cases() -> None:
    rng = np.random.default_rng(1)
    scores, targets, counts = rng.normal(size=30), rng.integers(0, 2, 30), rng.integers(0, 4, 30)
    repeated = roc_auc_score(np.repeat(targets, counts), np.repeat(scores, counts))
    assert weighted_auroc(scores, targets, counts[None].astype(float))[0] == pytest.approx(repeated)


def test_auroc_leaves_unknown_labels_out_and_is_nan_without_a_class() -> None:
    scores, targets = np.array([0.1, 0.9, 0.5]), np.array([0, 1, -1])
    assert auroc(scores, targets) == 1.0
    assert np.isnan(auroc(scores, np.array([1, 1, -1])))
    with pytest.raises(ValueError, match="NaN"):
        auroc(np.array([np.nan, 1.0, 0.0]), targets)


def test_bootstrap_keeps_patients_together_and_is_seeded() -> None:
    groups = ["a", "a", "b", "c"]
    weights = bootstrap_weights(groups, 200, seed=3)
    assert (weights[:, 0] == weights[:, 1]).all()
    assert (weights[:, 1:].sum(1) == 3).all()
    assert (weights == bootstrap_weights(groups, 200, seed=3)).all()
    assert (weights != bootstrap_weights(groups, 200, seed=4)).any()
    with pytest.raises(ValueError, match="cases"):
        bootstrap_weights([], 10)


def test_interval_covers_the_mean_about_as_often_as_promised() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for round_number in range(60):
        sample = rng.normal(size=60)
        weights = bootstrap_weights([str(i) for i in range(60)], 300, seed=round_number)
        low, high = interval(weights @ sample / weights.sum(1))
        covered += low <= 0.0 <= high
    assert covered >= 50
    assert interval(np.array([np.nan])) is None
    assert summary(np.nan, np.array([np.nan]), 3)["mean"] is None


def test_ranks_put_ties_last_and_take_the_best_of_a_group() -> None:
    similarity = np.array([[0.5, 0.5, 0.1], [0.2, 0.9, 0.9]])
    relevant = np.array([[True, False, False], [False, True, True]])
    assert ranks_with_ties_last(similarity, relevant).tolist() == [2, 1]
    constant = np.zeros((4, 4))
    assert ranks_with_ties_last(constant, np.eye(4, dtype=bool)).tolist() == [4, 4, 4, 4]
    with pytest.raises(ValueError, match="relevant"):
        ranks_with_ties_last(constant, np.zeros((4, 4), dtype=bool))


def test_chance_recall_by_enumeration() -> None:
    relevant = np.array([[True, True, False, False, False]])
    for k in (1, 2, 3, 5):
        orders = list(itertools.permutations(range(5)))
        hits = np.mean([any(relevant[0, list(order[:k])]) for order in orders])
        assert chance_recall(relevant, k)[0] == pytest.approx(hits)


def test_identical_reports_share_a_group_whatever_the_blanks() -> None:
    groups = group_identical(["No  mass.", "no mass.", "A mass."])
    assert groups[0] == groups[1] != groups[2]


def test_effective_rank_of_known_spectra() -> None:
    basis = np.vstack([np.eye(4), -np.eye(4)])
    assert effective_rank(basis) == pytest.approx(4.0)
    assert effective_rank(np.ones((5, 3))) == 1.0
    line = np.outer(np.linspace(-1, 1, 9), [1.0, 2.0, 3.0])
    assert effective_rank(line) == pytest.approx(1.0, abs=1e-6)


def test_probe_finds_a_planted_signal_and_not_a_shuffled_one() -> None:
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 2, 240)
    features = rng.normal(size=(240, 12)) + 1.5 * targets[:, None] * (np.arange(12) == 3)
    groups = np.array([f"p{i // 2}" for i in range(240)])
    scores = linear_probe_scores(features[:160], targets[:160], groups[:160], features[160:])
    assert scores is not None
    assert auroc(scores, targets[160:]) > 0.8
    shuffled = linear_probe_scores(features[:160], rng.permutation(targets[:160]), groups[:160], features[160:])
    assert shuffled is not None
    assert 0.25 < auroc(shuffled, targets[160:]) < 0.75
    assert linear_probe_scores(features[:8], np.array([1, 0, 0, 0, 0, 0, 0, 0]), groups[:8], features[160:]) is None


def test_bootstrap_has_as_many_draws_as_patients_and_rounds() -> None:
    patients = ["a", "b", "b", "c"]
    weights = bootstrap_weights(patients, 7)
    assert weights.shape == (7, 4) and np.array_equal(weights, bootstrap_weights(patients, 7, seed=0))
    assert (weights[:, [0, 1, 3]].sum(axis=1) == 3).all() and np.array_equal(weights[:, 1], weights[:, 2])
    assert bootstrap_weights(patients, 1).shape == (1, 4)
    for bad in ((patients, 0), ([], 3)):
        with pytest.raises(ValueError, match="needs cases and rounds"):
            bootstrap_weights(*bad)


def test_an_interval_is_that_of_its_percentiles_and_levels() -> None:
    values = np.arange(201.0)
    assert interval(values) == pytest.approx([5.0, 195.0])
    assert interval(values, level=0.5) == pytest.approx([50.0, 150.0])
    assert interval(np.array([np.nan, 2.0, np.inf])) == [2.0, 2.0] and interval(np.full(3, np.nan)) is None


def test_entries_without_rounds_have_no_interval() -> None:
    entries = metric_entries(lambda weights: {"mean": weights @ np.array([1.0, 3.0]) / weights.sum(1)}, ["a", "b"], 0)
    assert entries == {"mean": {"mean": 2.0, "ci95": None, "n": 2}}


def test_effective_rank_refuses_what_is_no_table_and_weighs_its_rows() -> None:
    for bad in (np.ones(3), np.full((2, 2), np.nan), np.ones((2, 2, 2))):
        with pytest.raises(ValueError, match="finite"):
            effective_rank(bad)
    assert effective_rank(1e-14 * np.eye(3)) == 1.0
    assert effective_rank(0.1 * np.eye(4)) == pytest.approx(effective_rank(np.eye(4)))
    rows = np.random.default_rng(0).normal(size=(5, 3))
    repeated = effective_rank(np.concatenate([rows, rows[:2]]))
    assert effective_rank(rows, np.array([2.0, 2.0, 1.0, 1.0, 1.0])) == pytest.approx(repeated)


def probe_cases(patients_per_class: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two scans of each patient, one planted direction."""
    rng = np.random.default_rng(1)
    targets = np.repeat([0, 1], 2 * patients_per_class)
    features = rng.normal(size=(len(targets), 6)) + targets[:, None] * 0.8
    return features, targets, np.repeat([f"p{n}" for n in range(2 * patients_per_class)], 2)


def chosen_by_hand(features: np.ndarray, targets: np.ndarray, groups: np.ndarray, scoring: Any, weight: Any) -> Any:
    """The stated rule written out: standardise, three patient-wise folds, the best of four strengths."""
    folds = list(StratifiedGroupKFold(3, shuffle=True, random_state=0).split(features, targets, groups))
    models = [
        make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=300, class_weight=weight))
        for strength in (0.001, 0.01, 0.1, 1.0)
    ]
    means = [
        np.mean([scoring(model.fit(features[a], targets[a]), features[b], targets[b]) for a, b in folds])
        for model in models
    ]
    return models[int(np.argmax(means))].fit(features, targets)


@pytest.mark.parametrize("positive_weight", [1.0, 4.0])
def test_the_probe_follows_its_stated_rule(positive_weight: float) -> None:
    features, targets, groups = probe_cases(14)
    noisy = features + np.random.default_rng(2).normal(size=features.shape) * 2.0

    def auroc_of(model: Any, x: np.ndarray, y: np.ndarray) -> float:
        return roc_auc_score(y, model.decision_function(x))

    wanted = chosen_by_hand(noisy, targets, groups, auroc_of, {0: 1.0, 1: positive_weight}).decision_function(features)
    extra = np.concatenate([targets, [-1, 2]])
    found = linear_probe_scores(
        np.concatenate([noisy, noisy[:2]]), extra, np.concatenate([groups, ["x", "y"]]), features,
        positive_weight=positive_weight,
    )  # fmt: skip
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    if positive_weight == 1.0:
        np.testing.assert_allclose(linear_probe_scores(noisy, targets, groups, features), wanted, rtol=1e-6)


def test_the_probe_of_several_classes_follows_its_stated_rule() -> None:
    features, targets, groups = probe_cases(12)
    targets = targets * 2 + (np.arange(len(targets)) // 2 % 2)  # classes 0, 1, 2, 3, six patients each

    def likelihood(model: Any, x: np.ndarray, y: np.ndarray) -> float:
        return -log_loss(y, model.predict_proba(x), labels=[0, 1, 2, 3])

    wanted = chosen_by_hand(features, targets, groups, likelihood, None).predict_proba(features)
    found = multiclass_probe_probabilities(features, targets, groups, features, 5)
    assert found is not None and found.shape == (len(features), 5)
    np.testing.assert_allclose(found[:, :4], wanted, rtol=1e-6)
    assert (found[:, 4] == 0).all()
    assert multiclass_probe_probabilities(features, np.zeros_like(targets), groups, features, 5) is None


@pytest.mark.parametrize(("patients", "fitted"), [(4, False), (5, True), (6, True)])
def test_a_probe_needs_five_patients_of_each_class_not_five_scans(patients: int, fitted: bool) -> None:
    features, targets, groups = probe_cases(8)
    few = np.isin(groups, [f"p{n}" for n in (*range(patients), *range(8, 16))])
    for keep in (few, few[::-1]):  # the class of few patients is the absent, then the present one
        data = (features[keep], targets[keep], groups[keep], features)
        assert (linear_probe_scores(*data) is not None) is fitted
        assert (multiclass_probe_probabilities(*data, 2) is not None) is fitted


def test_curve_points_by_hand() -> None:
    points = curve_points(np.array([0.9, 0.8, 0.8, 0.1]), np.array([1, 0, 1, 0]))
    assert points["threshold"].tolist() == [np.inf, 0.9, 0.8, 0.1]
    assert points["fpr"].tolist() == [0.0, 0.0, 0.5, 1.0]
    assert points["sensitivity"].tolist() == [0.0, 0.5, 1.0, 1.0]
    assert points["precision"].tolist() == [1.0, 1.0, pytest.approx(2 / 3), 0.5]


def test_scores_without_a_case_are_undefined_and_light_weights_count() -> None:
    nothing = np.zeros((2, 0))
    assert np.isnan(weighted_auroc(np.zeros(0), np.zeros(0), nothing)).tolist() == [True, True]
    light = weighted_auroc(np.array([0.2, 0.7]), np.array([0, 1]), np.full((1, 2), 0.25))
    assert light.tolist() == [1.0], "a weight below one is still a weight"
