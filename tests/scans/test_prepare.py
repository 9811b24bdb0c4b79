"""From any file to Hounsfield units on the wanted grid: orientation, scale, voxel size, physical truth."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
from prepro_builders import chest, save_nifti
from scan_files import axial_series, itk_image, made_scan, real, save_volume, signed_permutations

from mg3d.errors import DataError
from mg3d.scans.geometry import Geometry
from mg3d.scans.prepare import PreparedScan, prepare_scan
from mg3d.scans.raw_volume import RawVolume
from mg3d.scans.read import read_scan

AS_STORED = Geometry(store="native", target_spacing_mm=None)
REAL_ORIENTATIONS = (1, 10, 21, 30, 38, 47)


def _prepared(path: Path, geometry: Geometry = AS_STORED, **choices: object) -> PreparedScan:
    return prepare_scan(read_scan(path), geometry, **choices)  # type: ignore[arg-type]


@pytest.mark.parametrize("suffix", [".nii", ".nrrd", ".mha"])
def test_all_48_orientations_give_the_identical_volume(tmp_path: Path, suffix: str) -> None:
    volume = chest(shape=(10, 9, 8))
    wanted = np.clip(volume, -1000, 1000).transpose(2, 1, 0)
    for number, orientation in enumerate(signed_permutations()):
        path = save_volume(tmp_path / f"{number}{suffix}", volume, orientation=orientation)
        found = _prepared(path)
        np.testing.assert_array_equal(found.voxels_hu, wanted)
        assert found.spacing_mm == (3.0, 2.5, 2.0)
        assert found.record["orientation"] == "header"


@pytest.mark.parametrize("suffix", [".nii", ".nrrd", ".mha"])
@pytest.mark.parametrize("scan_file", ["made.nii.gz", *real("ct/lidc_0314_chest_2mm.nii.gz")], indirect=True)
def test_reordered_copies_of_a_cropped_volume_are_identical(scan_file: Path, tmp_path: Path, suffix: str) -> None:
    raw = read_scan(scan_file)
    small = raw.voxels_xyz[::2, ::2, ::2]
    crop = Geometry(size=(32, 24, 32))
    wanted = _prepared(save_volume(tmp_path / f"a{suffix}", small, (4.0, 4.0, 4.0)), crop).voxels_hu
    for number in REAL_ORIENTATIONS:
        path = save_volume(tmp_path / f"b{suffix}", small, (4.0, 4.0, 4.0), signed_permutations()[number])
        assert np.abs(_prepared(path, crop).voxels_hu - wanted).max() == 0


@pytest.mark.parametrize("offset", [1024, 8192])
@pytest.mark.parametrize(
    "scan_file",
    ["made.nii.gz", *real("ct/lidc_0314_chest_2mm.nii.gz", "ct/crlm_1006_upper_abdomen_pad-3024.nii.gz")],
    indirect=True,
)
def test_both_releases_of_a_volume_give_the_same_hu(scan_file: Path, tmp_path: Path, offset: int) -> None:
    raw = read_scan(scan_file)
    second = raw.voxels_xyz[::2, ::2]
    first = second + np.int16(offset)
    spacing = (4.0, 4.0, raw.spacing_mm[2] if raw.spacing_mm else 0.0)
    geometry, table = Geometry(size=(32, 24, 32)), (1.0, float(-offset))
    found = [
        _prepared(save_volume(tmp_path / "a.nii", voxels, spacing), geometry, table_rescale=table, dtype=np.int16)
        for voxels in (first, second)
    ]
    np.testing.assert_array_equal(found[0].voxels_hu, found[1].voxels_hu)
    assert [scan.record["rescale"] for scan in found] == ["applied", "as_stored"]
    assert found[0].voxels_hu.dtype == np.int16


@pytest.mark.realdata
def test_a_turned_header_turns_a_real_volume(shared_dir: Path) -> None:
    folder = shared_dir / "data" / "ct"
    check_turned(folder / "cip_ct-64.nrrd", folder / "cip_ct-64-transformed.nrrd")


def test_a_turned_header_turns_the_volume(tmp_path: Path) -> None:
    check_turned(made_scan(tmp_path / "made.nrrd"), made_scan(tmp_path / "made_turned.nrrd"))


def check_turned(straight: Path, transformed: Path) -> None:
    """Two files with the same voxels; the header of the second turns them by 20 degrees."""
    plain, turned = _prepared(straight), _prepared(transformed)
    header = SimpleITK.ReadImage(str(transformed))
    rotation = np.reshape(header.GetDirection(), (3, 3))
    assert plain.record["tilt_degrees"] == 0
    assert turned.record["tilt_degrees"] == pytest.approx(20, abs=0.1)
    assert plain.voxels_hu.shape != turned.voxels_hu.shape
    # about the common centre of both grids, the turned volume at p holds what the plain one holds at R^-1 p
    images = [_centred(scan) for scan in (plain, turned)]
    transform = SimpleITK.AffineTransform(3)
    transform.SetMatrix(rotation.T.ravel().tolist())
    wanted = SimpleITK.GetArrayFromImage(
        SimpleITK.Resample(images[0], images[1], transform, SimpleITK.sitkLinear, -1000)
    )
    assert (np.abs(turned.voxels_hu - wanted)[[0, -1], 30:50, 30:50] < 1).all()  # nothing is lost at the first slice
    edge = np.pad(np.ones(np.array(plain.voxels_hu.shape) - 2, np.float32), 1)
    edge_image = SimpleITK.GetImageFromArray(edge)
    edge_image.CopyInformation(images[0])
    inner = SimpleITK.GetArrayViewFromImage(SimpleITK.Resample(edge_image, images[1], transform)) == 1
    body = (wanted > -500) & inner
    assert np.abs(turned.voxels_hu - wanted)[body].mean() < 1.0
    against = SimpleITK.Resample(images[0], images[1], transform.GetInverse(), SimpleITK.sitkLinear, -1000)
    assert np.abs(turned.voxels_hu - SimpleITK.GetArrayViewFromImage(against))[body].mean() > 60


def _centred(scan: PreparedScan) -> SimpleITK.Image:
    image = SimpleITK.GetImageFromArray(scan.voxels_hu)
    sizes = np.array(scan.spacing_mm[::-1])
    image.SetSpacing(sizes.tolist())
    image.SetOrigin((-(np.array(image.GetSize()) - 1) / 2 * sizes).tolist())
    return image


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nrrd", "a.mha", "series"])
@pytest.mark.parametrize("spacing", [(1.5, 1.5, 1.5), (0.8, 0.9, 5.0), (4.0, 3.5, 2.5), (1.3, 2.6, 1.0)])
def test_a_cube_keeps_its_size_and_place(tmp_path: Path, name: str, spacing: tuple[float, float, float]) -> None:
    extent, low, high = np.array([130.0, 120.0, 140.0]), np.array([40.0, 35.0, 50.0]), np.array([80.0, 90.0, 100.0])
    shape = np.rint(extent / spacing).astype(int)
    first, last = np.rint(low / spacing).astype(int), np.rint(high / spacing).astype(int)
    volume = np.full(shape, -900, dtype=np.int16)
    volume[tuple(slice(a, b) for a, b in zip(first, last, strict=True))] = 100
    path = tmp_path / name
    if name == "series":
        axial_series(path, volume, spacing)
    else:
        save_volume(path, volume, spacing, signed_permutations()[29])
    for geometry in (Geometry(size=(64, 56, 60)), Geometry(store="native")):
        scan = _prepared(path, geometry)
        steps = np.array(scan.spacing_mm[::-1])
        inside = (scan.voxels_hu.transpose(2, 1, 0) + 900) / 1000
        middle = np.array(inside.shape) / 2
        for axis in range(3):
            profile = inside.max(axis=tuple({0, 1, 2} - {axis}))
            assert profile.sum() * steps[axis] == pytest.approx(
                (last - first)[axis] * spacing[axis], abs=steps[axis] / 2
            )
            place = (profile @ (np.arange(len(profile)) + 0.5)) / profile.sum() - middle[axis]
            wanted = ((first + last)[axis] / 2 - shape[axis] / 2) * spacing[axis]
            assert place * steps[axis] == pytest.approx(wanted, abs=steps[axis] / 2)


def test_the_record_and_the_source_of_the_spacing(tmp_path: Path) -> None:
    raw = read_scan(save_nifti(tmp_path / "a.nii.gz", chest()))
    scan = prepare_scan(raw, AS_STORED, table_spacing_mm=(3.0, 2.5, 2.0), assumed_spacing_mm=(1.0, 1.0, 1.0))
    assert scan.record == {
        "rescale": "as_stored",
        "spacing": "header",
        "orientation": "header",
        "tilt_degrees": 0.0,
        "filled_voxels": 0,
        "stored_shape_DHW": [20, 26, 30],
        "stored_spacing_mm": [3.0, 2.5, 2.0],
        "source_sha256": raw.source_sha256,
    }
    assert (scan.spacing_mm, scan.warnings) == ((3.0, 2.5, 2.0), ())
    differs = prepare_scan(raw, AS_STORED, table_spacing_mm=(5.0, 2.5, 2.0))
    assert differs.spacing_mm == (3.0, 2.5, 2.0)
    assert differs.warnings == ("metadata table says 2x2.5x5 mm (x, y, z), the header is used",)


def test_a_scan_without_spacing_needs_a_table_or_a_word(tmp_path: Path) -> None:
    raw = replace(read_scan(save_nifti(tmp_path / "a.nii.gz", chest())), spacing_mm=None)
    table = prepare_scan(raw, AS_STORED, table_spacing_mm=(3.0, 2.5, 2.0), assumed_spacing_mm=(1.0, 1.0, 1.0))
    assert (table.spacing_mm, table.record["spacing"]) == ((3.0, 2.5, 2.0), "table")
    assumed = prepare_scan(raw, AS_STORED, assumed_spacing_mm=(1.5, 0.7, 0.7))
    assert (assumed.spacing_mm, assumed.record["spacing"]) == ((1.5, 0.7, 0.7), "assumed")
    assert "assumed" in assumed.warnings[0]
    with pytest.raises(DataError, match="no voxel size") as caught:
        prepare_scan(raw, AS_STORED)
    assert "--assume-spacing" in caught.value.remedy
    for wrong in ((0.01, 1.0, 1.0), (50.0, 1.0, 1.0), (-1.0, 1.0, 1.0), (float("nan"), 1.0, 1.0)):
        with pytest.raises(DataError, match="voxel size"):
            prepare_scan(raw, AS_STORED, assumed_spacing_mm=wrong)


def test_a_table_spacing_follows_the_stored_axes(tmp_path: Path) -> None:
    for orientation in signed_permutations()[::7]:
        path = save_volume(tmp_path / "a.nii", chest(), orientation=orientation)
        raw = replace(read_scan(path), spacing_mm=None)
        scan = prepare_scan(raw, AS_STORED, table_spacing_mm=(3.0, 2.5, 2.0))
        np.testing.assert_array_equal(scan.voxels_hu, np.clip(chest(), -1000, 1000).transpose(2, 1, 0))
        assert scan.spacing_mm == (3.0, 2.5, 2.0)


def test_air_alone_is_refused(tmp_path: Path) -> None:
    air = np.random.default_rng(0).normal(-1000, 15, (8, 8, 8)).astype(np.int16)
    with pytest.raises(DataError, match="no reading of the values looks like a chest CT"):
        _prepared(save_nifti(tmp_path / "a.nii.gz", air))


@pytest.mark.parametrize("value", [-1000, 0, 40, 3000])
def test_a_constant_volume_is_refused_unless_told_otherwise(tmp_path: Path, value: int) -> None:
    path = save_nifti(tmp_path / "a.nii.gz", np.full((8, 8, 8), value, dtype=np.int16))
    with pytest.raises(DataError, match="no reading of the values looks like a chest CT") as caught:
        _prepared(path, table_rescale=(1.0, -1024.0))
    assert "a.nii.gz" in str(caught.value)
    assert caught.value.remedy == "use --rescale apply or skip"
    scan = _prepared(path, rescale="skip")
    assert scan.warnings == ("values do not look like a chest CT in HU",)


@pytest.mark.parametrize(("slope", "intercept"), [(0.0, 0.0), (float("nan"), float("nan")), (1.0, 0.0)])
def test_a_header_scale_of_zero_or_nan_means_none(tmp_path: Path, slope: float, intercept: float) -> None:
    image = nib.Nifti1Image(chest(), np.diag([-2.0, -2.5, 3.0, 1.0]))
    image.header["scl_slope"], image.header["scl_inter"] = slope, intercept
    path = tmp_path / "a.nii"
    nib.save(image, path)
    content = bytearray(path.read_bytes())
    content[112:120] = np.array([slope, intercept], dtype="<f4").tobytes()
    path.write_bytes(bytes(content))
    np.testing.assert_array_equal(_prepared(path).voxels_hu, np.clip(chest(), -1000, 1000).transpose(2, 1, 0))


def test_a_header_scale_is_applied(tmp_path: Path) -> None:
    path = save_nifti(tmp_path / "a.nii", (chest() + np.int16(100)) * np.int16(2))
    content = bytearray(path.read_bytes())
    content[112:120] = np.array([0.5, -100.0], dtype="<f4").tobytes()
    path.write_bytes(bytes(content))
    raw = read_scan(path)
    assert (raw.slope, raw.intercept) == (0.5, -100.0)
    found = prepare_scan(raw, AS_STORED).voxels_hu
    np.testing.assert_array_equal(found, np.clip(chest(), -1000, 1000).transpose(2, 1, 0))


def test_an_image_that_says_nothing_of_directions_counts_as_lps(tmp_path: Path) -> None:
    image = itk_image(chest(), np.diag([-2.0, -2.5, 3.0, 1.0]))
    SimpleITK.WriteImage(image, str(tmp_path / "a.mha"))
    content = (tmp_path / "a.mha").read_bytes()
    start, end = content.find(b"TransformMatrix"), content.find(b"CenterOfRotation")
    (tmp_path / "a.mha").write_bytes(content[:start] + content[end:])
    scan = _prepared(tmp_path / "a.mha")
    np.testing.assert_array_equal(scan.voxels_hu, np.clip(chest(), -1000, 1000).transpose(2, 1, 0))
    assert (scan.record["orientation"], scan.spacing_mm) == ("assumed LPS", (3.0, 2.5, 2.0))


@pytest.mark.parametrize("tilt", [0.0, 20.0])
@pytest.mark.parametrize("scale", [(1.0, 0.0), (0.5, -300.0)], ids=["whole limits", "broken limits"])
def test_every_interpolation_sees_clipped_values(tilt: float, scale: tuple[float, float]) -> None:
    angle = np.radians(tilt)
    affine = np.diag([-2.0, -2.5, 3.0, 1.0])
    affine[:2, :2] = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) @ affine[:2, :2]
    stored = ((chest().astype(np.float64) - scale[1]) / scale[0]).astype(np.int16)
    metal = stored.copy()
    metal[10:14, 12:15, 8:12] = 30_000
    clipped = np.clip(metal * scale[0] + scale[1], -161, 239).astype(np.float32)
    geometry = Geometry(size=(24, 20, 22), window_hu=(-161, 239))
    raws = [
        RawVolume(metal, affine, (2.0, 2.5, 3.0), *scale, oriented=True),
        RawVolume(clipped, affine, (2.0, 2.5, 3.0), 1.0, 0.0, oriented=True),
    ]
    found, wanted = (prepare_scan(raw, geometry, rescale="skip") for raw in raws)
    assert found.record["tilt_degrees"] == pytest.approx(tilt, abs=0.01)
    np.testing.assert_allclose(found.voxels_hu, wanted.voxels_hu, atol=1e-2)
    assert found.voxels_hu.min() == pytest.approx(-161, abs=1e-3)
    assert found.voxels_hu.max() == pytest.approx(239, abs=40)


def test_around_a_tilted_scan_lies_air_whatever_the_window() -> None:
    affine = np.diag([-2.0, -2.5, 3.0, 1.0])
    affine[:2, :2] = np.array([[0.8, -0.6], [0.6, 0.8]]) @ affine[:2, :2]
    raw = RawVolume(chest() + np.int16(500), affine, (2.0, 2.5, 3.0), 1.0, -500.0, oriented=True)
    for window, corner in (((-3000, 3000), -1000), ((-160, 240), -160)):
        scan = prepare_scan(raw, replace(AS_STORED, window_hu=window))
        assert scan.voxels_hu[0, 0, 0] == corner
