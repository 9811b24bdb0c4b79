"""Voxels that are not finite: few become air, those around a round field of view too, the rest is refused by count."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from prepro_builders import chest, save_nifti
from scan_files import save_volume, signed_permutations

from mg3d.errors import DataError
from mg3d.scans.geometry import Geometry
from mg3d.scans.prepare import PreparedScan, prepare_scan
from mg3d.scans.read import read_scan

AS_STORED = Geometry(store="native", target_spacing_mm=None)


def _prepared(path: Path) -> PreparedScan:
    return prepare_scan(read_scan(path), AS_STORED)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_few_voxels_that_are_not_finite_become_air(tmp_path: Path, value: float) -> None:
    volume = chest().astype(np.float32)
    volume[3:6, 4:7, 5:8] = value
    scan = _prepared(save_nifti(tmp_path / "a.nii.gz", volume))
    assert scan.record["filled_voxels"] == 27
    assert (scan.voxels_hu[5:8, 4:7, 3:6] == -1000).all()
    assert scan.warnings == ("27 voxels that are not finite are filled with air",)


@pytest.mark.parametrize("orientation", [0, 29, 47])
@pytest.mark.parametrize("radius", [0.95, 0.8])
def test_voxels_outside_a_round_field_of_view_become_air_with_a_warning(
    tmp_path: Path, orientation: int, radius: float
) -> None:
    body, volume = chest(), chest().astype(np.float32)
    x, y = np.meshgrid(*[np.linspace(-1, 1, n) for n in body.shape[:2]], indexing="ij")
    outside = x**2 + y**2 > radius**2
    volume[outside] = np.nan
    path = save_volume(tmp_path / "a.nii.gz", volume, orientation=signed_permutations()[orientation])
    scan = _prepared(path)
    assert scan.record["filled_voxels"] == outside.sum() * body.shape[2]
    assert "are filled with air" in scan.warnings[0]
    found = scan.voxels_hu.transpose(2, 1, 0)
    assert (found[outside] == -1000).all()
    np.testing.assert_array_equal(found[~outside], np.clip(body, -1000, 1000)[~outside])


def _scattered(volume: np.ndarray) -> None:
    volume[np.random.default_rng(0).random(volume.shape) < 0.2] = np.nan


def _band(volume: np.ndarray) -> None:
    volume[:, 10:16] = np.inf


def _body(volume: np.ndarray) -> None:
    volume[volume > -950] = np.nan


def _nearly_all(volume: np.ndarray) -> None:
    volume[:, : int(0.8 * volume.shape[1])] = -np.inf


@pytest.mark.parametrize("spoil", [_scattered, _band, _body, _nearly_all])
def test_many_voxels_that_are_not_finite_are_refused_with_their_count(
    tmp_path: Path, spoil: Callable[[np.ndarray], None]
) -> None:
    volume = chest().astype(np.float32)
    spoil(volume)
    count = np.count_nonzero(~np.isfinite(volume))
    with pytest.raises(DataError, match=f"{count} of 15600 voxels are not finite") as caught:
        _prepared(save_nifti(tmp_path / "a.nii.gz", volume))
    assert "a.nii.gz" in caught.value.path
    assert "air" in caught.value.remedy and "download" not in caught.value.remedy
