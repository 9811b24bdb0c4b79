"""Reading one NIfTI file: every kind of damage is named, nothing is guessed."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from prepro_builders import chest, save_nifti

from mg3d.errors import DataError
from mg3d.scans.hounsfield import decide_rescale
from mg3d.scans.nifti import read_nifti


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    return save_nifti(tmp_path / "scan.nii.gz", chest())


def _patched_header(path: Path, offset: int, value: bytes) -> Path:
    data = bytearray(gzip.decompress(path.read_bytes()))
    data[offset : offset + len(value)] = value
    path.write_bytes(gzip.compress(bytes(data)))
    return path


def test_values_geometry_and_number_types_survive(tmp_path: Path) -> None:
    for dtype in (np.int16, np.int8, np.uint16, np.float32, np.float64, np.int32, np.uint8):
        volume = np.abs(chest()).clip(0, 120).astype(dtype)
        raw = read_nifti(save_nifti(tmp_path / f"{np.dtype(dtype).name}.nii.gz", volume))
        np.testing.assert_array_equal(raw.voxels_xyz, volume)
        assert raw.voxels_xyz.dtype == dtype
        assert raw.spacing_mm == (2.0, 2.5, 3.0)
        assert raw.oriented


def test_uncompressed_big_endian_nifti2_and_one_frame(tmp_path: Path) -> None:
    volume = chest()
    affine = np.diag([-2.0, -2.0, 3.0, 1.0])
    nib.save(nib.Nifti1Image(volume, affine), tmp_path / "plain.nii")
    nib.save(nib.Nifti2Image(volume, affine), tmp_path / "two.nii.gz")
    nib.save(nib.Nifti1Image(volume[..., None], affine), tmp_path / "frame.nii.gz")
    header = nib.Nifti1Header(endianness=">")
    header.set_data_dtype(">i2")
    nib.save(nib.Nifti1Image(volume, affine, header), tmp_path / "big.nii.gz")
    for name in ("plain.nii", "two.nii.gz", "frame.nii.gz", "big.nii.gz"):
        np.testing.assert_array_equal(read_nifti(tmp_path / name).voxels_xyz, volume)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_truncated_file_is_refused(scan: Path, share: float) -> None:
    data = scan.read_bytes()
    scan.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(DataError, match=r"truncated|holds|header"):
        read_nifti(scan)


def test_every_flipped_bit_is_found(scan: Path) -> None:
    data = scan.read_bytes()
    rng = np.random.default_rng(0)
    start = 10 + len(scan.name)  # the optional name of the gzip header is not covered by its checksum
    for _ in range(60):
        damaged = bytearray(data)
        damaged[int(rng.integers(start, len(data)))] ^= 1 << int(rng.integers(8))
        scan.write_bytes(bytes(damaged))
        with pytest.raises(DataError):
            read_nifti(scan)


@pytest.mark.parametrize(
    ("content", "words"), [(b"", "empty"), (b"<html>404</html>" * 40, "not a NIfTI"), (b"\x1f\x8b", "header|damaged")]
)
def test_foreign_content_is_named(scan: Path, content: bytes, words: str) -> None:
    scan.write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        read_nifti(scan)
    assert "scan.nii.gz" in str(caught.value)
    assert caught.value.remedy


def test_an_uncompressed_file_named_gz_is_refused(scan: Path) -> None:
    scan.write_bytes(gzip.decompress(scan.read_bytes()))
    with pytest.raises(DataError, match="not a NIfTI"):
        read_nifti(scan)


def test_missing_trailer_is_accepted_with_a_warning(scan: Path) -> None:
    wanted = read_nifti(scan)
    assert wanted.warnings == ()
    data = scan.read_bytes()
    for cut in (8, 4, 1):
        scan.write_bytes(data[:-cut])
        raw = read_nifti(scan)
        np.testing.assert_array_equal(raw.voxels_xyz, wanted.voxels_xyz)
        assert "checksum is missing" in raw.warnings[0]
    scan.write_bytes(data[:-9])
    with pytest.raises(DataError):
        read_nifti(scan)


def test_several_gzip_members_are_one_file(scan: Path) -> None:
    wanted = read_nifti(scan).voxels_xyz
    data = gzip.decompress(scan.read_bytes())
    scan.write_bytes(gzip.compress(data[:1000]) + gzip.compress(data[1000:]))
    np.testing.assert_array_equal(read_nifti(scan).voxels_xyz, wanted)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not found"):
        read_nifti(tmp_path / "none.nii.gz")


def test_header_bomb_is_refused_before_reading(scan: Path) -> None:
    _patched_header(scan, 40, struct.pack("<4h", 3, 32767, 32767, 3000))
    with pytest.raises(DataError, match=r"5999\.\d GiB"):
        read_nifti(scan)
    _patched_header(scan, 40, struct.pack("<4h", 3, 1000, 1000, 500))
    with pytest.raises(DataError, match="cannot hold"):
        read_nifti(scan)


def test_gzip_bomb_is_refused(scan: Path) -> None:
    data = gzip.decompress(scan.read_bytes())
    scan.write_bytes(gzip.compress(data + bytes(1 << 20)))
    with pytest.raises(DataError, match="more data"):
        read_nifti(scan)


@pytest.mark.parametrize("shape", [(30, 30), (30, 30, 1), (20, 20, 20, 2)])
def test_shapes_that_are_no_volume(tmp_path: Path, shape: tuple[int, ...]) -> None:
    nib.save(nib.Nifti1Image(np.zeros(shape, np.int16), np.eye(4)), tmp_path / "a.nii.gz")
    with pytest.raises(DataError, match="shape"):
        read_nifti(tmp_path / "a.nii.gz")


def test_colour_voxels_are_refused(tmp_path: Path) -> None:
    colour = np.zeros((8, 8, 8), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    nib.save(nib.Nifti1Image(colour, np.eye(4)), tmp_path / "a.nii.gz")
    with pytest.raises(DataError, match="not a real number"):
        read_nifti(tmp_path / "a.nii.gz")


def test_bad_geometry_is_refused(scan: Path) -> None:
    original = scan.read_bytes()
    faults = (
        (float("nan"), "NaN"),
        (float("inf"), "NaN"),
        (0.0, "singular"),
        (50.0, "voxel size"),
        (0.01, "voxel size"),
    )
    for value, words in faults:
        scan.write_bytes(original)
        with pytest.raises(DataError, match=words):
            read_nifti(_patched_header(scan, 280, struct.pack("<f", value)))


@pytest.mark.parametrize("value", [0.0, float("nan"), -2.0])
def test_unusable_pixdim(scan: Path, value: float) -> None:
    """With an sform its columns hold the spacing; with a qform or nothing there is none."""
    original = scan.read_bytes()
    _patched_header(scan, 80, struct.pack("<3f", value, value, value))
    assert read_nifti(scan).spacing_mm == (2.0, 2.5, 3.0)
    for qform in (0, 1):
        scan.write_bytes(original)
        _patched_header(scan, 80, struct.pack("<3f", value, value, value))
        _patched_header(scan, 252, struct.pack("<2h", qform, 0))
        raw = read_nifti(scan)
        assert raw.spacing_mm is None
        assert raw.oriented == bool(qform)


def test_a_foreign_voxel_offset_is_refused(scan: Path) -> None:
    original = scan.read_bytes()
    for value in (float("nan"), 0.0, -5.0, 1e12):
        scan.write_bytes(original)
        with pytest.raises(DataError, match="voxel offset"):
            read_nifti(_patched_header(scan, 108, struct.pack("<f", value)))


def test_zero_pixdim_means_no_spacing(scan: Path) -> None:
    _patched_header(scan, 80, struct.pack("<f", 0.0))
    _patched_header(scan, 252, struct.pack("<2h", 0, 0))
    raw = read_nifti(scan)
    assert raw.spacing_mm is None
    assert not raw.oriented


@pytest.mark.parametrize("intercept", [-1024.0, -8192.0])
def test_rescale_tells_both_releases_apart(intercept: float) -> None:
    hu = chest()
    unscaled = decide_rescale(hu - np.int16(intercept), (1.0, 0.0), (1.0, intercept))
    assert (unscaled.decision, unscaled.intercept, unscaled.plausible) == ("applied", intercept, True)
    scaled = decide_rescale(hu, (1.0, 0.0), (1.0, intercept))
    assert (scaled.decision, scaled.intercept, scaled.plausible) == ("as_stored", 0.0, True)


def test_rescale_obeys_and_refuses() -> None:
    hu = chest()
    assert decide_rescale(hu, (1.0, 0.0), (1.0, -1024.0), "apply").intercept == -1024.0
    assert decide_rescale(hu, (2.0, 3.0), (1.0, -1024.0), "skip").slope == 2.0
    assert not decide_rescale(hu, (1.0, 0.0), (1.0, -1024.0), "apply").plausible
    assert decide_rescale(hu, (1.0, 10.0), (2.0, 5.0), "apply").intercept == 25.0
    with pytest.raises(DataError, match="metadata"):
        decide_rescale(hu, (1.0, 0.0), None, "apply")
    with pytest.raises(DataError, match="no reading"):
        decide_rescale(np.full((8, 8, 8), 500, np.int16), (1.0, 0.0), (1.0, -1024.0))


def test_padding_does_not_pass_for_air() -> None:
    stored = chest() + np.int16(1024)
    stored[:, :4] = -2000
    assert decide_rescale(stored, (1.0, 0.0), (1.0, -1024.0)).decision == "applied"
