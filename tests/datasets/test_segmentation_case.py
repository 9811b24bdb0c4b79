"""Reading and preprocessing of one case: nothing lost, fixed labels, published intensities and crops."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import CropForegroundd, NormalizeIntensity
from segmentation_cases import AFFINES, ct_of, task, two_balls, write_case, write_volume

from mg3d.datasets.segmentation_case import prepare_case, read_label_map
from mg3d.errors import DataError
from mg3d.finetuning.benchmark import Case
from mg3d.finetuning.scan_checks import check_pairs
from tools.label_scores.cases import Settings, score_pair

SHAPE = (24, 22, 10)


def counts(labels: np.ndarray | None) -> list[int]:
    assert labels is not None
    return np.bincount(labels.ravel(), minlength=3)[1:].tolist()


def mri_case(folder: Path) -> Case:
    """Nothing outside a box but labelled voxels, dark tissue inside, and a bright middle."""
    labels = two_balls(SHAPE)
    image = np.zeros(SHAPE, dtype=np.int16)
    image[labels > 0] = 1
    image[2:20, 3:19, 1:9] += 100
    image[8:12, 8:12, 3:6] += 900
    path = write_volume(folder / "mri.nii.gz", image, AFFINES["anisotropic"])
    return Case("mri", "p", path, write_volume(folder / "mri_seg.nii.gz", labels, AFFINES["anisotropic"]))


@pytest.mark.parametrize("name", AFFINES)
@pytest.mark.parametrize("crop", ["none", "raw"])
def test_no_label_voxel_is_lost_without_resampling(tmp_path: Path, name: str, crop: str) -> None:
    case = write_case(tmp_path, affine=AFFINES[name], shape=SHAPE)
    prepared = prepare_case(case, task(foreground_crop=crop))
    assert counts(prepared.label) == counts(two_balls(SHAPE))
    assert prepared.image.shape == prepared.label.shape and prepared.image.dtype == np.float32


def test_clean_mri_keeps_all_labels_and_the_published_crop_would_not(tmp_path: Path) -> None:
    case = mri_case(tmp_path)
    published = task(window=None, foreground_crop="reference_zscore", roi=(4, 4, 4))
    kept = prepare_case(case, replace(published, foreground_crop="raw"))
    lost = prepare_case(case, published)
    assert counts(kept.label) == counts(two_balls(SHAPE))
    assert sum(counts(lost.label)) < sum(counts(kept.label))
    image = read_image(case)
    scaled = NormalizeIntensity(nonzero=True, channel_wise=True)(image[None])
    data = {"image": MetaTensor(torch.as_tensor(scaled))}
    theirs = CropForegroundd("image", "image", k_divisible=(4, 4, 4), allow_smaller=True)(data)["image"]
    np.testing.assert_allclose(lost.image, theirs[0].numpy(), atol=1e-5)


def read_image(case: Case) -> np.ndarray:
    import nibabel as nib

    return np.asarray(nib.load(case.image).dataobj, dtype=np.float32)


def test_window_ends_map_to_zero_and_one_on_the_asked_spacing(tmp_path: Path) -> None:
    image = np.full(SHAPE, -1000, dtype=np.int16)
    image[12:] = 500
    image[0], image[-1] = -3024, 3000
    affine = np.diag([-0.8, -0.8, 2.5, 1.0])
    case = Case("c", "p", write_volume(tmp_path / "c.nii.gz", image, affine))
    prepared = prepare_case(case, task(orientation="LPS", spacing_mm=(1.25, 1.25, 5.0)))
    np.testing.assert_allclose(prepared.grid.spacing_mm, (1.25, 1.25, 5.0))
    assert prepared.label is None and set(np.unique(prepared.image)) >= {0.0, 1.0}
    assert prepared.image.min() == 0.0 and prepared.image.max() == 1.0


def test_the_label_map_is_fixed_whatever_a_case_holds(tmp_path: Path) -> None:
    labels = two_balls(SHAPE)
    only_two = np.where(labels == 2, 2, 0).astype(np.uint8)
    image = write_volume(tmp_path / "c.nii.gz", ct_of(labels), AFFINES["lps"])
    case = Case("c", "p", image, write_volume(tmp_path / "l.nii.gz", only_two, AFFINES["lps"]))
    assert set(np.unique(read_label_map(case, task()))) == {0, 2}
    merged = task(label_map={1: 1, 2: 1}, classes=("any",))
    assert read_label_map(case, merged).sum() == (only_two > 0).sum()
    with pytest.raises(DataError, match="values 2 are none of"):
        read_label_map(case, task(label_map={1: 1}, classes=("soft",)))


def test_pairs_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    labels = two_balls(SHAPE)
    image = write_volume(tmp_path / "c.nii.gz", ct_of(labels), AFFINES["lps"])
    shorter = write_volume(tmp_path / "short.nii.gz", labels[:, :, :-1], AFFINES["lps"])
    with pytest.raises(DataError, match="the image has"):
        prepare_case(Case("c", "p", image, shorter), task())
    turned = write_volume(tmp_path / "turned.nii.gz", labels, AFFINES["flipped_z"])
    with pytest.raises(DataError, match="elsewhere in space"):
        prepare_case(Case("c", "p", image, turned), task())
    halves = write_volume(tmp_path / "halves.nii.gz", labels * np.float32(0.5), AFFINES["lps"])
    with pytest.raises(DataError, match="hold no whole number"):
        prepare_case(Case("c", "p", image, halves), task())
    with pytest.raises(DataError, match="case gone"):
        prepare_case(Case("gone", "p", tmp_path / "gone.nii.gz"), task())


TURNS = {
    "flipped": [[0, -1], [1, 1], [2, -1]],
    "permuted": [[2, 1], [0, -1], [1, 1]],
    "as the image": [[0, 1], [1, 1], [2, 1]],
}


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("stored", ["bytes", "one more axis", "nearly whole"])
@pytest.mark.parametrize("place", ["lps", "oblique"])
def test_a_label_map_stored_otherwise_trains_checks_and_scores_as_the_plain_one(
    turn: str, stored: str, place: str, tmp_path: Path
) -> None:
    labels, affine = two_balls((20, 18, 12)), AFFINES[place]
    image = write_volume(tmp_path / "c.nii.gz", ct_of(labels), affine)
    plain = write_volume(tmp_path / "plain.nii.gz", labels, affine)
    other = nib.Nifti1Image(labels, affine).as_reoriented(np.array(TURNS[turn]))
    voxels = np.asarray(other.dataobj)
    if stored == "one more axis":
        voxels = voxels[..., None]
    if stored == "nearly whole":
        voxels = voxels.astype(np.float32) * np.float32(0.99999994)
    nib.save(nib.Nifti1Image(voxels, other.affine), tmp_path / "other.nii.gz")
    case = Case("c", "p", image, tmp_path / "other.nii.gz")

    assert check_pairs([case], (0, 1, 2), full=True) == []
    wanted, found = prepare_case(replace(case, label=plain), task()), prepare_case(case, task())
    assert np.array_equal(wanted.label, found.label) and found.label.sum() > 0
    grid = found.grid
    assert np.array_equal(read_label_map(case, task(), grid.stored_shape, grid.stored_affine), labels)
    scores = score_pair(plain, case.label, Settings(None, "deepmind", (1.0,)))
    assert scores["1"]["dice"] == scores["2"]["dice"] == 1 and scores["1"]["hd95"] == 0


@pytest.mark.parametrize(
    ("change", "count"), [(lambda v: v * np.float32(0.5), "voxels"), (lambda v: v + np.float32(0.01), "4320 voxels")]
)
def test_labels_that_are_no_whole_numbers_are_refused_alike(change: Any, count: str, tmp_path: Path) -> None:
    labels = two_balls((20, 18, 12))
    image = write_volume(tmp_path / "c.nii.gz", ct_of(labels), AFFINES["lps"])
    wrong = write_volume(tmp_path / "wrong.nii.gz", change(labels.astype(np.float32)), AFFINES["lps"])
    case = Case("c", "p", image, wrong)
    with pytest.raises(DataError) as training:
        prepare_case(case, task())
    with pytest.raises(DataError) as scoring:
        score_pair(wrong, wrong, Settings(None, "deepmind", (1.0,)))
    (line,) = check_pairs([case], (0, 1, 2))
    for said in (str(training.value), str(scoring.value), line):
        assert "hold no whole number, such as" in said and count in said and "wrong.nii.gz" in said


def test_a_label_map_on_another_grid_is_refused_alike(tmp_path: Path) -> None:
    labels = two_balls((20, 18, 12))
    image = write_volume(tmp_path / "c.nii.gz", ct_of(labels), AFFINES["lps"])
    plain = write_volume(tmp_path / "plain.nii.gz", labels, AFFINES["lps"])
    moved = AFFINES["lps"].copy()
    moved[0, 3] += 1.5
    for voxels, affine in (
        (labels, moved),
        (labels, np.diag([1.5, -1.5, 3.0, 1.0])),
        (labels[::-1, :-1], AFFINES["lps"]),
    ):
        case = Case("c", "p", image, write_volume(tmp_path / "wrong.nii.gz", voxels, affine))
        assert len(check_pairs([case], (0, 1, 2))) == 1
        with pytest.raises(DataError):
            prepare_case(case, task())
        with pytest.raises(DataError):
            score_pair(plain, case.label, Settings(None, "deepmind", (1.0,)))
