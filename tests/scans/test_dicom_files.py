"""Hostile and unlucky DICOM files: read, or refused for the true reason; never a shortened volume, never a crash."""

from __future__ import annotations

import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from dicom_bytes import (
    CT,
    DEFLATED,
    EXPLICIT,
    MR,
    NUCLEAR,
    SECONDARY,
    encode,
    save_slices,
    slice_tags,
    whole_file,
)
from prepro_builders import chest

from mg3d.errors import DataError
from mg3d.scans.read import read_scan

HEIGHTS = [5.0 + 3 * number for number in range(20)]


def refusal(place: Path) -> DataError:
    with pytest.raises(DataError) as caught:
        read_scan(place)
    assert caught.value.remedy and len(str(caught.value).splitlines()) <= 5
    return caught.value


@pytest.mark.parametrize("implicit", [True, False])
@pytest.mark.parametrize("bare", [range(0), range(20), range(14, 20), range(7)])
def test_slices_without_preamble_are_read_like_all_others(tmp_path: Path, implicit: bool, bare: range) -> None:
    save_slices(tmp_path / "s", chest(), HEIGHTS, implicit=implicit, bare=bare)
    raw = read_scan(tmp_path / "s")
    np.testing.assert_array_equal(raw.voxels_xyz, chest())
    assert (raw.spacing_mm, raw.warnings, raw.hounsfield) == ((2.0, 2.5, 3.0), (), True)


def test_bare_slices_without_ending_are_found(tmp_path: Path) -> None:
    from mg3d.scans.find import find_scans

    for path in save_slices(tmp_path / "a" / "s", chest(), HEIGHTS, implicit=True, bare=range(20)):
        path.rename(path.with_suffix(""))
    (found,) = find_scans(tmp_path)
    assert found.name == "a/s"
    np.testing.assert_array_equal(read_scan(found.path).voxels_xyz, chest())


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _html(path: Path) -> None:
    path.write_bytes(b"<html>404</html>" * 20)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:140])


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.with_name("nowhere"))


@pytest.mark.parametrize("damage", [_empty, _html, _cut, _pipe, _dangling])
def test_a_lost_slice_is_refused_and_not_left_out(tmp_path: Path, damage: object) -> None:
    last = save_slices(tmp_path / "s", chest(), HEIGHTS)[-1]
    damage(last)  # type: ignore[operator]
    assert "IM019.dcm" in str(refusal(tmp_path / "s"))


