"""The native store: the whole volume at the target spacing, equal to the published offline step, in bounded memory."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from prepro_builders import chest

from mg3d.datasets.volume import centre_crop, ct_rate_offline_resample, resampled_size, resize_trilinear
from mg3d.scans.geometry import AxisPlan, Geometry, grid_spacing, plan_axes, resample_crop

SPACING = (2.5, 0.9, 1.1)
NATIVE = Geometry(store="native")
Plans = tuple[AxisPlan, AxisPlan, AxisPlan]


@pytest.fixture
def scan() -> np.ndarray:
    """Stored HU [D,H,W] with values beyond the window."""
    return np.ascontiguousarray(chest(shape=(90, 84, 40)).transpose(2, 1, 0)) * np.int16(2)


def test_native_is_the_published_offline_volume(scan: np.ndarray) -> None:
    plans = plan_axes(scan.shape, SPACING, NATIVE)
    stored = resample_crop(scan - np.int16(7), plans, 1.0, 7.0)
    published_zxy = ct_rate_offline_resample(scan.transpose(2, 1, 0), 1.0, 0.0, SPACING)
    assert stored.shape == resampled_size(scan.shape, SPACING, (1.5, 0.75, 0.75)) == (66, 100, 132)
    np.testing.assert_allclose(stored.transpose(0, 2, 1) / 1000, published_zxy, atol=2e-5)
    np.testing.assert_allclose(grid_spacing(plans), (1.5, 0.75, 0.75), rtol=0.02)


@pytest.mark.parametrize("size", [(128, 96, 128), (64, 32, 64), (37, 50, 41)])
def test_cropped_and_resized_native_rows_are_the_crop_store(scan: np.ndarray, size: tuple[int, int, int]) -> None:
    native = resample_crop(scan, plan_axes(scan.shape, SPACING, NATIVE), dtype=np.int16)
    crop = resample_crop(scan, plan_axes(scan.shape, SPACING, Geometry(size=size)))
    online = resize_trilinear(centre_crop(native, NATIVE.crop_fractions), size)
    assert native.dtype == np.int16
    assert np.abs(online - crop).max() <= 0.5 + 1e-3  # of 1 HU: the rounding of the stored voxels


def test_without_target_spacing_the_stored_grid_is_kept(scan: np.ndarray) -> None:
    plans = plan_axes(scan.shape, SPACING, Geometry(target_spacing_mm=None, store="native"))
    np.testing.assert_array_equal(resample_crop(scan, plans, dtype=np.int16), scan.clip(-1000, 1000))
    assert grid_spacing(plans) == pytest.approx(SPACING)


@pytest.mark.parametrize("geometry", [NATIVE, Geometry()], ids=["native", "crop"])
def test_integers_are_the_rounded_floats_whatever_the_order_in_memory(scan: np.ndarray, geometry: Geometry) -> None:
    plans = plan_axes(scan.shape, SPACING, geometry)
    wanted = np.rint(resample_crop(scan, plans, 0.5, 3.0))
    for order in ((0, 1, 2), (1, 2, 0), (2, 1, 0), (1, 0, 2)):
        moved = np.ascontiguousarray(scan.transpose(order)).transpose(np.argsort(order))
        turned = np.ascontiguousarray(moved[::-1, :, ::-1])[::-1, :, ::-1]
        for voxels in (moved, turned, moved.astype(np.float64)):
            np.testing.assert_array_equal(resample_crop(voxels, plans, 0.5, 3.0, dtype=np.int16), wanted)


def test_only_a_few_planes_are_in_memory_beside_input_and_output() -> None:
    voxels = np.zeros((120, 128, 128), dtype=np.int16)
    plans = plan_axes(voxels.shape, (1.0, 1.0, 1.0), NATIVE)
    tracemalloc.start()
    out = resample_crop(voxels, plans, dtype=np.int16)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    plane = 4 * out.shape[1] * out.shape[2]
    assert peak < out.nbytes + 12 * plane
