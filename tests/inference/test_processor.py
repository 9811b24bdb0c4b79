"""Scans and arrays to volumes: as packed data, in any mode, with what was done on record; bad ones refused."""

from __future__ import annotations

import csv
import itertools
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mg3d.datasets.arrow_table import ArrowTable
from mg3d.datasets.volume import ct_rate_offline_resample, ct_rate_online_crop_resize, to_unit_range
from mg3d.datasets.volume_report import VolumeReportDataset
from mg3d.errors import CheckpointError, DataError
from mg3d.inference.crops import MAX_CROPS, crop_starts, pad_to
from mg3d.inference.processor import Processor, load_processor, make_processor
from mg3d.inference.scan_table import read_scan_table
from mg3d.scans.prepare import prepare_scan
from mg3d.scans.read import read_scan
from prepro.prepro_pretraining_data import main as pack
from tests.inference.tiny_weights import SPACING_ZYX, checkpoint, chest_hu, export, save_nifti

SIZE = (64, 32, 32)


@pytest.fixture
def processor() -> Processor:
    return make_processor({"input_size_dhw": SIZE})


@pytest.mark.parametrize("store", ["crop", "native"])
def test_packing_and_reading_a_scan_gives_the_processors_volume(
    tmp_path: Path, processor: Processor, store: str
) -> None:
    scan = save_nifti(tmp_path / "raw" / "a.nii.gz", chest_hu())
    with open(tmp_path / "own.csv", "w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows(
            [("Volume", "Findings", "Split"), ("a.nii.gz", "The lungs are clear today. No mass is seen.", "test")]
        )
    table = ["own", "--table", str(tmp_path / "own.csv"), "--root", str(tmp_path / "raw"), "--out", str(tmp_path)]
    sizes = ["--image-size", *map(str, SIZE)] if store == "crop" else ["--store", "native"]
    assert pack([*table, *sizes, "--workers", "1"]) == 0
    rows = ArrowTable([tmp_path / "clm_own_test.arrow"])
    dataset = VolumeReportDataset(rows, corpus="clm_own", tokenizer=None, size_dhw=SIZE)
    packed_D1HW = dataset.image(0)
    volume = processor(scan).volumes
    assert volume.shape == (1, 1, *SIZE) and volume.dtype == np.float32
    assert np.abs(packed_D1HW.numpy()[:, 0] - volume[0, 0]).max() < 1e-3


def test_rounding_is_the_only_difference_from_a_packed_row(tmp_path: Path, processor: Processor) -> None:
    raw = read_scan(save_nifti(tmp_path / "a.nii.gz", chest_hu()))
    stored = prepare_scan(raw, processor.geometry, dtype=np.int16).voxels_hu
    exact = prepare_scan(raw, processor.geometry).voxels_hu
    assert np.array_equal(np.rint(exact).astype(np.int16), stored)
    found = processor(tmp_path / "a.nii.gz").volumes[0, 0]
    assert np.array_equal(found, (exact - np.float32(-1000)) / np.float32(2000))
    assert np.abs(found - to_unit_range(stored)).max() <= 0.5 / 2000 + 1e-6


def test_resize_is_the_published_chain(tmp_path: Path) -> None:
    hu_dhw = chest_hu()
    # the published functions take [X, Y, Z] and one in-plane spacing
    offline = ct_rate_offline_resample(hu_dhw.transpose(2, 1, 0), 1.0, 0.0, (6.0, 8.0, 8.0))
    published_D1HW = ct_rate_online_crop_resize(offline, size=SIZE)
    found = make_processor({"input_size_dhw": SIZE})(hu_dhw, spacing_mm=(6.0, 8.0, 8.0)).volumes[0, 0]
    assert np.abs(found - published_D1HW[:, 0]).max() < 2e-5


def test_an_array_a_tensor_and_a_file_give_the_same(tmp_path: Path, processor: Processor) -> None:
    hu = chest_hu()
    from_file = processor(save_nifti(tmp_path / "a.nii.gz", hu)).volumes
    assert np.array_equal(processor(hu, SPACING_ZYX).volumes, from_file)
    as_float = torch.from_numpy(hu.astype(np.float32))
    assert np.array_equal(processor(as_float, SPACING_ZYX).volumes, from_file)
    assert torch.equal(as_float, torch.from_numpy(hu.astype(np.float32)))