def test_an_image_of_another_kind_in_the_series_is_refused_and_beside_it_left_out(tmp_path: Path) -> None:
    save_slices(tmp_path / "s", chest(), HEIGHTS)
    tags = slice_tags(chest()[:, :, 0].T, 62.0) | {0x00080016: SECONDARY}
    (tmp_path / "s" / "x.dcm").write_bytes(whole_file(encode(tags), SECONDARY))
    assert "x.dcm: Secondary Capture Image" in refusal(tmp_path / "s").message
    (tmp_path / "s" / "x.dcm").write_bytes(whole_file(encode(tags | {0x0020000E: "1.2.99"}), SECONDARY))
    raw = read_scan(tmp_path / "s")
    assert raw.voxels_xyz.shape == chest().shape and "1 files that are no CT slice" in raw.warnings[0]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ({"sop_class": MR, "changes": {0x00080060: "MR"}}, "20 x MR Image"),
        ({"sop_class": NUCLEAR, "changes": {0x00080060: "NM"}}, "20 x Nuclear Medicine Image"),
        ({"sop_class": "1.2.840.10008.5.1.4.1.1.1", "changes": {0x00080060: "CR"}}, "Computed Radiography"),
        ({"changes": {0x00080060: "MR"}}, "modality MR"),
        ({"sop_class": f"{CT}.9"}, "no CT image"),
        ({"changes": {0x00080016: NUCLEAR}}, "Nuclear Medicine"),
    ],
)
def test_a_folder_without_ct_says_what_is_there(tmp_path: Path, kind: dict[str, object], words: str) -> None:
    save_slices(tmp_path / "s", chest(), HEIGHTS, **kind)  # type: ignore[arg-type]
    problem = refusal(tmp_path / "s")
    assert words in problem.message and "no DICOM" not in problem.message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({0x00281054: "OD"}, "values are OD"),
        ({0x00281054: "HU_MOD"}, "values are HU_MOD"),
        ({0x00281053: "0"}, "slope '0'"),
        ({0x00281053: "nan"}, "slope 'nan'"),
        ({0x00281052: "1e999"}, "intercept '1e999'"),
        ({0x00281053: "one"}, "slope 'one'"),
        ({0x00281053: "1e300"}, "slope '1e300'"),
        ({0x00281053: ""}, "slope ''"),
        ({0x00280004: "PALETTE COLOR"}, "not one real number"),
        ({0x00280002: 3}, "not one real number"),
        ({0x00280100: 64, 0x00280101: 64, 0x00280102: 63}, "not one real number"),
        ({0x00280101: 0}, "not one real number"),
        ({0x00280010: 0}, "without an image"),
        ({0x7FE00010: ""}, "without an image"),
        ({0x00280008: "20"}, "20 frames"),
    ],
)
def test_values_that_are_no_hounsfield_units_are_refused(
    tmp_path: Path, changes: dict[int, object], words: str
) -> None:
    first = save_slices(tmp_path / "s", chest(), HEIGHTS, changes)[0]  # type: ignore[arg-type]
    problem = refusal(tmp_path / "s")
    assert words in problem.message and problem.path == str(first)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({0x00280030: "0.01\\0.01"}, "voxel size 0.01, 0.01, 3 mm"),
        ({0x00280030: "50\\50"}, "voxel size 50, 50, 3 mm"),
        ({0x00280030: "-2\\2"}, "voxel size"),
        ({0x00280030: "0\\2"}, "voxel size|singular"),
        ({0x00200037: "nan\\0\\0\\0\\1\\0"}, "orientation"),
        ({0x00200037: "1\\0\\0\\1\\0\\0"}, "orientation"),
        ({0x00200037: "1e308\\1e308\\0\\0\\1\\0"}, "orientation"),
        ({0x00200032: "0\\0\\nan"}, "position"),
        ({0x00200032: "0\\0\\-1e308"}, "position"),
        ({0x00200032: "0\\0\\1e9"}, "position"),
        ({0x00200032: "0\\0"}, "position"),
    ],
)
def test_impossible_geometry_is_refused(tmp_path: Path, changes: dict[int, object], words: str) -> None:
    save_slices(tmp_path / "s", chest(), HEIGHTS, changes)  # type: ignore[arg-type]
    problem = refusal(tmp_path / "s")
    assert any(part in problem.message for part in words.split("|"))


@pytest.mark.parametrize("unit", ["HU", "US", "hu"])
def test_hounsfield_units_and_an_unspecified_type_are_read(tmp_path: Path, unit: str) -> None:
    save_slices(tmp_path / "s", chest(), HEIGHTS, {0x00281054: unit})
    np.testing.assert_array_equal(read_scan(tmp_path / "s").voxels_xyz, chest())


def test_rescaling_of_some_slices_only_is_refused(tmp_path: Path) -> None:
    save_slices(tmp_path / "s", chest(), HEIGHTS)
    save_slices(tmp_path / "s", chest()[:, :, :3], HEIGHTS[:3], {0x00281052: "", 0x00281053: ""})
    assert "3 slices have no rescale slope" in refusal(tmp_path / "s").message


