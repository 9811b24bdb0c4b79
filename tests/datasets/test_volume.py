from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from mg3d.datasets.volume import (
    Volume,
    centre_crop,
    centre_crop_or_pad,
    ct_rate_offline_resample,
    ct_rate_online_crop_resize,
    ctrg_stack,
    quantise_grey,
    quantise_hu,
    resize_trilinear,
    to_unit_range,
)


def entry_config(golden_dir: Path, name: str) -> dict:
    index = json.loads((golden_dir / "index.json").read_text(encoding="utf-8"))
    return next(entry for entry in index["entries"] if entry["name"] == name)["config"]


def test_offline_resample_equals_golden(golden_dir: Path) -> None:
    stored = load_file(golden_dir / "ct_rate_nifti_to_npz.safetensors")
    meta = entry_config(golden_dir, "ct_rate_nifti_to_npz")["meta"]
    in_plane = json.loads(meta["XYSpacing"])[0]
    spacing_mm = (meta["ZSpacing"], in_plane, in_plane)
    out = ct_rate_offline_resample(stored["in.raw_xyz"], meta["RescaleSlope"], meta["RescaleIntercept"], spacing_mm)
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, stored["out.arr_0"], rtol=1e-4, atol=1e-5)


def test_online_crop_equals_golden(golden_dir: Path) -> None:
    stored = load_file(golden_dir / "image_ct_rate.safetensors")
    out = ct_rate_online_crop_resize(stored["in.arr_0"])
    assert out.shape == (128, 1, 96, 128)
    np.testing.assert_allclose(out[::8, :, ::4, ::4], stored["out_slice"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose([out.mean(), out.std()], stored["out_mean_std"], rtol=1e-4, atol=1e-5)


def test_slice_stack_equals_golden(golden_dir: Path) -> None:
    stored = load_file(golden_dir / "image_ctrg.safetensors")
    config = entry_config(golden_dir, "image_ctrg")
    block = np.ones(config["block"], dtype=np.uint8)
    height, width = config["slice_hw"]
    slices = [np.kron(coarse, block)[:height, :width] for coarse in stored["coarse_u8"]]
    out = ctrg_stack(slices)[:, 0]
    np.testing.assert_allclose(out, stored["unique_slices"][stored["slice_map"]], rtol=0, atol=0.02)


@pytest.mark.realdata
def test_real_scan_through_both_stages(shared_dir: Path, reference_dir: Path) -> None:
    """On made data: the golden offline step and the golden online step, above."""
    case = json.loads((reference_dir / "expected/ctrate_preprocess.json").read_text(encoding="utf-8"))["cases"][0]
    scan = nibabel.load(shared_dir / "data" / case["input"])
    x_mm, y_mm, z_mm = case["nifti_zooms_xyz"]
    offline = ct_rate_offline_resample(np.asanyarray(scan.dataobj), 1.0, 0.0, (z_mm, y_mm, x_mm))
    expected = case["stage1_offline (z,x,y)"]
    assert list(offline.shape) == expected["shape"]
    for sample in expected["samples"]:
        assert offline[tuple(sample["index"])] == pytest.approx(sample["value"], abs=2e-5)
    online = ct_rate_online_crop_resize(offline)[:, 0].transpose(0, 2, 1)
    for sample in case["stage2_resized (128,128,96)"]["samples"]:
        assert online[tuple(sample["index"])] == pytest.approx(sample["value"], abs=2e-5)


@given(st.lists(st.integers(-32768, 32767), min_size=1, max_size=50))
@settings(max_examples=200, deadline=None)
def test_unit_range_is_monotone_bounded_and_quantises_back(values: list[int]) -> None:
    hu = np.sort(np.asarray(values, dtype=np.int16))
    unit = to_unit_range(hu)
    assert unit.dtype == np.float32
    assert unit.min() >= 0 and unit.max() <= 1 and (np.diff(unit) >= 0).all()
    np.testing.assert_array_equal(quantise_hu(unit), np.clip(hu, -1000, 1000))


def test_grey_range_quantises_back_and_other_types_are_refused() -> None:
    grey = np.arange(256, dtype=np.uint8)
    assert to_unit_range(grey)[[0, 255]].tolist() == [0.0, 1.0]
    np.testing.assert_array_equal(quantise_grey(to_unit_range(grey)), grey)
    with pytest.raises(TypeError, match="float64"):
        to_unit_range(np.zeros(3))


@given(
    st.tuples(*[st.integers(4, 40)] * 3), st.tuples(*[st.floats(0.3, 1.0)] * 3), st.tuples(*[st.integers(1, 20)] * 3)
)
@settings(max_examples=200, deadline=None)
def test_crop_and_resize_keep_the_shape_contract(shape: tuple, fractions: tuple, size: tuple) -> None:
    array = np.zeros(shape, dtype=np.int16)
    cropped = centre_crop(array, fractions)
    assert cropped.shape == tuple(int(n * f) for n, f in zip(shape, fractions, strict=True))
    resized = resize_trilinear(cropped, size)
    assert resized.shape == size and resized.dtype == np.float32


def test_centre_crop_start_and_empty_result() -> None:
    line = np.arange(9).reshape(9, 1, 1)
    assert centre_crop(line, (0.6, 1, 1))[:, 0, 0].tolist() == [2, 3, 4, 5, 6]  # 9//2 - 5//2 = 2
    with pytest.raises(ValueError, match="leave nothing"):
        centre_crop(line, (0.05, 1, 1))


def test_small_slices_are_padded_with_zeros_and_few_slices_refused() -> None:
    padded = centre_crop_or_pad(np.ones((3, 8), dtype=np.uint8), (6, 4))
    assert padded.shape == (6, 4)
    assert padded.sum(axis=1).tolist() == [0, 4, 4, 4, 0, 0]
    with pytest.raises(ValueError, match=r"1 slice\(s\)"):
        ctrg_stack([np.zeros((8, 8), dtype=np.uint8)])


def test_volume_says_what_it_is() -> None:
    scan = Volume(np.zeros((4, 3, 2), dtype=np.int16), (1.5, 0.75, 0.75))
    assert repr(scan) == "Volume(DHW 4x3x2 int16, spacing 1.5x0.75x0.75 mm, LPS, 0.0 MiB)"
    assert scan.extent_mm == (6.0, 2.25, 1.5)
    with pytest.raises(ValueError, match="three axes"):
        Volume(np.zeros((4, 3)), (1.0, 1.0, 1.0))
    with pytest.raises(ValueError, match="positive"):
        Volume(np.zeros((4, 3, 2)), (0.0, 1.0, 1.0))
