"""FROC on a phantom whose points are computed by hand, and its rules one by one."""

from __future__ import annotations

import numpy as np
import pytest

from mg3d.metrics.froc import LUNA16_RATES, Candidates, Findings, froc

SCANS = [f"s{k}" for k in range(8)]


def findings(*rows: tuple[str, tuple[float, float, float], float]) -> Findings:
    return Findings([row[0] for row in rows], np.array([row[1] for row in rows]), np.array([row[2] for row in rows]))


def candidates(*rows: tuple[str, tuple[float, float, float], float]) -> Candidates:
    return Candidates([row[0] for row in rows], np.array([row[1] for row in rows]), np.array([row[2] for row in rows]))


NODULES = findings(("s0", (0, 0, 0), 10), ("s1", (50, 0, 0), 6), ("s2", (0, 30, 0), 8), ("s2", (0, 90, 0), 8))
PROPOSED = candidates(
    ("s0", (1, 0, 0), 0.9),  # hit of the first nodule
    ("s0", (0, 2, 0), 0.8),  # the same nodule again: counts as nothing
    ("s3", (0, 0, 0), 0.7),  # false positive 1
    ("s1", (50, 2.9, 0), 0.6),  # hit of the second nodule
    ("s1", (50, 3.1, 0), 0.5),  # just outside its radius of 3 mm: false positive 2
    ("s4", (5, 5, 5), 0.55),  # on an excluded finding: counts as nothing
    ("s2", (0, 31, 0), 0.4),  # hit of the third nodule
    ("s5", (9, 9, 9), 0.4),  # false positive 3, with the same score
    ("s6", (9, 9, 9), 0.1),  # false positive 4
)  # the fourth nodule has no candidate
EXCLUDED = findings(("s4", (5, 5, 7), 6))


def test_phantom_with_points_by_hand() -> None:
    """Scores falling: (0, 1/4), (1/8, 1/4), (1/8, 2/4), (2/8, 2/4), (3/8, 3/4), (4/8, 3/4) of 8 scans, 4 nodules."""
    found = froc(PROPOSED, NODULES, SCANS, excluded=EXCLUDED)
    assert found.fp_per_scan.tolist() == [0, 0, 1 / 8, 1 / 8, 2 / 8, 3 / 8, 4 / 8]
    assert found.sensitivities.tolist() == [0, 1 / 4, 1 / 4, 2 / 4, 2 / 4, 3 / 4, 3 / 4]
    assert tuple(found.sensitivity) == LUNA16_RATES
    by_hand = [0.5, 0.5, 0.75, 0.75, 0.75, 0.75, 0.75]
    assert list(found.sensitivity.values()) == pytest.approx(by_hand)
    assert found.cpm == pytest.approx(sum(by_hand) / 7)
    assert (found.nodules, found.found, found.false_positives, found.ignored, found.repeated) == (4, 3, 4, 1, 1)
    assert found.cpm_ci95 is None and found.entries()["froc@0.125"] == {"mean": 0.5, "ci95": None, "n": 8}


def test_between_two_points_the_curve_is_a_line() -> None:
    found = froc(PROPOSED, NODULES, SCANS, excluded=EXCLUDED, rates=[1 / 16, 5 / 16])
    assert list(found.sensitivity.values()) == pytest.approx([0.25, (0.5 + 0.75) / 2])


def test_without_the_excluded_list_its_candidate_is_a_false_positive() -> None:
    assert froc(PROPOSED, NODULES, SCANS).false_positives == 5


def test_a_perfect_and_an_empty_system() -> None:
    exact = Candidates(NODULES.scan, NODULES.centre_mm, np.ones(4))
    assert froc(exact, NODULES, SCANS).cpm == 1.0
    nothing = froc(Candidates([], np.zeros((0, 3)), np.zeros(0)), NODULES, SCANS)
    assert nothing.cpm == 0.0 and nothing.found == 0
    assert froc(PROPOSED, findings(("s0", (500, 0, 0), 2)), SCANS).cpm == 0.0
    no_nodules = Findings([], np.zeros((0, 3)), np.zeros(0))
    empty = froc(PROPOSED, no_nodules, SCANS)
    assert np.isnan(empty.cpm) and empty.entries()["cpm"]["mean"] is None


def test_order_does_not_matter_and_one_place_may_hit_two_nodules() -> None:
    order = np.random.default_rng(0).permutation(len(PROPOSED.scan))
    mixed = Candidates(
        [PROPOSED.scan[k] for k in order], PROPOSED.position_mm[order], np.asarray(PROPOSED.score)[order]
    )
    assert froc(mixed, NODULES, SCANS, excluded=EXCLUDED).cpm == froc(PROPOSED, NODULES, SCANS, excluded=EXCLUDED).cpm
    pair = findings(("s0", (0, 0, 0), 10), ("s0", (4, 0, 0), 10))
    between = froc(candidates(("s0", (2, 0, 0), 0.9)), pair, SCANS)
    assert (between.found, between.repeated, between.false_positives) == (2, 0, 0)


def test_intervals_are_over_scans_and_seeded() -> None:
    rng = np.random.default_rng(1)
    scans = [f"p{k}" for k in range(60)]
    nodules = Findings(scans, np.zeros((60, 3)), np.full(60, 8.0))
    places = rng.choice([0.0, 50.0], size=(180, 1)) * np.ones((180, 3))
    proposed = Candidates(scans * 3, places, rng.random(180))
    first, second = (froc(proposed, nodules, scans, rounds=200, seed=5) for _ in range(2))
    assert first.cpm_ci95 == second.cpm_ci95
    low, high = first.cpm_ci95
    assert low < first.cpm < high and high - low < 0.4


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="'s9'"):
        froc(candidates(("s9", (0, 0, 0), 1)), NODULES, SCANS)
    with pytest.raises(ValueError, match="once"):
        froc(PROPOSED, NODULES, [*SCANS, "s0"])
    with pytest.raises(ValueError, match="finite scores"):
        froc(candidates(("s0", (0, 0, 0), float("nan"))), NODULES, SCANS)
    with pytest.raises(ValueError, match="diameters"):
        froc(PROPOSED, findings(("s0", (0, 0, 0), 0)), SCANS)
