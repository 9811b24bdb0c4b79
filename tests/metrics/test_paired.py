"""Paired comparison of two runs: what is better by construction, what is not, and how rows are matched."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from mg3d.metrics.bootstrap import bootstrap_values, bootstrap_weights, metric_entries
from mg3d.metrics.classification import weighted_auroc
from mg3d.metrics.paired import compare_rows, compare_values, paired_difference


def test_a_steady_gain_is_seen_though_cases_differ_much_more() -> None:
    rng = np.random.default_rng(0)
    difficulty = rng.normal(size=40)
    found = compare_values(difficulty, difficulty + 0.1 + 0.05 * rng.normal(size=40), [str(k) for k in range(40)])
    assert found.ci95[0] > 0.05 and found.ci95[1] < 0.15
    assert found.p_bootstrap < 0.01 and found.p_wilcoxon < 1e-4
    assert found.difference == pytest.approx(found.mean_b - found.mean_a)


def test_no_difference_is_not_called_one() -> None:
    rng = np.random.default_rng(1)
    patients = [str(k) for k in range(30)]
    false_alarms = 0
    for seed in range(40):
        a, b = rng.normal(size=(2, 30))
        false_alarms += compare_values(a, b, patients, rounds=300, seed=seed).p_bootstrap < 0.05
    assert false_alarms <= 7
    same = compare_values(np.ones(30), np.ones(30), patients, rounds=50)
    assert same.p_bootstrap == 1.0 and math.isnan(same.p_wilcoxon) and same.entry()["p_wilcoxon"] is None


def test_the_test_sees_patients_and_not_their_cases() -> None:
    rng = np.random.default_rng(2)
    gains = rng.normal(0.3, 1.0, size=12)
    values = np.repeat(gains, 5)
    patients = [f"p{k}" for k in range(12) for _ in range(5)]
    found = compare_values(np.zeros(60), values, patients)
    assert found.p_wilcoxon == pytest.approx(stats.wilcoxon(gains).pvalue)
    assert (found.n, found.patients) == (60, 12)
    apart = compare_values(np.zeros(60), values, [str(k) for k in range(60)])
    assert apart.ci95[1] - apart.ci95[0] < 0.6 * (found.ci95[1] - found.ci95[0])


def test_rows_are_matched_by_case_and_class() -> None:
    rows_a = [{"id": "c1", "class": "x", "dice": "0.5"}, {"id": "c2", "class": "x", "dice": "0.7"}]
    rows_a += [{"id": "c1", "class": "y", "dice": ""}, {"id": "c9", "class": "x", "dice": "0.1"}]
    rows_b = [{"id": "c2", "class": "x", "dice": 0.8}, {"id": "c1", "class": "x", "dice": 0.6}]
    rows_b += [{"id": "c1", "class": "y", "dice": 0.9}]
    found = compare_rows(rows_a, rows_b, "dice", rounds=50)
    assert (found.n, found.left_out) == (2, 2)
    assert found.difference == pytest.approx(0.1)
    empty = compare_rows(rows_a[2:3], rows_b[2:3], "dice").entry()
    assert (empty["n"], empty["left_out"], empty["difference"], empty["ci95"]) == (0, 1, None, None)
    with pytest.raises(ValueError, match="nsd"):
        compare_rows(rows_a, rows_b, "nsd@1")
    with pytest.raises(ValueError, match="twice"):
        compare_rows([*rows_a, rows_a[0]], rows_b, "dice")
    with pytest.raises(ValueError, match="share no case"):
        compare_rows(rows_a, [{"id": "z", "class": "x", "dice": 1}], "dice")


def test_any_metric_can_be_compared() -> None:
    rng = np.random.default_rng(3)
    targets = rng.integers(0, 2, 120)
    good, poor = targets + rng.normal(0, 0.5, 120), targets + rng.normal(0, 3.0, 120)
    found = paired_difference(
        lambda weights: weighted_auroc(poor, targets, weights),
        lambda weights: weighted_auroc(good, targets, weights),
        [str(k) for k in range(120)],
        rounds=200,
    )
    assert found.ci95[0] > 0.1 and found.p_bootstrap < 0.05


def test_rounds_drawn_in_parts_are_the_rounds_drawn_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    groups, values = ["a", "a", "b", "c", "d"], np.arange(5.0)

    def mean(weights: np.ndarray) -> np.ndarray:
        return weights @ values / weights.sum(1)

    whole = mean(bootstrap_weights(groups, 37, seed=2))
    monkeypatch.setattr("mg3d.metrics.bootstrap.MAX_WEIGHTS_AT_ONCE", 20)
    np.testing.assert_array_equal(bootstrap_values(mean, groups, 37, seed=2), whole)


def test_entries_of_several_metrics_at_once() -> None:
    values = np.array([0.0, 1.0, 2.0, 3.0])
    entries = metric_entries(
        lambda weights: {"mean": weights @ values / weights.sum(1), "never": np.full(len(weights), np.nan)},
        ["a", "b", "c", "d"],
        rounds=100,
    )
    assert entries["mean"]["mean"] == 1.5 and entries["mean"]["n"] == 4
    assert entries["mean"]["ci95"][0] < 1.5 < entries["mean"]["ci95"][1]
    assert entries["never"] == {"mean": None, "ci95": None, "n": 4}


def test_p_values_by_hand() -> None:
    """Every round of a steady gain lies above 0: twice one of (rounds + 1); no difference at all is certain."""
    patients = [str(k) for k in range(6)]
    a = np.array([0.1, 0.5, 0.2, 0.9, 0.4, 0.3])
    for sign in (1.0, -1.0):
        assert compare_values(a, a + sign * 0.1, patients, rounds=99).p_bootstrap == pytest.approx(2 / 100)
    same = compare_values(a, a, patients, rounds=99)
    assert same.p_bootstrap == 1.0 and math.isnan(same.p_wilcoxon)
    undefined = paired_difference(lambda w: w[:, 0] * math.nan, lambda w: w[:, 0] * math.nan, patients, rounds=9)
    assert undefined.ci95 is None and math.isnan(undefined.p_bootstrap)
    assert vars(compare_values(a, a + 0.1, patients)) == vars(compare_values(a, a + 0.1, patients, 2000, 0))


def test_the_signed_rank_test_is_over_the_means_of_patients() -> None:
    a, b = np.zeros(7), np.array([0.3, 0.1, 0.2, -0.1, 0.5, 0.6, 0.7])
    patients = ["a", "a", "b", "c", "d", "e", "f"]
    wanted = stats.wilcoxon([0.2, 0.2, -0.1, 0.5, 0.6, 0.7]).pvalue
    assert compare_values(a, b, patients, rounds=9).p_wilcoxon == pytest.approx(wanted)


def test_rows_without_a_patient_are_patients_of_their_own() -> None:
    rows = [{"id": str(k), "dice": str(0.1 * k), "patient": "one" if k < 3 else ""} for k in range(6)]
    better = [row | {"dice": str(float(row["dice"]) + 0.05)} for row in rows]
    found = compare_rows(rows, better, "dice", rounds=50)
    assert (found.n, found.patients) == (6, 4) and found.difference == pytest.approx(0.05)
    assert vars(found) == vars(compare_rows(rows, better, "dice", ("id", "class"), 50, 0))
