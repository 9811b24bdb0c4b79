"""The published preprocessed volumes: read without unpickling, refused when they are anything else."""

from __future__ import annotations

import hashlib
import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from prepro_builders import chest, save_nifti

from mg3d.datasets.volume import TARGET_SPACING_MM, ct_rate_offline_resample
from mg3d.errors import DataError
from mg3d.scans.geometry import Geometry
from mg3d.scans.prepare import prepare_scan
from mg3d.scans.read import read_scan

SPACING_ZYX = (3.0, 2.5, 2.0)
NATIVE = Geometry(store="native")


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """An array made by the published step from a volume whose stored order is LPS."""
    path = tmp_path / "train_1_a_1.npz"
    np.savez(path, ct_rate_offline_resample(chest(), 1.0, 0.0, SPACING_ZYX))
    return path


class Marker:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.path), "w")


def test_layout_and_units(published: Path) -> None:
    raw = read_scan(published)
    stored_zxy = np.load(published)["arr_0"]
    np.testing.assert_array_equal(raw.voxels_xyz, stored_zxy.transpose(1, 2, 0))
    assert raw.spacing_mm == TARGET_SPACING_MM[::-1]
    assert (raw.slope, raw.intercept, raw.oriented, raw.hounsfield) == (1000.0, 0.0, False, True)
    assert raw.source_sha256 == hashlib.sha256(published.read_bytes()).hexdigest()


def test_it_holds_the_same_scan_as_the_nifti_it_was_made_from(published: Path, tmp_path: Path) -> None:
    nifti = save_nifti(tmp_path / "a.nii.gz", chest())
    crop = Geometry(size=(24, 20, 22))
    for geometry, tolerance in ((NATIVE, 0.02), (crop, 0.02)):
        wanted = prepare_scan(read_scan(nifti), geometry)
        found = prepare_scan(read_scan(published), geometry, table_rescale=(1.0, -1024.0))
        assert found.voxels_hu.shape == wanted.voxels_hu.shape
        assert np.abs(found.voxels_hu - wanted.voxels_hu).max() < tolerance
        assert found.record["rescale"] == "as_stored"
        assert found.record["orientation"] == "assumed LPS"
        np.testing.assert_allclose(found.spacing_mm, wanted.spacing_mm, rtol=0.03)


def test_apply_does_not_scale_hounsfield_units_again(published: Path) -> None:
    found = prepare_scan(read_scan(published), NATIVE, rescale="apply", table_rescale=(1.0, -8192.0))
    assert found.record["rescale"] == "as_stored"


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_memory_order_and_compression(tmp_path: Path, save: object, order: str) -> None:
    values = np.asarray(np.linspace(-1, 1, 6 * 7 * 8).reshape(6, 7, 8), order=order, dtype=np.float64)  # type: ignore[call-overload]
    save(tmp_path / "a.npz", values)  # type: ignore[operator]
    np.testing.assert_array_equal(read_scan(tmp_path / "a.npz").voxels_xyz, values.transpose(1, 2, 0))


def test_objects_are_never_unpickled(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    payload = np.empty((4, 4, 4), dtype=object)
    payload[:] = Marker(marker)
    np.savez(tmp_path / "a.npz", payload)
    with pytest.raises(DataError, match="Python objects"):
        read_scan(tmp_path / "a.npz")
    assert not marker.exists()


def test_damage_is_found(published: Path) -> None:
    data = published.read_bytes()
    start = data.find(b"\x93NUMPY")
    rng = np.random.default_rng(0)
    for _ in range(30):
        damaged = bytearray(data)
        damaged[int(rng.integers(start, len(data) - 200))] ^= 1 << int(rng.integers(8))
        published.write_bytes(bytes(damaged))
        with pytest.raises(DataError):
            read_scan(published)
    for share in (0.1, 0.5, 0.99):
        published.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(DataError, match=r"truncated|damaged"):
            read_scan(published)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.full((8, 8, 8), -1024.0), "published range"),
        (np.full((8, 8, 8), 2.0, np.float32), "published range"),
        (np.zeros((8, 8)), "shape"),
        (np.zeros((2, 8, 8)), "too thin"),
        (np.zeros((8, 8, 8), np.complex64), "not a real number"),
    ],
)
def test_other_arrays_are_refused(tmp_path: Path, array: np.ndarray, words: str) -> None:
    np.savez(tmp_path / "a.npz", array)
    with pytest.raises(DataError, match=words):
        read_scan(tmp_path / "a.npz")


def test_other_archives_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", volume=np.zeros((8, 8, 8)))
    with pytest.raises(DataError, match=r"no readable arr_0 inside \(it holds volume\.npy\)"):
        read_scan(tmp_path / "a.npz")
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("arr_0.npy", b"no array")
    (tmp_path / "a.npz").write_bytes(content.getvalue())
    with pytest.raises(DataError, match="no array header"):
        read_scan(tmp_path / "a.npz")
