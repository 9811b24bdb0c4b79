"""Geometry: published numbers, canonical directions, physical truth."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
from prepro_builders import chest, save_nifti
from safetensors.numpy import load_file
from scan_files import real

from mg3d.datasets.volume import ct_rate_offline_resample, ct_rate_online_crop_resize, quantise_hu, to_unit_range
from mg3d.scans.geometry import Geometry, grid_spacing, linear_matrix, plan_axes, resample_crop, to_canonical
from mg3d.scans.nifti import read_nifti

CASES = ("ct/lidc_0314_chest_2mm.nii.gz", "ct/crlm_1006_upper_abdomen_pad-3024.nii.gz")


def _canonical(path: Path, mode: str = "canonical") -> tuple[np.ndarray, tuple[float, float, float]]:
    raw = read_nifti(path)
    assert raw.spacing_mm is not None
    volume, spacing, _ = to_canonical(raw.voxels_xyz, raw.affine, raw.spacing_mm, mode, fill=-1000.0)
    return volume, spacing


@pytest.mark.realdata
@pytest.mark.parametrize("name", CASES)
def test_real_ct_gives_the_expected_published_values(shared_dir: Path, reference_dir: Path, name: str) -> None:
    """On made data: the golden resampling and the equality with the two published steps, below."""
    expected = json.loads((reference_dir / "expected" / "ctrate_preprocess.json").read_text(encoding="utf-8"))
    case = next(case for case in expected["cases"] if case["input"] == name)
    volume, spacing = _canonical(shared_dir / "data" / name)
    first = case["stage1_offline (z,x,y)"]
    z, x, y = first["shape"]
    whole = Geometry(size=(z, y, x), crop_fractions=(1.0, 1.0, 1.0))
    offline_zxy = resample_crop(volume, plan_axes(volume.shape, spacing, whole)).transpose(0, 2, 1) / 1000
    second = case["stage2_resized (128,128,96)"]
    crop = resample_crop(volume, plan_axes(volume.shape, spacing, Geometry()))
    online_zxy = (crop.transpose(0, 2, 1) + 1000) / 2000
    for found, wanted in ((offline_zxy, first), (online_zxy, second)):
        assert list(found.shape) == wanted["shape"]
        assert found.mean(dtype=np.float64) == pytest.approx(wanted["mean"], abs=2e-5)
        assert found.std(dtype=np.float64) == pytest.approx(wanted["std"], abs=2e-5)
        for sample in wanted["samples"]:
            assert found[tuple(sample["index"])] == pytest.approx(sample["value"], abs=2e-5)
    stored = to_unit_range(np.rint(crop).astype(np.int16)).transpose(0, 2, 1)
    assert np.abs(stored - online_zxy).max() < 1e-3


def test_golden_offline_resampling(golden_dir: Path) -> None:
    tensors = load_file(golden_dir / "ct_rate_nifti_to_npz.safetensors")
    raw_zyx = tensors["in.raw_xyz"].transpose(2, 1, 0)
    depth, columns, rows = tensors["out.arr_0"].shape
    geometry = Geometry(size=(depth, rows, columns), crop_fractions=(1.0, 1.0, 1.0))
    out = resample_crop(raw_zyx, plan_axes(raw_zyx.shape, (1.0, 0.68, 0.68), geometry), 1.0, -1024.0)
    np.testing.assert_allclose(out.transpose(0, 2, 1) / 1000, tensors["out.arr_0"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("shape", "spacing"), [((40, 70, 56), (2.5, 0.7, 0.7)), ((90, 64, 64), (1.0, 4.2, 4.2))])
def test_fused_resampling_equals_the_published_two_steps(
    shape: tuple[int, int, int], spacing: tuple[float, float, float]
) -> None:
    volume = np.random.default_rng(1).integers(-1300, 1500, shape).astype(np.int16)
    published = ct_rate_online_crop_resize(ct_rate_offline_resample(volume.transpose(2, 1, 0), 1.0, 0.0, spacing))
    fused = (resample_crop(volume, plan_axes(shape, spacing, Geometry())) + 1000) / 2000
    assert np.abs(published[:, 0] - fused).max() < 2e-5
    assert np.abs(quantise_hu(published[:, 0]).astype(int) - np.rint(fused * 2000 - 1000)).max() <= 1


@pytest.mark.parametrize("axes", ["RAS", "LAI", "PIR", "SAL", "IPL"])
def test_flipped_and_permuted_copies_give_the_identical_volume(tmp_path: Path, axes: str) -> None:
    volume = chest()
    wanted, wanted_spacing = _canonical(save_nifti(tmp_path / "lps.nii.gz", volume))
    found, spacing = _canonical(save_nifti(tmp_path / f"{axes}.nii.gz", volume, axes=axes))
    np.testing.assert_array_equal(wanted, volume.transpose(2, 1, 0))
    np.testing.assert_array_equal(found, wanted)
    assert spacing == wanted_spacing == (3.0, 2.5, 2.0)


def test_a_cube_keeps_its_physical_size_and_place() -> None:
    volume = np.full((60, 80, 100), -1000, dtype=np.int16)
    volume[20:40, 30:50, 60:90] = 1000  # 20 x 2 mm, 20 x 1.5 mm, 30 x 1 mm
    spacing = (2.0, 1.5, 1.0)
    geometry = Geometry(size=(64, 96, 72), target_spacing_mm=(1.0, 1.0, 1.0))
    plans = plan_axes(volume.shape, spacing, geometry)
    cube = (resample_crop(volume, plans) + 1000) / 2000
    steps = np.array(grid_spacing(plans))
    assert cube.sum() * steps.prod() == pytest.approx(40 * 30 * 30, rel=0.02)
    positions = np.stack(np.meshgrid(*[np.arange(n) for n in cube.shape], indexing="ij"))
    centre_mm = ((positions * cube).sum(axis=(1, 2, 3)) / cube.sum() - (np.array(cube.shape) - 1) / 2) * steps
    middle_mm = np.array([30.0, 40.0, 75.0]) * spacing - np.array(volume.shape) / 2 * spacing
    np.testing.assert_allclose(centre_mm, middle_mm, atol=1.0)


def test_metal_is_clipped_before_it_bleeds() -> None:
    volume = np.full((8, 8, 8), -1000, dtype=np.int16)
    volume[4] = 3000
    same = Geometry(size=(16, 8, 8), target_spacing_mm=None, crop_fractions=(1.0, 1.0, 1.0))
    out = resample_crop(volume, plan_axes(volume.shape, (1.0, 1.0, 1.0), same))
    assert out[7, 0, 0] == pytest.approx(-500, abs=1e-2)  # a quarter of the way from air to the clipped metal


def test_interpolation_rows_sum_to_one() -> None:
    for stored, out, corners in ((7, 20, False), (20, 7, False), (20, 7, True), (5, 5, False)):
        np.testing.assert_allclose(linear_matrix(stored, out, corners).sum(axis=1), 1.0, atol=1e-12)
    np.testing.assert_array_equal(linear_matrix(5, 5), np.eye(5))


@pytest.mark.parametrize("scan_file", ["made.nrrd", *real("ct/cip_ct-64.nrrd")], indirect=True)
def test_rotated_grid_comes_back_and_a_turned_header_does_not(scan_file: Path, tmp_path: Path) -> None:
    image = SimpleITK.ReadImage(str(scan_file))
    angle = np.radians(20)
    turned = SimpleITK.Image(image.GetSize(), SimpleITK.sitkInt16)
    turned.SetSpacing(image.GetSpacing())
    direction = [np.cos(angle), -np.sin(angle), 0, np.sin(angle), np.cos(angle), 0, 0, 0, 1]
    centre = np.array(image.TransformContinuousIndexToPhysicalPoint([(n - 1) / 2 for n in image.GetSize()]))
    half = (np.array(image.GetSize()) - 1) / 2 * image.GetSpacing()
    turned.SetDirection(direction)
    turned.SetOrigin((centre - np.array(direction).reshape(3, 3) @ half).tolist())
    rotated = SimpleITK.Resample(image, turned, SimpleITK.Transform(), SimpleITK.sitkLinear, -1000)
    SimpleITK.WriteImage(rotated, str(tmp_path / "rotated.nii.gz"))
    volume, spacing = _canonical(tmp_path / "rotated.nii.gz")
    wanted = SimpleITK.GetArrayFromImage(image).astype(np.float32)
    assert np.allclose(spacing, image.GetSpacing()[::-1], rtol=1e-4)
    start = [(have - want) // 2 for have, want in zip(volume.shape, wanted.shape, strict=True)]
    back = volume[tuple(slice(s, s + n) for s, n in zip(start, wanted.shape, strict=True))]
    radius = np.hypot(*np.meshgrid(np.arange(64) - 31.5, np.arange(64) - 31.5, indexing="ij")) < 28
    body = (wanted > -500) & radius
    assert np.abs(back - wanted)[body].mean() < 60
    plain, _ = _canonical(tmp_path / "rotated.nii.gz", "snap")
    assert plain.shape == wanted.shape
    assert np.abs(plain - wanted)[body].mean() > 60


def test_a_tilt_below_one_degree_is_only_reordered(tmp_path: Path) -> None:
    volume = chest()
    turn = np.eye(4)
    angle = np.radians(0.5)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    nib.save(nib.Nifti1Image(volume, turn @ np.diag([-2.0, -2.0, 2.0, 1.0])), tmp_path / "a.nii.gz")
    found, _ = _canonical(tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(found, volume.transpose(2, 1, 0))
