"""The evaluation table: a planted signal shows, shuffled volumes give chance, missing parts are null."""

from __future__ import annotations

import numpy as np
import pytest

from mg3d.evaluation.report import Cases, ProbeArrays, SharedSpace, evaluation_entries
from mg3d.evaluation.table import render_table

FINDINGS = ["Cardiomegaly", "Emphysema", "Hiatal hernia"]


def unit(array: np.ndarray) -> np.ndarray:
    return array / np.linalg.norm(array, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def arrays() -> dict:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (260, 3))
    labels[:, 2] = 0
    signal = rng.normal(size=(3, 16))
    features = rng.normal(size=(260, 16)) + 1.5 * labels @ signal
    noise = rng.normal(size=(260, 16))
    patients = [f"p{i // 2}" for i in range(260)]
    latent = rng.normal(size=(100, 8)) + labels[160:] @ signal[:, :8]
    space = SharedSpace(
        image=unit(latent + 0.5 * rng.normal(size=(100, 8))),
        text=unit(latent + 0.5 * rng.normal(size=(100, 8))),
        prompt_direction=unit(signal[:, :8]),
        name="planted",
    )
    reports = [f"report {i}" for i in range(160)] + [f"report {i // 2}" for i in range(100)]
    return {
        "trained": ProbeArrays(features[:160], features[160:]),
        "random": ProbeArrays(noise[:160], noise[160:]),
        "train": Cases(labels[:160], patients[:160], reports[:160]),
        "test": Cases(labels[160:], patients[160:], reports[160:]),
        "findings": FINDINGS,
        "space": space,
        "rounds": 100,
        "seed": 0,
    }


def test_planted_signal_is_found_and_shuffled_volumes_are_at_chance(arrays: dict) -> None:
    metrics = evaluation_entries(**arrays)
    assert metrics["linear_probe_gain"]["ci95"][0] > 0.05
    for name, control in metrics["permuted_images"].items():
        assert control["ci95"][0] <= control["chance"] <= control["ci95"][1], name
    assert metrics["report_to_volume_recall_at_10"]["times_chance"] > 2
    low, high = metrics["zero_shot_auroc"]["ci95"]
    assert low <= metrics["zero_shot_auroc"]["mean"] <= high
    assert metrics["zero_shot_auroc"]["mean"] > 0.6
    rank = metrics["effective_rank_image_embeddings"]
    assert 1.0 < rank["ci95"][0] < rank["mean"] < rank["ci95"][1]
    assert rank["mean"] <= rank["largest_possible"] == 8


def test_a_finding_without_both_classes_is_null_and_left_out_of_the_mean(arrays: dict) -> None:
    metrics = evaluation_entries(**arrays)
    probe = metrics["linear_probe_auroc_trained"]
    assert probe["per_class"]["Hiatal hernia"]["mean"] is None
    known = [probe["per_class"][name]["mean"] for name in FINDINGS[:2]]
    assert probe["mean"] == pytest.approx(np.mean(known))


def test_identical_reports_are_one_candidate(arrays: dict) -> None:
    metrics = evaluation_entries(**arrays)
    assert metrics["volume_to_report_recall_at_1"]["candidates"] == 50
    assert metrics["volume_to_report_recall_at_1"]["chance"] == pytest.approx(1 / 50)
    assert metrics["report_to_volume_recall_at_1"]["chance"] == pytest.approx(2 / 100)


def test_same_seed_same_numbers(arrays: dict) -> None:
    assert evaluation_entries(**arrays) == evaluation_entries(**arrays)


def test_without_a_shared_space_retrieval_is_null_and_the_table_says_so(arrays: dict) -> None:
    metrics = evaluation_entries(**{**arrays, "space": None})
    assert metrics["zero_shot_auroc"] is None
    assert "no shared image-text space" in render_table(metrics)


def test_table_shows_every_scored_finding_and_direction(arrays: dict) -> None:
    text = render_table(evaluation_entries(**arrays))
    assert "Hiatal hernia" not in text
    for expected in [*FINDINGS[:2], "volume to report R@5", "report to volume R@1", "random encoder", "95 %"]:
        assert expected in text
