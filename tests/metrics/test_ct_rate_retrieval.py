"""Retrieval among CT-RATE's volumes: recorded values, pools, ties, and queries kept out of their own gallery."""

from __future__ import annotations

import numpy as np
import pytest

from mg3d.metrics.label_retrieval import label_overlap, map_at_k, overlap_at_k
from mg3d.metrics.report_retrieval import POOLS, recall_entries, select_pool, study_of

LABELS = np.array([[1, 0, 0, 1], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [1, 1, 0, 1]])
LATENTS = np.array([(1, 0, 0), (0.9, 0.1, 0), (0, 1, 0), (0, 0, 1), (0.6, 0.6, 0)])
SCORES = np.array([[0.9, 0.2, 0.1, 0.3], [0.8, 0.7, 0.1, 0], [0.1, 0.2, 0.3, 0.4], [0, 0.1, 0.2, 0.9]])


def test_the_recorded_map() -> None:
    clean = map_at_k(LATENTS, LABELS, (1, 2, 3))
    assert list(clean.values()) == pytest.approx([0.416667, 0.416667, 0.305556], abs=1e-6)
    reference = map_at_k(LATENTS, LABELS, (1, 2, 3), protocol="reference")
    assert list(reference.values()) == pytest.approx([0.8, 0.566667, 0.488889], abs=1e-6)


def test_cut_offs_do_not_depend_on_each_other() -> None:
    together = map_at_k(LATENTS, LABELS, (1, 3, 50))
    assert together == {k: map_at_k(LATENTS, LABELS, (k,))[k] for k in (1, 3, 50)}
    assert together[50] == together[3]  # the gallery holds three others


def test_a_patient_is_out_of_its_own_gallery() -> None:
    values, queries = overlap_at_k(LATENTS, LABELS, (1,), groups=["p", "p", "q", "r", "s"])
    assert queries.tolist() == [0, 1, 2, 4]
    assert values[1] == pytest.approx([2 / 3, 1 / 3, 1 / 3, 1 / 3])
    with pytest.raises(ValueError, match="empty"):
        overlap_at_k(LATENTS, LABELS, (1,), groups=["p"] * 5)


def test_overlap_of_label_sets() -> None:
    found = label_overlap(LABELS == 1, LABELS == 1)
    assert found[0].tolist() == pytest.approx([1, 0.5, 0, 0, 2 / 3])
    assert found[3, 3] == 0.0


def test_unusable_latents_are_refused() -> None:
    for wrong in (LATENTS * 0, np.where(LATENTS == 1, np.nan, LATENTS), LATENTS[:3]):
        with pytest.raises(ValueError, match="non-zero"):
            map_at_k(wrong, LABELS, (1,))
    with pytest.raises(ValueError, match="no volume"):
        map_at_k(LATENTS, LABELS * 0, (1,))


def test_the_recorded_recall() -> None:
    found = recall_entries(SCORES, (1, 2, 3), pool="volumes", rounds=50)
    assert [found[f"recall@{k}"]["mean"] for k in (1, 2, 3)] == [0.5, 1.0, 1.0]
    assert [found[f"recall@{k}"]["chance"] for k in (1, 2, 3)] == pytest.approx([0.25, 0.5, 0.75])
    assert found["recall@1"]["pool"] == "volumes (4)" and found["median_rank"]["mean"] == 1.5


def test_random_scores_are_at_chance_and_ties_count_against() -> None:
    rng = np.random.default_rng(0)
    found = recall_entries(rng.random((400, 400)), (5, 50), pool="studies", rounds=200)
    for k in (5, 50):
        entry = found[f"recall@{k}"]
        assert entry["chance"] == pytest.approx(k / 400)
        assert abs(entry["mean"] - k / 400) < 3 * np.sqrt(k / 400 / 400)
        assert entry["ci95"][0] <= entry["mean"] <= entry["ci95"][1]
    assert recall_entries(np.zeros((9, 9)), (1, 8), pool="volumes", rounds=5)["recall@8"]["mean"] == 0.0
    with pytest.raises(ValueError, match="one pool"):
        recall_entries(SCORES[:3], (1,), pool="volumes")


def test_identical_reports_share_their_answers() -> None:
    same = np.array([0, 1, 2, 2])
    found = recall_entries(SCORES, (1,), pool="volumes", same=same, rounds=5)
    assert found["recall@1"]["mean"] == 0.75  # the third report finds the volume of the fourth
    assert found["recall@1"]["chance"] == pytest.approx((1 / 4 + 1 / 4 + 1 / 2 + 1 / 2) / 4)


def test_pools_are_named_selections() -> None:
    names = ["valid_1_a_1.nii.gz", "valid_1_a_2.nii.gz", "valid_1_b_1.nii.gz", "valid_20_a_1.nii.gz", "own"]
    reports = ["Clear.", "Clear.", "Nodule.", "clear. ", "Other."]
    found = {pool: select_pool(names, reports, pool, excluded={"own"}).tolist() for pool in POOLS}
    assert found["volumes"] == [0, 1, 2, 3, 4] and found["corrected"] == [0, 1, 2, 3]
    assert found["studies"] == [0, 2, 3, 4] and found["unique_reports"] == [0, 2, 4]
    assert [study_of(name) for name in (names[1], "valid_9_aa_3.nii.gz.npz", "own")] == [
        "valid_1_a",
        "valid_9_aa",
        "own",
    ]
    for pool in ("corrected", "everything"):
        with pytest.raises(ValueError, match="pool"):
            select_pool(names, reports, pool)  # type: ignore[arg-type]


def test_the_official_validation_set_has_the_published_pool_sizes() -> None:
    """1,564 studies of 1,304 patients, 3,039 volumes, 37 of them on the list of wrong ones."""
    studies = [f"valid_{n + 1}_a" for n in range(1304)] + [f"valid_{n + 1}_b" for n in range(260)]
    names = [f"{study}_{k}" for place, study in enumerate(studies) for k in range(1, 3 if place < 1475 else 2)]
    reports = [study_of(name) if place % 10 else "No finding." for place, name in enumerate(names)]
    wrong = set(names[::83])
    assert (len(names), len(wrong)) == (3039, 37)
    sizes = {pool: len(select_pool(names, reports, pool, wrong)) for pool in POOLS}
    assert (sizes["volumes"], sizes["corrected"], sizes["studies"]) == (3039, 3002, 1564)
    assert sizes["unique_reports"] == len(set(reports)) < 1564 + 1
