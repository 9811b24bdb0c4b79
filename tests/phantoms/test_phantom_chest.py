"""Drawn volumes: every finding is visible and masked, drawings repeat, mirrored studies mirror only the side."""

from __future__ import annotations

import numpy as np
import pytest

from mg3d.config_named import NAMED_CONFIGS
from mg3d.datasets.labels import CT_RATE_LABELS
from mg3d.phantoms.canvas import Grid
from mg3d.phantoms.chest import ChestCase, render
from mg3d.phantoms.findings import (
    FINDINGS,
    PREVALENCE,
    SCORED_FINDINGS,
    Lesion,
    draw_lesion,
    draw_lesions,
    label_vector,
    redraw_lesions,
)
from mg3d.phantoms.lesions import ORGANS
from mg3d.phantoms.report import write_report

SMALLEST = Grid((32, 32, 32), (9.4, 12.5, 12.5))


def _case(*lesions: Lesion) -> ChestCase:
    return ChestCase(patient_seed=7, study_seed=8, lesions=lesions)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("finding", FINDINGS)
def test_each_finding_shows_on_the_smallest_grid_and_only_in_its_mask(finding: str, seed: int) -> None:
    lesion = draw_lesion(finding, np.random.default_rng(seed))
    healthy, ill = render(_case(), SMALLEST), render(_case(lesion), SMALLEST)
    change = np.abs(ill.hu.astype(int) - healthy.hu)
    assert change.max() > 50
    assert ill.mask(finding).any()
    assert change[ill.mask(finding)].max() > 50
    others = [name for name in CT_RATE_LABELS if name != finding]
    assert not any(ill.mask(name).any() for name in others)
    assert not any(healthy.mask(name).any() for name in CT_RATE_LABELS)


def test_labels_can_be_read_off_the_masks_of_whole_studies() -> None:
    rng = np.random.default_rng(5)
    for seed in range(12):
        lesions = draw_lesions(rng)
        phantom = render(ChestCase(seed, seed, lesions), SMALLEST)
        seen = np.asarray([phantom.mask(name).any() for name in CT_RATE_LABELS])
        np.testing.assert_array_equal(seen, label_vector(lesions) == 1)


def test_the_same_seeds_give_the_same_bytes_and_others_do_not() -> None:
    lesions = draw_lesions(np.random.default_rng(3))
    first, second = render(_case(*lesions), SMALLEST), render(_case(*lesions), SMALLEST)
    assert first.hu.tobytes() == second.hu.tobytes()
    assert first.finding_bits.tobytes() == second.finding_bits.tobytes()
    assert render(_case(*lesions), SMALLEST, reconstruction=1).hu.tobytes() != first.hu.tobytes()
    assert render(ChestCase(9, 8, lesions), SMALLEST).hu.tobytes() != first.hu.tobytes()


def test_volumes_look_like_chest_ct() -> None:
    phantom = render(_case(), Grid((40, 48, 56), (7.5, 8.3, 7.2)))
    lungs = np.isin(phantom.organs, [ORGANS["left lung"], ORGANS["right lung"]])
    assert phantom.hu.dtype == np.int16 and phantom.hu.shape == (40, 48, 56)
    assert -900 < phantom.hu[lungs].mean() < -750
    assert 30 < np.median(phantom.hu[phantom.organs == ORGANS["heart"]]) < 60
    assert abs(phantom.hu[:, :6].mean() + 1000) < 30
    # Canonical order: the heart lies to the patient's left (higher x), the spine to the back (higher y).
    place = {name: np.argwhere(phantom.organs == code).mean(0) for name, code in ORGANS.items()}
    assert place["heart"][2] > 28 + 1 and place["left lung"][2] > place["right lung"][2]
    assert place["heart"][1] < place["aorta"][1]
    assert place["abdomen"][0] < place["airway"][0]


def test_a_sided_lesion_is_painted_on_its_side() -> None:
    for finding in ("Pleural effusion", "Consolidation", "Lung opacity", "Lung nodule", "Medical material"):
        lesion = Lesion(finding, "left", "lower", 40.0, 1, 11)
        left = np.argwhere(render(_case(lesion), SMALLEST).mask(finding))[:, 2].mean()
        right = np.argwhere(render(_case(lesion.mirrored()), SMALLEST).mask(finding))[:, 2].mean()
        assert left > 16 > right


def test_mirroring_changes_side_words_and_nothing_else() -> None:
    swap = {"left": "right", "right": "left", "Left": "Right", "Right": "Left"}
    for seed in range(20):
        lesions = draw_lesions(np.random.default_rng(seed))
        report = write_report(lesions, np.random.default_rng(seed))
        mirrored = write_report([lesion.mirrored() for lesion in lesions], np.random.default_rng(seed))
        for text, other in ((report.findings, mirrored.findings), (report.impression, mirrored.impression)):
            assert [swap.get(word, word) for word in text.split()] == other.split()
        np.testing.assert_array_equal(label_vector(lesions), label_vector([lesion.mirrored() for lesion in lesions]))


def test_findings_occur_at_their_prevalence() -> None:
    rng = np.random.default_rng(0)
    labels = np.asarray([label_vector(draw_lesions(rng)) for _ in range(3000)])
    for finding, share in PREVALENCE.items():
        assert abs(labels[:, CT_RATE_LABELS.index(finding)].mean() - share) < 0.03
    assert set(SCORED_FINDINGS) <= set(FINDINGS) <= set(CT_RATE_LABELS)


def test_a_follow_up_keeps_some_findings_as_they_were() -> None:
    rng = np.random.default_rng(1)
    first = tuple(draw_lesion(finding, rng) for finding in FINDINGS)
    second = redraw_lesions(first, rng)
    kept = set(first) & set(second)
    assert 0 < len(kept) < len(first)
    assert [lesion.finding for lesion in second] == [f for f in FINDINGS if f in {s.finding for s in second}]


@pytest.mark.parametrize(("shape", "spacing"), [((31, 32, 32), (9.0, 9.0, 9.0)), ((32, 32, 32), (9.0, 0.0, 9.0))])
def test_impossible_grids_are_refused(shape: tuple[int, int, int], spacing: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="got"):
        Grid(shape, spacing)


def test_unknown_findings_are_refused() -> None:
    with pytest.raises(ValueError, match="Atelectasis"):
        draw_lesion("Atelectasis", np.random.default_rng(0))


def test_the_demo_scores_the_findings_fixed_beforehand() -> None:
    assert tuple(NAMED_CONFIGS["demo"][1]["eval_findings"]) == SCORED_FINDINGS