def _measured(place: Path, repository: Path) -> tuple[int, str]:
    """Peak memory of the reading process or its ITK child in MiB, the larger of the two, and what was said."""
    program = """
import sys
from pathlib import Path
from mg3d.errors import DataError
from mg3d.scans import itk_process
from mg3d.scans.read import read_scan
try:
    read_scan(Path(sys.argv[1]))
    text = "accepted"
except DataError as problem:
    text = str(problem)
child = itk_process._keeper.child
who = ["self"] + ([child._process.pid] if child else [])
status = [Path(f"/proc/{each}/status").read_text(encoding="utf-8") for each in who]
print(max(int(each.partition("VmHWM:")[2].split()[0]) for each in status) // 1024, text)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(place)],
        capture_output=True,
        encoding="utf-8",
        check=True,
        env=os.environ | {"PYTHONPATH": str(repository)},
    )
    assert done.stderr == ""
    size, _, text = done.stdout.partition(" ")
    return int(size), text


def test_a_deflated_file_is_refused_before_it_is_unpacked(tmp_path: Path, repository: Path) -> None:
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    body = packer.compress(encode(slice_tags(chest()[:, :, 0].T, 5.0)))
    body += b"".join(packer.compress(bytes(1 << 20)) for _ in range(600)) + packer.flush()
    (tmp_path / "s").mkdir()
    for number in range(4):
        (tmp_path / "s" / f"{number}.dcm").write_bytes(whole_file(body, CT, DEFLATED))
    size, text = _measured(tmp_path / "s", repository)
    assert "deflated" in text and "uncompressed transfer syntax" in text and size < 300


def _nested(depth: int) -> bytes:
    item = struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF)
    start = struct.pack("<HH2sHI", 0x0008, 0x1140, b"SQ", 0, 0xFFFFFFFF) + item
    return start * depth


@pytest.mark.parametrize("depth", [300, 20_000, 400_000])
def test_nested_sequences_end_in_an_error(tmp_path: Path, repository: Path, depth: int) -> None:
    _, second = save_slices(tmp_path / "s", chest()[:, :, :2], HEIGHTS[:2])
    head, tail = second.read_bytes().split(struct.pack("<HH", 0x20, 0x0D), 1)
    second.write_bytes(head + _nested(depth) + struct.pack("<HH", 0x20, 0x0D) + tail)
    size, text = _measured(tmp_path / "s", repository)
    assert "IM001.dcm" in text and size < 300


@pytest.mark.parametrize(("tag", "undefined"), [((0x0008, 0x1140), True), ((0x5200, 0x9230), False)])
def test_a_header_of_many_small_items_is_refused(
    tmp_path: Path, repository: Path, tag: tuple[int, int], undefined: bool
) -> None:
    first = save_slices(tmp_path / "s", chest()[:, :, :2], HEIGHTS[:2])[0]
    item = struct.pack("<HHI", 0xFFFE, 0xE000, 0)
    length = 0xFFFFFFFF if undefined else len(item) << 20
    bomb = struct.pack("<HH2sHI", *tag, b"SQ", 0, length) + item * (1 << 20)
    mark = struct.pack("<HH", *((0x20, 0x0D) if tag[0] == 8 else (0x7FE0, 0x10)))
    head, tail = first.read_bytes().split(mark, 1)
    first.write_bytes(head + bomb + mark + tail)
    size, text = _measured(tmp_path / "s", repository)
    assert "IM000.dcm" in text and "unreadable DICOM header" in text and size < 2000


def test_a_large_tag_that_nobody_needs_is_skipped(tmp_path: Path, repository: Path) -> None:
    save_slices(tmp_path / "s", chest()[:, :, :4], HEIGHTS[:4], {0x00291010: bytes(20 << 20)})
    size, text = _measured(tmp_path / "s", repository)
    assert text.strip() == "accepted" and size < 300


def _compressed(folder: Path, compressor: str = "JPEG2000") -> list[Path]:
    unscaled = {0x00281052: "0", 0x00280103: 1}
    paths = save_slices(folder, chest() - 1024, HEIGHTS, unscaled)
    for path in paths:
        image = SimpleITK.ReadImage(str(path), SimpleITK.sitkInt16)
        reader = SimpleITK.ImageFileReader()
        reader.SetFileName(str(path))
        reader.ReadImageInformation()
        for tag in ("0008|0060", "0020|000e", "0020|0032", "0020|0037", "0028|1052", "0028|1053"):
            image.SetMetaData(tag, reader.GetMetaData(tag))
        writer = SimpleITK.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.SetFileName(str(path))
        writer.SetUseCompression(True)
        writer.SetCompressor(compressor)
        writer.Execute(image)
    return paths


@pytest.mark.parametrize("compressor", ["JPEG2000", "JPEG"])
def test_compressed_slices_are_what_simple_itk_reads(tmp_path: Path, compressor: str) -> None:
    _compressed(tmp_path / "s", compressor)
    raw = read_scan(tmp_path / "s")
    np.testing.assert_array_equal(raw.voxels_xyz, chest())
    assert raw.spacing_mm == pytest.approx((2.0, 2.5, 3.0)) and raw.hounsfield


def test_a_codestream_larger_than_its_header_is_refused_in_little_memory(tmp_path: Path, repository: Path) -> None:
    path = _compressed(tmp_path / "s")[3]
    content = path.read_bytes()
    place = content.index(b"\xff\x51") + 6  # width and height of the JPEG 2000 image, then its tile
    huge = struct.pack(">II", 60_000, 60_000)
    content = content[:place] + huge + content[place + 8 : place + 16] + huge + content[place + 24 :]
    path.write_bytes(content)
    size, text = _measured(tmp_path / "s", repository)
    assert "IM003.dcm" in text and "JPEG 2000" in text and size < 900


def test_a_size_claimed_by_compressed_slices_is_checked_first(tmp_path: Path, repository: Path) -> None:
    for path in _compressed(tmp_path / "s"):
        for tag in (b"\x28\0\x10\0US\x02\0", b"\x28\0\x11\0US\x02\0"):
            content, count = re.subn(re.escape(tag) + b"..", tag + b"\xff\xff", path.read_bytes(), flags=re.DOTALL)
            assert count == 1
            path.write_bytes(content)
    size, text = _measured(tmp_path / "s", repository)
    assert "the header claims" in text and size < 300


def test_pixels_that_no_one_decodes_are_named(tmp_path: Path) -> None:
    for path in _compressed(tmp_path / "s"):
        content = path.read_bytes()
        path.write_bytes(content.replace(b"1.2.840.10008.1.2.4.90", b"1.2.840.10008.1.2.8.10"))
    assert "IM000.dcm" in str(refusal(tmp_path / "s"))


def test_special_files_beside_slices_are_not_opened(tmp_path: Path) -> None:
    save_slices(tmp_path / "s", chest(), HEIGHTS)
    os.mkfifo(tmp_path / "s" / "pipe")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "s" / "socket"))
    raw = read_scan(tmp_path / "s")
    listener.close()
    np.testing.assert_array_equal(raw.voxels_xyz, chest())
    assert raw.warnings == ("2 files that are no CT slice left out (pipe, socket)",)


@pytest.mark.parametrize("name", ["a.dcm", "a.nii.gz", "a.nrrd", "a.mha", "a.npz", "a"])
def test_a_pipe_given_as_a_scan_is_refused(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    assert "neither a file nor a folder" in refusal(tmp_path / name).message


def test_a_single_slice_and_a_file_of_nothing_are_explained(tmp_path: Path) -> None:
    paths = save_slices(tmp_path / "s", chest(), HEIGHTS)
    assert refusal(paths[4]).remedy == "give the folder of the whole series"
    (tmp_path / "x.dcm").write_bytes(bytes(128) + b"DICM")
    assert "one DICOM slice" not in refusal(tmp_path / "x.dcm").message
    shutil.copy(paths[0], tmp_path / "IM0")
    assert "one DICOM slice" in refusal(tmp_path / "IM0").message


@pytest.mark.parametrize("syntax", [EXPLICIT, "1.2.840.10008.1.2.2"])
def test_every_cut_and_flip_of_a_header_ends_in_an_error_or_a_volume(tmp_path: Path, syntax: str) -> None:
    path = save_slices(tmp_path / "s", chest()[:, :, :6], HEIGHTS[:6], syntax=EXPLICIT)[2]
    content = path.read_bytes()
    rng = np.random.default_rng(3)
    for _ in range(150):
        damaged = bytearray(content)
        for place in rng.integers(0, 900, 3):
            damaged[int(place)] = int(rng.integers(256))
        path.write_bytes(bytes(damaged[: int(rng.integers(100, len(content)))] if rng.random() < 0.3 else damaged))
        try:
            raw = read_scan(tmp_path / "s")
            assert raw.voxels_xyz.shape[2] >= 5
        except DataError:
            pass
