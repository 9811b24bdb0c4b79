"""``--store native`` from the scans to the samples of a training run."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from packing import image_of, manifest_of, rows_of
from prepro_builders import ct_rate_tree, ctrg_tree

from mg3d.datasets.arrow_table import ArrowTable
from mg3d.datasets.volume_report import VolumeReportDataset
from prepro.journal import Journal
from prepro.prepro_pretraining_data import main

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "datasets"))

TRAIN = "clm_ct_rate_train.arrow"


def _pack(root: Path, out: Path, *more: str) -> Path:
    assert main(["ct_rate", "--root", str(root), "--out", str(out), "--workers", "1", *more]) == 0
    return out / TRAIN


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ct_rate_tree(tmp_path_factory.mktemp("native") / "raw", train=3, valid=1)


@pytest.fixture(scope="module")
def native(root: Path) -> Path:
    return _pack(root, root.parent / "native", "--store", "native")


def _samples(path: Path, size: tuple[int, int, int]) -> list[np.ndarray]:
    from arrow_builders import tokenizer

    data = VolumeReportDataset(ArrowTable([path]), corpus="clm_ct_rate", tokenizer=tokenizer(), size_dhw=size)
    return [data[number].image[:, 0].numpy() for number in range(len(data))]


@pytest.mark.parametrize("size", [(128, 96, 128), (64, 32, 64)])
def test_training_sees_what_the_crop_store_gives(
    root: Path, native: Path, tmp_path: Path, size: tuple[int, int, int]
) -> None:
    crop = _pack(root, tmp_path, "--image-size", *map(str, size))
    pairs = list(zip(_samples(native, size), _samples(crop, size), strict=True))
    assert len(pairs) == 2
    for found, wanted in pairs:
        assert found.shape == wanted.shape == size
        assert np.abs(found - wanted).max() <= 1e-3
        assert wanted.std() > 0.1


def test_rows_are_whole_compressed_and_described(native: Path) -> None:
    table = ArrowTable([native])
    row = table.row(0)
    assert row["image_shape"] == [40, 86, 80]  # 20 x 26 x 30 voxels of 3 x 2.5 x 2 mm at 1.5 x 0.75 x 0.75 mm
    np.testing.assert_allclose(row["spacing_mm"], (1.5, 0.75, 0.75), rtol=0.02)
    assert native.stat().st_size < 0.8 * sum(2 * np.prod(row["image_shape"]) for row in rows_of(native))
    assert manifest_of(native.parent, "clm_ct_rate_train")["config"]["geometry"]["store"] == "native"
    np.testing.assert_array_equal(image_of(rows_of(native)[0]), row["image"])


def test_workers_and_a_broken_run_do_not_change_a_byte(
    root: Path, native: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class KilledError(BaseException):
        """Ends a run in this process as abruptly as an exception can."""

    real, calls = Journal.append, iter(range(9))

    def deadly(*arguments: object, **more: object) -> object:
        if next(calls) == 2:  # the header, then the first row
            raise KilledError
        return real(*arguments, **more)

    with monkeypatch.context() as patch, pytest.raises(KilledError):
        patch.setattr(Journal, "append", deadly)
        _pack(root, tmp_path, "--store", "native")
    assert _pack(root, tmp_path, "--store", "native", "--workers", "2").read_bytes() == native.read_bytes()


def test_without_target_spacing_rows_keep_the_stored_grid(root: Path, tmp_path: Path) -> None:
    path = _pack(root, tmp_path, "--store", "native", "--target-spacing", "none")
    assert rows_of(path)[0]["image_shape"] == [20, 26, 30]


def test_slices_without_voxel_size_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    annotation = ctrg_tree(tmp_path, train=1, test=1)
    arguments = ["--root", str(tmp_path), "--annotation", str(annotation), "--out", str(tmp_path / "out")]
    assert main(["ctrg", *arguments, "--store", "native"]) == 2
    assert "--store crop" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
