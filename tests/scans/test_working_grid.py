"""The working grid: MONAI's orientation and spacing voxel by voxel, and the exact way back."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Orientation, Spacing

from mg3d.scans.working_grid import plan_grid

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "datasets"))
from segmentation_cases import AFFINES, two_balls

SHAPE = (20, 17, 13)


def noise(shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("name", AFFINES)
@pytest.mark.parametrize("orientation", ["RAS", "LPS"])
@pytest.mark.parametrize("spacing", [None, (1.25, 1.25, 5.0), (1.0, 1.0, 1.0), (2.1, 1.7, 1.3)])
def test_same_voxels_as_monai(name: str, orientation: str, spacing: tuple[float, ...] | None) -> None:
    stored = noise()
    grid = plan_grid(SHAPE, AFFINES[name], orientation, spacing)
    ours = grid.resample(stored, linear=True)
    theirs = Orientation(orientation, labels=(("L", "R"), ("P", "A"), ("I", "S")))(
        MetaTensor(torch.from_numpy(stored)[None], affine=torch.from_numpy(AFFINES[name]))
    )
    if spacing is not None:
        theirs = Spacing(spacing, mode="bilinear", padding_mode="border")(theirs)
    assert grid.shape == ours.shape == tuple(theirs.shape[1:])
    np.testing.assert_allclose(grid.affine, theirs.affine.numpy(), atol=1e-6)
    np.testing.assert_allclose(ours, theirs[0].numpy(), atol=2e-4)
    labels = two_balls(SHAPE)
    if spacing is None:
        assert np.bincount(grid.resample(labels, linear=False).ravel()).tolist() == np.bincount(labels.ravel()).tolist()


@pytest.mark.parametrize("name", AFFINES)
def test_without_resampling_labels_come_back_voxel_by_voxel(name: str) -> None:
    labels = two_balls(SHAPE)
    grid = plan_grid(SHAPE, AFFINES[name], "RAS")
    working = grid.resample(labels, linear=False)
    back = grid.labels_on_stored(np.stack([working == k for k in range(3)]).astype(np.float32))
    assert back.dtype == np.uint8 and np.array_equal(back, labels)


@pytest.mark.parametrize("name", AFFINES)
def test_a_linear_field_survives_the_way_there_and_back(name: str) -> None:
    """Probabilities that are linear in space are interpolated without error, so every stored voxel gets its class."""
    grid = plan_grid(SHAPE, AFFINES[name], "LPS", (1.1, 2.3, 1.9))
    stored = places(AFFINES[name], SHAPE)
    middle, direction = stored.reshape(3, -1).mean(axis=1), np.array([0.61, -0.5, 0.33])
    working_height, height = (
        np.tensordot(direction, each - middle.reshape(3, 1, 1, 1), 1)
        for each in (places(grid.affine, grid.shape), stored)
    )
    values = np.stack([np.zeros_like(working_height), working_height]).astype(np.float32)
    found = grid.labels_on_stored(values).astype(bool)
    inner = (slice(2, -2),) * 3  # beyond the last working voxel the nearest one is repeated
    clear = np.abs(height[inner]) > 1e-3
    assert np.array_equal(found[inner][clear], height[inner][clear] > 0) and 0.3 < found.mean() < 0.7


def places(affine: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """World positions [3,X,Y,Z] of all voxels."""
    return np.einsum("ij,j...->i...", affine[:3, :3], np.indices(shape)) + affine[:3, 3].reshape(3, 1, 1, 1)


def test_a_crop_moves_the_origin_and_its_outside_is_background() -> None:
    labels = two_balls(SHAPE)
    whole = plan_grid(SHAPE, AFFINES["permuted"], "RAS")
    part = whole.part((4, 3, 2), (6, 7, 8))
    np.testing.assert_allclose(part.affine[:3, 3], (whole.affine @ [4, 3, 2, 1])[:3])
    ones = np.stack([np.zeros(part.shape), np.ones(part.shape)]).astype(np.float32)
    found = part.labels_on_stored(ones)
    assert found.shape == labels.shape and found.sum() == 6 * 7 * 8
    inside = whole.resample(found, linear=False)
    assert inside[4:10, 3:10, 2:10].all()


def test_a_spacing_that_hardly_differs_is_kept() -> None:
    grid = plan_grid(SHAPE, np.diag([0.9999, 1.0, 1.0005, 1.0]), "RAS", (1.0, 1.0, 1.0))
    assert grid.shape == SHAPE and grid.scale == (1.0, 1.0, 1.0)
