"""Training crops: their centres, their changes, and that chance comes from the generator alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from segmentation_cases import task, two_balls, write_case

from mg3d.datasets.segmentation_case import PreparedCase, prepare_case
from mg3d.datasets.segmentation_crops import CropCentres, draw_crops
from mg3d.finetuning.benchmark import AugmentationOptions
from mg3d.scans.working_grid import plan_grid

SHAPE = (30, 28, 26)
STRONG = AugmentationOptions(
    flip_p=0.5,
    rot90_p=0.5,
    affine_p=0.9,
    affine_rotate_rad=(0.1, 0.1, 0.2),
    affine_scale=(0.1, 0.1, 0.1),
    affine_translate_voxels=(1.0, 1.0, 1.0),
    noise_p=0.5,
    noise_std=0.01,
    zoom_p=0.3,
    zoom_range=(1.3, 1.5),
    intensity_scale_p=0.5,
    intensity_scale=0.1,
    intensity_shift_p=0.5,
    intensity_shift=0.1,
)


def prepared(labels: np.ndarray | None = None) -> PreparedCase:
    labels = two_balls(SHAPE) if labels is None else labels
    image = (0.1 + 0.3 * labels).astype(np.float32)
    return PreparedCase(image, labels, plan_grid(labels.shape, np.eye(4), "RAS"))


def test_positive_two_to_negative_one_over_300_crops() -> None:
    case = prepared()
    centres = CropCentres(case.label, case.image, 2 / 3)
    chance = np.random.default_rng(1)
    found = [case.label[centres.draw(chance)] > 0 for _ in range(300)]
    assert 180 <= sum(found) <= 220
    options = task(roi=(1, 1, 1), crops_per_volume=300, positive=2.0, negative=1.0)
    _, labels = draw_crops(case, options, np.random.default_rng(1))
    assert 180 <= int((labels > 0).sum()) <= 220


def test_without_one_kind_the_other_is_taken_and_background_lies_inside_the_image() -> None:
    empty = prepared(np.zeros(SHAPE, dtype=np.uint8))
    image = np.zeros(SHAPE, dtype=np.float32)
    image[20:24, 20:24, 20:24] = -0.5
    rng = np.random.default_rng(0)
    centres = CropCentres(empty.label, image, 1.0)
    assert all(image[centres.draw(rng)] != 0 for _ in range(50))
    full = np.ones(SHAPE, dtype=np.uint8)
    assert full[CropCentres(full, image, 0.0).draw(rng)] == 1
    above = np.where(image < 0, 0.7, 0).astype(np.float32) - (np.indices(SHAPE)[0] < 5)
    published = CropCentres(empty.label, above, 0.0, above_zero=True)
    assert all(above[published.draw(rng)] > 0 for _ in range(50))


def test_same_generator_same_crops_and_another_one_others() -> None:
    options = task(roi=(16, 16, 12), crops_per_volume=3, augmentation=STRONG)
    one, other, third = (draw_crops(prepared(), options, np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert np.array_equal(one[0], other[0]) and np.array_equal(one[1], other[1])
    assert not np.array_equal(one[0], third[0])
    assert one[0].shape == one[1].shape == (3, 16, 16, 12)
    assert (one[0].dtype, one[1].dtype) == (np.float32, np.uint8)


def test_image_and_label_move_together() -> None:
    still = AugmentationOptions(**{**vars(STRONG), "noise_p": 0.0, "intensity_scale_p": 0.0, "intensity_shift_p": 0.0})
    images, labels = draw_crops(prepared(), task(roi=(16, 16, 16), crops_per_volume=12, augmentation=still), rng(3))
    agree = np.abs(images - (0.1 + 0.3 * labels)) < 0.16  # between voxels the image is interpolated
    inside = images > 0
    assert agree[inside].mean() > 0.97 and (labels > 0).any()


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_an_affine_change_of_zero_is_the_plain_crop() -> None:
    nothing = AugmentationOptions(affine_p=1.0)
    plain = draw_crops(prepared(), task(roi=(10, 12, 8), crops_per_volume=4, positive=0.0), rng(2))
    case, roi = prepared(), (10, 12, 8)
    moved = draw_crops(case, task(roi=roi, crops_per_volume=1, positive=0.0, augmentation=nothing), rng(2))
    np.testing.assert_allclose(moved[0][0], plain[0][0], atol=1e-6)
    assert np.array_equal(moved[1][0], plain[1][0])


def test_a_zoom_enlarges() -> None:
    zoomed = AugmentationOptions(zoom_p=1.0, zoom_range=(2.0, 2.0))
    labels = np.zeros(SHAPE, dtype=np.uint8)
    labels[13:17, 12:16, 11:15] = 1
    options = {"roi": (24, 24, 24), "crops_per_volume": 1, "negative": 0.0}
    _, plain = draw_crops(prepared(labels), task(**options), rng(0))
    _, large = draw_crops(prepared(labels), task(**options, augmentation=zoomed), rng(0))
    assert plain.sum() == 64 and large.sum() == pytest.approx(512, rel=0.3)


def test_a_volume_smaller_than_the_crop_is_filled_with_zeros(tmp_path: Path) -> None:
    case = prepare_case(write_case(tmp_path, shape=(20, 20, 10)), task())
    images, labels = draw_crops(case, task(roi=(32, 32, 32)), rng(0))
    assert images.shape == (2, 32, 32, 32)
    assert images[0].sum() == pytest.approx(case.image.sum(), rel=1e-5) and labels[0].sum() == case.label.sum()


def test_weights_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="not both 0"):
        draw_crops(prepared(), task(positive=0.0, negative=0.0), rng(0))
