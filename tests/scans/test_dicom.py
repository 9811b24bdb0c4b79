"""DICOM folders: slices in place, or a clear word about what is wrong with the series."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from prepro_builders import chest, save_nifti
from scan_files import AXIAL, SPACING_XYZ, axial_series, save_series

from mg3d.errors import DataError
from mg3d.scans.dicom_pixels import read_pixels
from mg3d.scans.dicom_slice import NoSlice, read_slices
from mg3d.scans.geometry import Geometry
from mg3d.scans.prepare import prepare_scan
from mg3d.scans.read import read_scan

WHOLE = Geometry(store="native", target_spacing_mm=None)


@pytest.fixture
def series(tmp_path: Path) -> Path:
    axial_series(tmp_path / "series", chest())
    return tmp_path / "series"


def test_a_series_is_the_volume_it_was_made_from(series: Path, tmp_path: Path) -> None:
    raw = read_scan(series)
    np.testing.assert_array_equal(raw.voxels_xyz, chest())
    assert raw.voxels_xyz.dtype == np.int16
    assert raw.spacing_mm == SPACING_XYZ
    assert (raw.oriented, raw.hounsfield, raw.warnings) == (True, True, ())
    np.testing.assert_allclose((raw.affine @ [0, 0, 0, 1])[:3], [10.0, -20.0, 5.0])
    wanted = prepare_scan(read_scan(save_nifti(tmp_path / "a.nii.gz", chest())), Geometry(size=(16, 16, 16)))
    found = prepare_scan(raw, Geometry(size=(16, 16, 16)), table_rescale=(1.0, -1024.0), rescale="apply")
    np.testing.assert_array_equal(found.voxels_hu, wanted.voxels_hu)
    assert found.spacing_mm == wanted.spacing_mm


def test_the_digest_does_not_depend_on_file_names(series: Path) -> None:
    wanted = read_scan(series).source_sha256
    for number, path in enumerate(sorted(series.iterdir())):
        path.rename(series / f"slice_{number}")
    raw = read_scan(series)
    assert raw.source_sha256 == wanted
    np.testing.assert_array_equal(raw.voxels_xyz, chest())


@pytest.mark.parametrize(
    ("axes", "directions"), [((0, 1, 2), AXIAL), ((0, 2, 1), (1, 0, 0, 0, 0, -1)), ((1, 2, 0), (0, 1, 0, 0, 0, -1))]
)
def test_axial_coronal_and_sagittal_slices_give_one_volume(
    tmp_path: Path, axes: tuple[int, int, int], directions: tuple[float, ...]
) -> None:
    volume = chest()
    column_axis, row_axis, slice_axis = axes  # LPS axes along the columns, the rows and the stack
    first = np.array([0.0, 0.0, 0.0])
    stack = volume.transpose(slice_axis, row_axis, column_axis)
    if row_axis == 2:  # rows run from head to feet
        stack = stack[:, ::-1]
        first[2] = SPACING_XYZ[2] * (volume.shape[2] - 1)
    positions = [first + np.eye(3)[slice_axis] * SPACING_XYZ[slice_axis] * index for index in range(len(stack))]
    spacing = (SPACING_XYZ[row_axis], SPACING_XYZ[column_axis])
    save_series(tmp_path / "s", [plane.copy() for plane in stack], positions, None, directions, spacing)
    found = prepare_scan(read_scan(tmp_path / "s"), WHOLE)
    np.testing.assert_array_equal(found.voxels_hu, np.clip(volume, -1000, 1000).transpose(2, 1, 0))
    assert found.spacing_mm == SPACING_XYZ[::-1]


def test_a_gantry_tilt_is_noticed_and_straightened(tmp_path: Path) -> None:
    tilt = np.radians(15)
    directions = (1.0, 0.0, 0.0, 0.0, np.cos(tilt), np.sin(tilt))
    columns, rows = np.arange(40) * 2.0, np.arange(40) * 2.0
    planes, positions = [], []
    for height in np.arange(40) * 2.0:
        x, y = np.meshgrid(columns, rows * np.cos(tilt))
        z = height + rows[:, None] * np.sin(tilt) + 0 * x
        inside = (abs(x - 30) < 10) & (abs(y - 40) < 14) & (abs(z - 60) < 18)
        planes.append(np.where(inside, 500, -900).astype(np.int16))
        positions.append((0.0, 0.0, height))
    save_series(tmp_path / "s", planes, positions, None, directions, (2.0, 2.0))
    raw = read_scan(tmp_path / "s")
    assert raw.warnings == ("gantry tilt of 15.0 degrees",)
    scan = prepare_scan(raw, WHOLE, rescale="skip")
    assert scan.record["tilt_degrees"] == pytest.approx(15.0, abs=0.01)
    box = scan.voxels_hu > -200
    for axis, size_mm in ((0, 36.0), (1, 28.0), (2, 20.0)):
        profile = box.any(axis=tuple({0, 1, 2} - {axis}))
        assert np.count_nonzero(profile) * scan.spacing_mm[axis] == pytest.approx(size_mm, abs=2.1)
    # a box that followed the tilt would be a sheared one: its rows would drift along z
    rows_of = [np.flatnonzero(plane.any(axis=1)).mean() for plane in box if plane.any()]
    assert np.ptp(rows_of[2:-2]) <= 1.0


def test_other_files_are_left_out_with_a_note(series: Path) -> None:
    (series / "notes.txt").write_text("read me")
    (series / "DICOMDIR").write_bytes(bytes(128) + b"DICM" + b"\x02\x00\x02\x00UI\x14\x001.2.840.10008.1.3.10")
    (series / ".hidden").write_bytes(b"")
    (series / "below").mkdir()
    raw = read_scan(series)
    np.testing.assert_array_equal(raw.voxels_xyz, chest())
    assert raw.warnings == ("2 files that are no CT slice left out (DICOMDIR, notes.txt)",)


def test_copies_of_a_slice_are_left_out_with_a_note(series: Path) -> None:
    wanted = read_scan(series).source_sha256
    shutil.copy(series / "995.dcm", series / "995 (1).dcm")
    raw = read_scan(series)
    assert raw.warnings == ("1 copies of slices left out",)
    assert raw.source_sha256 == wanted


def test_several_series_are_listed(series: Path) -> None:
    axial_series(series, chest()[:, :, :6], series="1.2.3.9", first=100)
    with pytest.raises(
        DataError, match=r"2 series .*1\.2\.3\.4 'series 1\.2\.3\.4' of 20 slices 3 mm apart; 1\.2\.3\.9"
    ) as caught:
        read_scan(series)
    assert "--series UID or --series largest" in caught.value.remedy


def test_no_volume_in_the_folder(series: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"1 sub-folders \(series\)") as caught:
        read_scan(tmp_path)
    assert caught.value.remedy == "give the folder of one series"
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no DICOM slice in this folder"):
        read_scan(tmp_path / "empty")
    shutil.copy(series / "995.dcm", tmp_path / "empty")
    with pytest.raises(DataError, match="one DICOM slice is no volume"):
        read_scan(tmp_path / "empty")


def test_missing_doubled_and_uneven_slices_are_refused(series: Path, tmp_path: Path) -> None:
    moved = series / "995.dcm"
    content = moved.read_bytes()
    moved.unlink()
    with pytest.raises(
        DataError, match=r"1 slices are missing \(6\.00 mm between 996\.dcm and 994\.dcm; usual distance 3"
    ):
        read_scan(series)
    plane = chest()[:, :, 4].T.copy()
    for height, words in ((5.0 + 4 * 3.0, "same position"), (5.0 + 5 * 3.0 + 1.8, "uneven")):
        path = save_series(series, [plane], [(-10.0, 20.0, height)], first=5)[0]
        with pytest.raises(DataError, match=words):
            read_scan(series)
        path.unlink()
    moved.write_bytes(content)
    np.testing.assert_array_equal(read_scan(series).voxels_xyz, chest())


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ({"directions": (1.0, 0.0, 0.0, 0.0, 0.8, -0.6)}, "differ in orientation"),
        ({"pixel_spacing": (2.0, 2.0)}, "differ in pixel spacing"),
        ({"planes": [np.zeros((26, 31), np.int16)]}, "differ in matrix size"),
        ({"positions": [(30.0, 20.0, 65.0)]}, "not stacked along one line"),
    ],
)
def test_unlike_slices_are_named(series: Path, kind: dict[str, object], words: str) -> None:
    usual = {"planes": [chest()[:, :, 0].T.copy()], "positions": [(-10.0, 20.0, 65.0)], "first": 20}
    save_series(series, **(usual | kind))  # type: ignore[arg-type]
    with pytest.raises(DataError, match=words):
        read_scan(series)


def _hide(series: Path, tag: bytes, unused: bytes) -> None:
    """Turn a tag into one that nobody reads, in every slice."""
    for path in series.iterdir():
        content, count = re.subn(re.escape(tag) + rb"(?=[\x00-\x40]\0{3})", unused, path.read_bytes(), flags=re.DOTALL)
        assert count == 1
        path.write_bytes(content)


@pytest.mark.parametrize("element", [b"\x32", b"\x37"])
def test_slices_without_place_or_orientation_are_refused(series: Path, element: bytes) -> None:
    _hide(series, b"\x20\0" + element + b"\0", b"\x20\0\x3a\0")
    with pytest.raises(DataError, match=r"in 20 slices .*their order is unknown"):
        read_scan(series)


def test_without_rescale_tags_a_table_applies(series: Path) -> None:
    for path in series.iterdir():  # the stored values of every slice, under one intercept
        path.unlink()
    axial_series(series, chest(), tags={"0028|1052": "-1024"})
    for element in (b"\x52", b"\x53"):
        _hide(series, b"\x28\0" + element + b"\x10", b"\x28\0\x50\x10")
    raw = read_scan(series)
    assert not raw.hounsfield
    assert "without rescale" in raw.warnings[0]
    scan = prepare_scan(raw, WHOLE, table_rescale=(1.0, -1024.0))
    assert scan.record["rescale"] == "applied"
    np.testing.assert_array_equal(scan.voxels_hu, np.clip(chest(), -1000, 1000).transpose(2, 1, 0))


def test_no_pixel_spacing_needs_another_source(series: Path) -> None:
    _hide(series, b"\x28\0\x30\0", b"\x28\0\x31\0")
    raw = read_scan(series)
    assert raw.spacing_mm is None
    scan = prepare_scan(raw, WHOLE, table_spacing_mm=SPACING_XYZ[::-1])
    assert scan.spacing_mm == SPACING_XYZ[::-1]
    assert scan.record["spacing"] == "table"


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_truncated_slice_is_named(series: Path, share: float) -> None:
    last = series / "981.dcm"
    content = last.read_bytes()
    last.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(DataError, match=r"981\.dcm") as caught:
        read_scan(series)
    assert caught.value.remedy


@pytest.mark.realdata
def test_real_slices(shared_dir: Path) -> None:
    folder = shared_dir / "data" / "dicom"
    items = [read_slices(path) for path in sorted(folder.iterdir())]
    slices = [item for found in items if not isinstance(found, NoSlice) for item in found]
    assert [item.position for item in slices] == [(0.0, 0.0, 0.0), (0.0, 0.0, 1.0)]
    first = slices[0]
    pixels = read_pixels(first)
    assert (pixels.shape, pixels.min(), pixels.max()) == ((512, 512), -2048, 1502)
    assert (first.spacing_mm, first.rescale) == ((0.625, 0.625), (1.0, 0.0))
    with pytest.raises(DataError, match=r"\(512, 512, 2\) is too thin"):
        read_scan(folder)


def test_two_equal_slices_with_padding_keep_their_places_and_are_too_thin(tmp_path: Path) -> None:
    plane = chest()[:, :, 10].T.copy()
    plane[:3] = -2048  # outside the round field of view
    paths = save_series(tmp_path / "thin", [plane, plane], [(0, 0, 0), (0, 0, 1)], {"0010|0010": ""})
    slices = [item for path in paths for item in read_slices(path) if not isinstance(item, NoSlice)]
    assert [item.position for item in slices] == [(0.0, 0.0, 0.0), (0.0, 0.0, 1.0)]
    np.testing.assert_array_equal(read_pixels(slices[0]), plane)
    assert (slices[0].spacing_mm, slices[0].rescale) == ((2.5, 2.0), (1.0, -1024.0))
    with pytest.raises(DataError, match=r"\(30, 26, 2\) is too thin"):
        read_scan(tmp_path / "thin")
