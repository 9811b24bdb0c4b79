"""Folders with several series, localizers, enhanced multi-frame files and distances that change along the series."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from dicom_bytes import CONVERTED_CT, ENHANCED_CT, MR, save_enhanced, save_slices
from prepro_builders import chest

from mg3d.errors import DataError
from mg3d.inference.processor import Processor
from mg3d.scans.read import read_scan

HEIGHTS = [5.0 + 3 * number for number in range(20)]
OTHER = {0x0020000E: "1.2.3.10", 0x00200011: "5", 0x0008103E: "lung 1.0 B70f", 0x00181210: "B70f"}
CORONAL = "1\\0\\0\\0\\0\\-1"


def refusal(place: Path, series: str = "") -> DataError:
    with pytest.raises(DataError) as caught:
        read_scan(place, series=series)
    assert caught.value.remedy and len(str(caught.value).splitlines()) <= 5
    return caught.value


@pytest.fixture
def two_series(tmp_path: Path) -> Path:
    save_slices(tmp_path / "s", chest(), HEIGHTS)
    save_slices(tmp_path / "s", chest()[:, :, :9] + 7, HEIGHTS[:9], OTHER, start="B")
    return tmp_path / "s"


def test_several_series_are_listed_with_what_tells_them_apart(two_series: Path) -> None:
    problem = refusal(two_series)
    for words in ("2 series", "1.2.3.10 'lung 1.0 B70f' no. 5 of 9 slices 3 mm apart kernel B70f", "of 20 slices"):
        assert words in problem.message
    assert "--series UID or --series largest" in problem.remedy


def test_a_series_is_chosen_by_uid_or_as_the_largest(two_series: Path) -> None:
    raw = read_scan(two_series, series="1.2.3.10")
    np.testing.assert_array_equal(raw.voxels_xyz, chest()[:, :, :9] + 7)
    assert "series 1.2.3.10 of 9 slices read, left out: 1.2.3.9" in raw.warnings[0]
    raw = read_scan(two_series, series="largest")
    np.testing.assert_array_equal(raw.voxels_xyz, chest())
    assert "left out: 1.2.3.10" in raw.warnings[0]
    assert "no series '1.2.3'" in refusal(two_series, "1.2.3").message
    scan = Processor(series="1.2.3.10", size_dhw=(8, 8, 8))(two_series)
    assert scan.record["stored_shape_DHW"][0] == 9
    assert Processor(series="largest").describe()["series"] == "largest" and "series" not in Processor().describe()


def test_of_equally_large_series_the_lowest_number_is_read_and_the_tie_said(tmp_path: Path) -> None:
    save_slices(tmp_path / "s", chest() + 7, HEIGHTS, OTHER, start="A")
    save_slices(tmp_path / "s", chest(), HEIGHTS)
    raw = read_scan(tmp_path / "s", series="largest")
    np.testing.assert_array_equal(raw.voxels_xyz, chest())
    assert "1 others have as many slices" in raw.warnings[0]


def test_slices_without_a_series_are_not_left_out(tmp_path: Path) -> None:
    save_slices(tmp_path / "s", chest(), HEIGHTS)
    save_slices(tmp_path / "s", chest()[:, :, :2], HEIGHTS[:2], {0x0020000E: ""})
    for series in ("", "largest", "1.2.3.9"):
        assert "2 slices without SeriesInstanceUID" in refusal(tmp_path / "s", series).message


@pytest.mark.parametrize("uid", ["1.2.3.9", "1.2.3.77"])
@pytest.mark.parametrize(
    "kind",
    [
        {0x00080008: "ORIGINAL\\PRIMARY\\LOCALIZER"},
        {0x00080008: "DERIVED\\SECONDARY\\AXIAL", 0x00200037: CORONAL},
    ],
)
def test_localizers_are_set_aside_by_name(tmp_path: Path, kind: dict[int, str], uid: str) -> None:
    save_slices(tmp_path / "s", chest(), HEIGHTS)
    save_slices(tmp_path / "s", chest()[:, :, :2], [20.0, 300.0], {**kind, 0x0020000E: uid}, start="SCOUT")
    raw = read_scan(tmp_path / "s")
    np.testing.assert_array_equal(raw.voxels_xyz, chest())
    assert raw.warnings == ("2 localizer images set aside (SCOUT000.dcm, SCOUT001.dcm)",)


def test_a_folder_of_localizers_is_no_volume(tmp_path: Path) -> None:
    save_slices(tmp_path / "s", chest()[:, :, :2], [20.0, 300.0], {0x00080008: "ORIGINAL\\PRIMARY\\LOCALIZER"})
    assert "only localizer images" in refusal(tmp_path / "s").message


def test_slices_of_another_direction_are_not_set_aside_when_they_are_many(tmp_path: Path) -> None:
    save_slices(tmp_path / "s", chest(), HEIGHTS)
    save_slices(tmp_path / "s", chest()[:, :, :5], HEIGHTS[:5], {0x00200037: CORONAL}, start="C")
    assert "5 slices differ in orientation" in refusal(tmp_path / "s").message


@pytest.mark.parametrize("implicit", [True, False])
@pytest.mark.parametrize("sop_class", [ENHANCED_CT, CONVERTED_CT])
def test_a_multi_frame_file_is_read_alone_and_in_its_folder(tmp_path: Path, sop_class: str, implicit: bool) -> None:
    order = np.random.default_rng(1).permutation(20)
    intercepts = [-1024.0 - number for number in range(20)]
    path = save_enhanced(
        tmp_path / "s" / "e.dcm",
        chest()[:, :, order],
        [HEIGHTS[place] for place in order],
        intercepts=intercepts,
        sop_class=sop_class,
        implicit=implicit,
    )
    for place in (path, path.parent):
        raw = read_scan(place)
        np.testing.assert_array_equal(raw.voxels_xyz, chest())
        assert (raw.spacing_mm, raw.warnings, raw.hounsfield) == ((2.0, 2.5, 3.0), (), True)
        np.testing.assert_allclose(raw.affine @ [0, 0, 0, 1], [10.0, -20.0, 5.0, 1.0])


def test_multi_frame_files_of_one_series_are_one_volume_and_of_two_series_two(tmp_path: Path) -> None:
    save_enhanced(tmp_path / "s" / "a.dcm", chest()[:, :, :12], HEIGHTS[:12])
    save_enhanced(tmp_path / "s" / "b.dcm", chest()[:, :, 12:], HEIGHTS[12:])
    np.testing.assert_array_equal(read_scan(tmp_path / "s").voxels_xyz, chest())
    save_enhanced(tmp_path / "s" / "c.dcm", chest()[:, :, :6], HEIGHTS[:6], OTHER)
    assert "2 series" in refusal(tmp_path / "s").message
    assert read_scan(tmp_path / "s", series="1.2.3.10").voxels_xyz.shape[2] == 6


@pytest.mark.parametrize(
    ("heights", "changes", "words"),
    [
        ([*HEIGHTS[:19], HEIGHTS[3]], {}, "(frame 20 of e.dcm and frame 4 of e.dcm)"),
        ([*HEIGHTS[:10], *(height + 3 for height in HEIGHTS[10:])], {}, "1 slices are missing"),
        (HEIGHTS, {0x00280008: "21"}, "21 frames, but the places of 20"),
        (HEIGHTS, {0x00280008: "100000000"}, "100000000 frames"),
        (HEIGHTS, {0x52009230: ""}, "but the places of 0"),
        (HEIGHTS, {0x52009229: ""}, "no usable image position or orientation in 20 slices"),
        (HEIGHTS, {0x00080060: "MR"}, "modality MR"),
        (HEIGHTS, {0x7FE00010: bytes(1000)}, "holds 1000 of"),
    ],
)
def test_incomplete_multi_frame_files_are_refused(
    tmp_path: Path, heights: list[float], changes: dict[int, object], words: str
) -> None:
    path = save_enhanced(tmp_path / "e.dcm", chest(), heights, changes)  # type: ignore[arg-type]
    assert words in refusal(path).message


def test_a_multi_frame_file_of_other_values_or_kind_is_refused(tmp_path: Path) -> None:
    from dicom_bytes import encode, image_tags, whole_file

    path = save_enhanced(tmp_path / "e.dcm", chest(), HEIGHTS, {0x52009230: [{0x00289145: [{0x00281054: "OD"}]}] * 20})
    assert "values are OD" in refusal(path).message
    path.write_bytes(whole_file(encode(image_tags(chest()) | {0x00080016: MR, 0x00080060: "MR"}), MR))
    assert "MR Image" in refusal(path).message


def test_distances_that_vary_are_interpolated_with_a_warning(tmp_path: Path) -> None:
    steps = [2.0] * 10 + [2.6, 3.0, 3.2] + [2.0] * 6
    heights = np.cumsum([5.0, *steps])
    ramp = np.broadcast_to(np.round(heights * 10), (24, 26, 20)).astype(np.int16)
    save_slices(tmp_path / "s", ramp, heights)
    raw = read_scan(tmp_path / "s")
    count = round((heights[-1] - 5) / 2) + 1
    assert raw.voxels_xyz.shape == (24, 26, count)
    even = np.linspace(50.0, heights[-1] * 10, count)
    np.testing.assert_allclose(raw.voxels_xyz[3, 4], even, atol=0.51)
    assert raw.spacing_mm is not None and raw.spacing_mm[2] == pytest.approx((heights[-1] - 5) / (count - 1))
    assert "uneven slice distances of 2.00 to 3.20 mm: interpolated linearly" in raw.warnings[0]
    np.testing.assert_array_equal(raw.voxels_xyz[:, :, [0, -1]], ramp[:, :, [0, -1]])
    assert raw.hounsfield


@pytest.mark.parametrize(
    ("steps", "changes", "words"),
    [
        ([2.0] * 10 + [4.0] + [2.0] * 8, {}, "1 slices are missing"),
        ([2.0] * 10 + [9.0] + [2.0] * 8, {}, "slices are missing"),
        ([2.0] * 10 + [0.5] + [2.0] * 8, {}, "uneven slice distances of 0.50 to 2.00 mm"),
        ([0.3, 2.7] * 9 + [0.3], {}, "slices are missing|uneven"),
    ],
)
def test_gaps_and_mixed_stacks_are_not_interpolated(
    tmp_path: Path, steps: list[float], changes: dict[int, str], words: str
) -> None:
    save_slices(tmp_path / "s", chest(), np.cumsum([5.0, *steps]), changes)
    problem = refusal(tmp_path / "s")
    assert any(part in problem.message for part in words.split("|"))


def test_uneven_slices_of_two_acquisitions_are_not_interpolated(tmp_path: Path) -> None:
    heights = np.cumsum([5.0, *[1.2, 1.8] * 9, 1.2])
    save_slices(tmp_path / "s", chest(), heights)
    for number in range(0, 20, 2):
        acquisition = {0x00200012: "2"}
        kept = tmp_path / "s" / f"IM{number:03d}.dcm"
        save_slices(tmp_path / "t", chest()[:, :, number:], heights[number : number + 1], acquisition)[0].replace(kept)
    assert "in 2 acquisitions" in refusal(tmp_path / "s").message
