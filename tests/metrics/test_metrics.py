"""Metrics: values by hand, against scikit-learn, and their behaviour at the edges."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from mg3d.metrics.bootstrap import bootstrap_weights, interval, summary
from mg3d.metrics.classification import auroc, weighted_auroc
from mg3d.metrics.probe import linear_probe_scores
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