def test_what_was_done_is_on_record(tmp_path: Path, processor: Processor) -> None:
    found = processor(save_nifti(tmp_path / "a.nii.gz", chest_hu()))
    assert found.record["stored_shape_DHW"] == [40, 36, 38] and found.record["rescale"] == "as_stored"
    assert len(found.record["source_sha256"]) == 64 and found.source.endswith("a.nii.gz")
    assert repr(found) == (
        "ProcessedScan(1 volume(s) DHW 64x32x32, spacing 3.28x5.91x8.83 mm, resize, from 40x36x38 at 6x8x8.5 mm)"
    )


def test_crops_cover_the_whole_scan_at_the_voxel_size_of_training(processor: Processor) -> None:
    hu = chest_hu()
    whole, one = processor(hu, SPACING_ZYX, mode="crops"), processor(hu, SPACING_ZYX)
    assert len(whole) == 8 and whole.volumes.shape == (8, 1, *SIZE)
    assert np.allclose(whole.spacing_mm, one.spacing_mm, rtol=0.03)
    assert whole.spacing_mm[0] * whole.grid_dhw.shape[0] == pytest.approx(40 * 6.0, rel=0.02)
    seen = np.zeros(whole.grid_dhw.shape, dtype=bool)
    for start in whole.starts:
        seen[tuple(slice(a, a + n) for a, n in zip(start, SIZE, strict=True))] = True
    assert seen.all()
    # the middle of the grid is the volume of mode resize
    middle = tuple(slice((n - size) // 2, (n - size) // 2 + size) for n, size in zip(seen.shape, SIZE, strict=True))
    assert np.abs(whole.grid_dhw[middle] - one.grid_dhw).mean() < 0.05


def test_crops_have_the_voxel_size_asked_for(processor: Processor) -> None:
    found = replace(processor, crop_spacing_mm=(3.0, 4.0, 4.0))(chest_hu(), SPACING_ZYX, mode="crops")
    assert np.allclose(found.spacing_mm, (3.0, 4.0, 4.0), rtol=0.02)
    assert found.grid_dhw.shape == (80, 72, 81) and len(found) > 8
    coarse = replace(processor, crop_spacing_mm=(20.0, 20.0, 20.0))(chest_hu(), SPACING_ZYX, mode="crops")
    assert len(coarse) == 1 and coarse.grid_dhw.shape == SIZE
    assert coarse.grid_dhw[0].max() == 0.0  # air around the small scan


@pytest.mark.parametrize(("shape", "overlap"), [((64, 32, 32), 0.25), ((65, 40, 90), 0.25), ((200, 33, 32), 0.5)])
def test_neighbouring_crops_overlap_and_reach_the_border(shape: tuple[int, int, int], overlap: float) -> None:
    starts = crop_starts(shape, SIZE, overlap)
    for axis, (have, want) in enumerate(zip(shape, SIZE, strict=True)):
        along = sorted({start[axis] for start in starts})
        assert along[0] == 0 and along[-1] == have - want
        assert all(b - a <= want * (1 - overlap) + 1 for a, b in itertools.pairwise(along))


def test_impossible_crops_are_refused() -> None:
    with pytest.raises(DataError, match=f"at most {MAX_CROPS}"):
        crop_starts((2000, 2000, 2000), SIZE)
    with pytest.raises(ValueError, match="holds no crop"):
        crop_starts((8, 8, 8), SIZE)
    with pytest.raises(ValueError, match="overlap"):
        crop_starts(SIZE, SIZE, 1.0)
    assert pad_to(np.ones((2, 3, 3)), (3, 3, 3)).sum() == 18


def test_bad_scans_are_refused_with_the_reason(tmp_path: Path, processor: Processor) -> None:
    hu = chest_hu()
    with pytest.raises(DataError, match="too thin"):
        processor(save_nifti(tmp_path / "slice.nii.gz", hu[:1]))
    with pytest.raises(DataError, match="is not that of a CT"):
        processor(save_nifti(tmp_path / "spacing.nii.gz", hu, (600.0, 8.0, 8.0)))
    with pytest.raises(DataError, match="no such file"):
        processor(tmp_path / "absent.nii.gz")
    with pytest.raises(DataError, match="looks like a chest CT"):
        processor(save_nifti(tmp_path / "mask.nii.gz", (hu > 0).astype(np.int16)))
    with pytest.raises(DataError, match=r"give spacing_mm=\(z, y, x\)"):
        processor(hu)
    with pytest.raises(DataError, match="is not that of a CT"):
        processor(hu, (0.0, 1.0, 1.0))
    with pytest.raises(DataError, match="not finite"):
        processor(np.where(hu > 0, np.nan, hu), SPACING_ZYX)
    with pytest.raises(DataError, match="3-D volume"):
        processor(hu[0], SPACING_ZYX)
    with pytest.raises(DataError, match="choose resize or crops"):
        processor(hu, SPACING_ZYX, mode="whole")  # type: ignore[arg-type]


def test_a_table_gives_scale_and_voxel_size_that_the_file_lacks(tmp_path: Path, processor: Processor) -> None:
    hu = chest_hu()
    table = tmp_path / "metadata.csv"
    table.write_text(
        "VolumeName,RescaleSlope,RescaleIntercept,XYSpacing,ZSpacing\n"
        'a.nii.gz,1,-8192,"[8.0, 8.0]",6.0\nb.nii.gz,,x,[nan],\n'
    )
    rows = read_scan_table([table])
    assert rows["a"].rescale == (1.0, -8192.0) and rows["a"].spacing_mm == (6.0, 8.0, 8.0)
    assert rows["b"].rescale is None and rows["b"].spacing_mm is None
    scan = save_nifti(tmp_path / "a.nii.gz", hu + 8192)
    with pytest.raises(DataError, match="looks like a chest CT"):
        processor(scan)
    found = replace(processor, table=rows)(scan)
    assert found.record["rescale"] == "applied"
    assert np.array_equal(found.volumes, processor(hu, SPACING_ZYX).volumes)
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="columns 'VolumeName'"):
        read_scan_table([tmp_path / "other.csv"])


def test_the_preparation_comes_from_the_weights(tmp_path: Path) -> None:
    assert load_processor("swin_b") == Processor(crop_fractions_dhw=(0.88, 0.65625, 0.875))
    run = checkpoint(tmp_path, spacing_mm=[2.0, 1.0, 1.0], window_hu=[-900, 300])
    from_run = load_processor(run)
    assert from_run.size_dhw == SIZE and from_run.target_spacing_mm == (2.0, 1.0, 1.0)
    assert from_run.window_hu == (-900, 300)
    assert load_processor(export(tmp_path / "e")).size_dhw == SIZE
    (tmp_path / "metadata.csv").write_text("VolumeName,RescaleSlope,RescaleIntercept\na.nii.gz,1,-1024\n")
    with_table = load_processor(run, metadata=tmp_path / "metadata.csv")
    assert with_table.table["a"].rescale == (1.0, -1024.0) and with_table != from_run
    assert load_processor(run, assumed_spacing_mm=(1, 1, 1)).assumed_spacing_mm == (1, 1, 1)


def test_preparations_that_are_not_understood_are_refused() -> None:
    with pytest.raises(CheckpointError, match="only DHW=LPS"):
        make_processor({"axis_order": "WHD"})
    with pytest.raises(CheckpointError, match="8-bit grey"):
        make_processor({"window_hu": "grey8"})
    assert make_processor({"window_hu": "grey8"}, window_hu=(-1000, 1000)).window_hu == (-1000, 1000)
    for broken in ({"size_dhw": [1, 2]}, {"size_dhw": [0, 1, 1]}, {"window_hu": [5, -5]}, {"target_spacing_mm": "x"}):
        with pytest.raises(CheckpointError, match="no geometry"):
            make_processor(broken)


def test_importing_the_package_or_the_processor_loads_no_torch(repository: Path) -> None:
    program = (
        "import sys, mg3d, mg3d.inference.processor, mg3d.inference.places\n"
        "assert len(mg3d.__all__) <= 8 and mg3d.__version__\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
        "mg3d.load_processor\n"
        "assert 'torch' not in sys.modules\n"
        "assert mg3d.load_model.__name__ == 'load_model' and 'torch' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=repository, check=True)
