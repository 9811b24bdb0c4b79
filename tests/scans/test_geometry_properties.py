"""Properties of the geometry on drawn grids: shapes, places in the world, bounds and the cost of rounding."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mg3d.datasets.volume import resampled_size, to_unit_range
from mg3d.scans.geometry import (
    RAS_TO_LPS,
    Geometry,
    canonical_with_affine,
    grid_spacing,
    plan_axes,
    resample_crop,
    to_canonical,
)

SHAPES = st.tuples(*[st.integers(2, 12)] * 3)
SPACINGS = st.tuples(*[st.floats(0.3, 5.0)] * 3)
DIRECTIONS = [
    np.array([[sign * (axis == place) for place in range(3)] for axis, sign in zip(order, signs, strict=True)], float)
    for order in itertools.permutations(range(3))
    for signs in itertools.product((1, -1), repeat=3)
]


def volume(shape: tuple[int, int, int], seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1500, 1500, shape).astype(np.int16)


@given(SHAPES, SPACINGS, st.sampled_from(DIRECTIONS), st.tuples(*[st.floats(-300, 300)] * 3))
@settings(max_examples=200, deadline=None)
def test_reordering_leaves_every_voxel_at_its_place_in_the_world(
    shape: tuple, spacing: tuple, directions: np.ndarray, origin: tuple
) -> None:
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = directions * spacing, origin
    stored = np.arange(np.prod(shape)).reshape(shape)
    canonical, to_world = canonical_with_affine(stored, affine)
    assert (np.diag(to_world)[:3] > 0).all() and np.count_nonzero(to_world[:3, :3]) == 3
    for depth, row, column in ((0, 0, 0), tuple(size - 1 for size in canonical.shape), (0, canonical.shape[1] - 1, 0)):
        x, y, z = np.unravel_index(canonical[depth, row, column], shape)
        wanted = RAS_TO_LPS @ affine @ (x, y, z, 1)
        np.testing.assert_allclose(to_world @ (column, row, depth, 1), wanted, atol=1e-9)


@given(
    SHAPES,
    SPACINGS,
    st.tuples(*[st.integers(1, 20)] * 3),
    st.tuples(*[st.floats(0.3, 1.0)] * 3),
    st.sampled_from(["crop", "native"]),
    st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_resampling_keeps_its_shape_and_bounds_and_states_its_spacing(
    shape: tuple, spacing: tuple, size: tuple, fractions: tuple, store: str, resampled: bool
) -> None:
    target = (1.5, 0.75, 0.75) if resampled else None
    geometry = Geometry(size=size, target_spacing_mm=target, crop_fractions=fractions, store=store)
    plans = plan_axes(shape, spacing, geometry)
    stored = volume(shape, sum(shape))
    out = resample_crop(stored, plans)
    clipped = np.clip(stored, -1000, 1000)
    assert clipped.min() - 0.01 <= out.min() and out.max() <= clipped.max() + 0.01
    middle = resampled_size(shape, spacing, target) if target else shape
    assert out.shape == (size if store == "crop" else middle)
    extent = np.multiply(out.shape, grid_spacing(plans))
    assert (extent <= np.multiply(shape, spacing) * (1 + 1e-6)).all()
    if store == "native":
        np.testing.assert_allclose(extent, np.multiply(shape, spacing), rtol=1e-6)


@given(SHAPES, SPACINGS, st.tuples(*[st.integers(1, 12)] * 3))
@settings(max_examples=200, deadline=None)
def test_packing_rounds_by_at_most_half_a_hounsfield_unit(shape: tuple, spacing: tuple, size: tuple) -> None:
    """The stated bound: 0.5 HU, 2.5e-4 of the window's unit range; nothing else is lost between scan and sample."""
    plans = plan_axes(shape, spacing, Geometry(size=size))
    stored = volume(shape, sum(size))
    exact, packed = resample_crop(stored, plans), resample_crop(stored, plans, dtype=np.int16)
    assert packed.dtype == np.int16 and np.abs(packed - exact).max() <= 0.5
    assert np.abs(to_unit_range(packed) - (exact + 1000) / 2000).max() <= 0.5 / 2000 + 1e-6


@given(st.lists(st.integers(-32768, 32767), min_size=2, max_size=50), st.integers(-2000, 500), st.integers(1, 3000))
@settings(max_examples=200, deadline=None)
def test_windowing_is_monotone_and_bounded_for_every_window(values: list[int], low: int, width: int) -> None:
    hu = np.sort(np.asarray(values, dtype=np.int16))
    unit = to_unit_range(hu, (low, low + width))
    assert (np.diff(unit) >= 0).all() and unit.min() >= 0.0 and unit.max() <= 1.0
    assert (unit[hu <= low] == 0).all() and unit[hu >= low + width] == pytest.approx(1.0)


def test_the_spacing_of_corner_to_corner_grids() -> None:
    whole = Geometry(size=(9, 3, 1), target_spacing_mm=None, crop_fractions=(1.0, 1.0, 1.0))
    found = grid_spacing(plan_axes((5, 5, 5), (2.0, 2.0, 2.0), whole, align_corners=True))
    assert found == pytest.approx((1.0, 4.0, 8.0))
    assert grid_spacing(plan_axes((5, 5, 5), (2.0, 2.0, 2.0), whole)) == pytest.approx((10 / 9, 10 / 3, 10.0))


@pytest.mark.parametrize("degrees", [5.0, 20.0, 40.0])
@pytest.mark.parametrize("shape", [(11, 12, 9), (10, 13, 8)])
def test_a_straightened_scan_holds_its_box_on_a_grid_of_the_same_parity(degrees: float, shape: tuple) -> None:
    """The canonical box of the corners, at most two voxels larger, an even number larger than the stored grid."""
    angle = np.radians(degrees)
    affine = np.diag([-2.0, -2.0, 3.0, 1.0])
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    affine[:2, :2] = turn @ affine[:2, :2]
    straight, spacing, tilt = to_canonical(np.full(shape, 100, np.int16), affine, (2.0, 2.0, 3.0), fill=-1000.0)
    assert tilt == pytest.approx(degrees) and spacing == (3.0, 2.0, 2.0)
    x, y = 2.0 * (shape[0] - 1), 2.0 * (shape[1] - 1)
    box = [3.0 * (shape[2] - 1), abs(turn[1]) @ (x, y), abs(turn[0]) @ (x, y)]
    for got, stored, step, wanted in zip(straight.shape, shape[::-1], spacing, box, strict=True):
        assert wanted - 0.01 <= (got - 1) * step <= wanted + 2 * step and (got - stored) % 2 == 0
    assert straight[shape[2] // 2, straight.shape[1] // 2, straight.shape[2] // 2] == pytest.approx(100)
    assert straight[0, 0, 0] == pytest.approx(-1000)
