"""Every file format gives the same scan, and says so when it cannot."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from prepro_builders import chest
from scan_files import real, save_volume

from mg3d.errors import DataError
from mg3d.scans.read import read_scan

FILES = ("a.nii", "a.nii.gz", "a.nrrd", "a.nhdr", "a.mha", "a.mhd")
PLAIN_NRRD = b"NRRD0004\ntype: short\ndimension: 3\nsizes: 10 12 14\nencoding: raw\nendian: little\n"


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("name", FILES)
def test_values_and_geometry(tmp_path: Path, name: str, compress: bool) -> None:
    volume = chest()
    raw = read_scan(save_volume(tmp_path / name, volume, compress=compress))
    np.testing.assert_array_equal(raw.voxels_xyz, volume)
    assert raw.voxels_xyz.dtype == np.int16
    assert raw.spacing_mm == (2.0, 2.5, 3.0)
    assert (raw.slope, raw.intercept, raw.oriented, raw.warnings) == (1.0, 0.0, True, ())
    np.testing.assert_allclose(raw.affine, np.diag([-2.0, -2.5, 3.0, 1.0]), atol=1e-6)


NRRDS = ["made.nrrd", "made_turned.nrrd", *real("ct/cip_ct-64-transformed.nrrd", "ct/pyradiomics_lung1_image.nrrd")]


@pytest.mark.parametrize("scan_file", NRRDS, indirect=True)
def test_nrrd_is_what_simple_itk_reads(scan_file: Path) -> None:
    image = SimpleITK.ReadImage(str(scan_file))
    raw = read_scan(scan_file)
    np.testing.assert_array_equal(raw.voxels_xyz.transpose(2, 1, 0), SimpleITK.GetArrayViewFromImage(image))
    for index in ((0, 0, 0), (3, 40, 17)):
        place_lps = np.array(image.TransformIndexToPhysicalPoint(index))
        np.testing.assert_allclose((raw.affine @ [*index, 1])[:3], place_lps * [-1, -1, 1], atol=1e-9)
    assert raw.source_sha256 == hashlib.sha256(scan_file.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", FILES)
def test_the_digest_is_that_of_the_bytes(tmp_path: Path, name: str) -> None:
    path = save_volume(tmp_path / name, chest())
    digests = sorted(hashlib.sha256(file.read_bytes()).hexdigest() for file in tmp_path.iterdir())
    wanted = digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()
    assert read_scan(path).source_sha256 == wanted


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nrrd", "a.mha"])
def test_every_flipped_bit_is_found(tmp_path: Path, name: str) -> None:
    path = save_volume(tmp_path / name, chest())
    data = path.read_bytes()
    start = {"a.nii.gz": 20, "a.nrrd": data.find(b"\n\n") + 12, "a.mha": data.find(b"LOCAL\n") + 6}[name]
    rng = np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(data)
        damaged[int(rng.integers(start, len(data)))] ^= 1 << int(rng.integers(8))
        path.write_bytes(bytes(damaged))
        with pytest.raises(DataError):
            read_scan(path)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("name", ["a.nii", "a.nrrd", "a.nhdr", "a.mha", "a.mhd"])
def test_truncated_file_is_refused(tmp_path: Path, name: str, compress: bool, share: float) -> None:
    path = save_volume(tmp_path / name, chest(), compress=compress)
    holder = max(tmp_path.iterdir(), key=lambda file: file.stat().st_size)
    data = holder.read_bytes()
    holder.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(DataError, match=r"truncated|holds|header|can hold|cannot hold"):
        read_scan(path)


@pytest.mark.parametrize(
    "content", [b"", b"<html>404</html>" * 40, b"\x1f\x8b", b"NRRD0004\n", b"ObjectType = Image\n"]
)
@pytest.mark.parametrize("name", [*FILES, "a.npz"])
def test_foreign_content_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_scan(tmp_path / name)
    assert name in str(caught.value)
    assert caught.value.remedy


def test_unknown_formats_and_missing_files_are_refused(tmp_path: Path) -> None:
    for name, words in (("a.txt", "not a known scan format"), ("a.dcm", "file not found"), ("a.nii.gz", "not found")):
        with pytest.raises(DataError, match=words):
            read_scan(tmp_path / name)
    with pytest.raises(DataError, match=r"known are \.nii\.gz.*\.nrrd.*\.mha.*\.npz and DICOM") as caught:
        read_scan(tmp_path / "scan.jpg")
    assert len(str(caught.value).splitlines()) <= 5


@pytest.mark.parametrize("name", ["../b.raw", "/etc/hostname", "sub/b.raw", "link.raw", "..\\b.raw"])
def test_a_data_file_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "scan"
    (folder / "sub").mkdir(parents=True)
    for place in (tmp_path, folder / "sub"):
        (place / "b.raw").write_bytes(bytes(10 * 12 * 14 * 2))
    (folder / "link.raw").symlink_to(tmp_path / "b.raw")
    (folder / "a.nhdr").write_bytes(PLAIN_NRRD + b"data file: " + name.encode() + b"\n")
    meta = f"ObjectType = Image\nNDims = 3\nDimSize = 10 12 14\nElementType = MET_SHORT\nElementDataFile = {name}\n"
    (folder / "a.mhd").write_text(meta)
    for header in ("a.nhdr", "a.mhd"):
        with pytest.raises(DataError, match="outside the folder"):
            read_scan(folder / header)


def test_storage_variants(tmp_path: Path) -> None:
    volume = np.arange(10 * 12 * 14, dtype=np.int16).reshape((10, 12, 14), order="F")
    little = volume.tobytes(order="F")
    big = volume.astype(">i2").tobytes(order="F")
    (tmp_path / "v.raw").write_bytes(b"x" * 7 + little)
    variants = {
        "big.nrrd": PLAIN_NRRD.replace(b"little", b"big") + b"\n" + big,
        "members.nrrd": PLAIN_NRRD.replace(b"raw", b"gz")
        + b"\n"
        + gzip.compress(little[:500])
        + gzip.compress(little[500:]),
        "skip.nhdr": PLAIN_NRRD + b"byte skip: 7\ndata file: v.raw\n",
        "end.nhdr": PLAIN_NRRD + b"byteskip: -1\ndatafile: v.raw\n",
    }
    meta = b"NDims = 3\nDimSize = 10 12 14\nElementType = MET_SHORT\n"
    variants |= {
        "big.mha": meta + b"ElementByteOrderMSB = True\nElementDataFile = LOCAL\n" + big,
        "gzip.mha": meta + b"CompressedData = True\nElementDataFile = LOCAL\n" + gzip.compress(little),
        "zlib.mha": meta + b"CompressedData = True\nElementDataFile = LOCAL\n" + zlib.compress(little),
        "skip.mhd": meta + b"HeaderSize = 7\nElementDataFile = v.raw\n",
        "end.mhd": meta + b"HeaderSize = -1\nElementDataFile = v.raw\n",
    }
    for name, content in variants.items():
        (tmp_path / name).write_bytes(content)
        raw = read_scan(tmp_path / name)
        np.testing.assert_array_equal(raw.voxels_xyz, volume, err_msg=name)
        assert (raw.spacing_mm, raw.oriented) == (None, False), name


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b"encoding: ascii\n", "unsupported storage"),
        (b"encoding: bzip2\n", "unsupported storage"),
        (b"encoding: raw\nline skip: 3\n", "unsupported storage"),
        (b"encoding: raw\nbyte skip: -7\n", "no offset"),
        (b"encoding: raw\ndata file: LIST\n", "several files"),
        (b"encoding: raw\ndata file: v%03d.raw 1 9 1\n", "several files"),
        (b"encoding: raw\ndata file: none.raw\n", "none.raw: file not found"),
    ],
)
def test_unsupported_nrrd_storage_is_named(tmp_path: Path, header: bytes, words: str) -> None:
    (tmp_path / "a.nhdr").write_bytes(PLAIN_NRRD.replace(b"encoding: raw\n", header) + b"\n")
    with pytest.raises(DataError, match=words):
        read_scan(tmp_path / "a.nhdr")


@pytest.mark.parametrize("name", ["a.nrrd", "a.mha"])
def test_number_types_and_shapes(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    for dtype in ("u1", "i1", "u2", "i4", "u4", "f4", "f8"):
        volume = np.abs(chest()).clip(0, 100).astype(dtype)
        raw = read_scan(save_volume(path, volume))
        np.testing.assert_array_equal(raw.voxels_xyz, volume)
        assert raw.voxels_xyz.dtype == np.dtype(dtype)
    for pixels, words in (
        (np.zeros((8, 8), np.int16), "shape"),
        (np.zeros((2, 8, 8, 8), np.int16), "shape"),
        (np.zeros((2, 8, 8), np.int16), "too thin"),
        (np.zeros((8, 8, 8), np.complex64), "not a real number"),
    ):
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(pixels, isVector=False), str(path))
        with pytest.raises(DataError, match=words):
            read_scan(path)
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(np.zeros((8, 8, 8, 3), np.uint8), isVector=True), str(path))
    with pytest.raises(DataError, match=r"not a real number|shape"):
        read_scan(path)


@pytest.mark.parametrize("name", ["a.nrrd", "a.mha"])
@pytest.mark.parametrize("spacing", [(0.01, 0.7, 0.7), (50.0, 0.7, 0.7), (10.0, 0.1, 1.0)])
def test_impossible_spacing_is_refused(tmp_path: Path, name: str, spacing: tuple[float, float, float]) -> None:
    with pytest.raises(DataError, match="voxel size"):
        read_scan(save_volume(tmp_path / name, chest(), spacing))
