"""``--window-hu`` and ``--crop-fractions`` from the scans to training, verifier and stored geometry."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packing import SIZE, image_of, manifest_of, pack_ct_rate, pack_ctrg, rows_of
from prepro_builders import ct_rate_tree, ctrg_tree
from verify_builders import GEOMETRY, codes, packed_rows, run_verify, write_rows

from mg3d.datasets.arrow_schema import make_schema, parse_window
from mg3d.datasets.arrow_table import ArrowTable
from mg3d.datasets.stored_geometry import stored_geometry
from mg3d.datasets.volume_report import ConcatReports, VolumeReportDataset
from mg3d.errors import DataError
from mg3d.scans.geometry import Geometry
from prepro.prepro_pretraining_data import main
from prepro.readers.ct_rate import CtRateReader

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "datasets"))

TRAIN = "clm_ct_rate_train.arrow"
WINDOW = (-160, 240)
FLAGS = ("--window-hu", "-160", "240")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ct_rate_tree(tmp_path_factory.mktemp("window") / "raw", train=4, valid=1)


@pytest.fixture(scope="module")
def narrow(root: Path) -> Path:
    out = root.parent / "narrow"
    assert pack_ct_rate(root, out, *FLAGS) == 0
    return out


def _data(path: Path, first_row: int = 0, **choices: Any) -> VolumeReportDataset:
    from arrow_builders import tokenizer

    return VolumeReportDataset(
        ArrowTable([path]), corpus="clm_ct_rate", tokenizer=tokenizer(), first_row=first_row, **choices
    )


def test_rows_are_clipped_and_described(root: Path, narrow: Path) -> None:
    table = ArrowTable([narrow / TRAIN])
    row = rows_of(narrow / TRAIN)[0]
    reader = CtRateReader(root, Geometry(size=(8, 6, 8), target_spacing_mm=None, window_hu=WINDOW))
    wanted = next(reader.load(case).voxels for case in reader.find_cases().cases if case.image_id == row["image_id"])
    np.testing.assert_array_equal(image_of(row), wanted)
    assert (wanted.min(), wanted.max() <= 240) == (-160, True)
    assert table.metadata["mg3d.window_hu"] == "[-160,240]"
    assert manifest_of(narrow, TRAIN.removesuffix(".arrow"))["config"]["window_hu"] == "[-160,240]"
    assert stored_geometry(narrow, ["clm_ct_rate"])["window_hu"] == [-160, 240]


def test_corpora_of_different_windows_keep_their_own(root: Path, narrow: Path, tmp_path: Path) -> None:
    assert pack_ct_rate(root, tmp_path) == 0
    wide, other = _data(tmp_path / TRAIN, size_dhw=(8, 6, 8)), narrow / TRAIN
    both = ConcatReports([wide, _data(other, len(wide), size_dhw=(8, 6, 8))])
    for number, path, (low, high) in ((0, tmp_path / TRAIN, (-1000, 1000)), (len(wide), other, WINDOW)):
        stored = ArrowTable([path]).row(0)["image"].astype(np.float64)
        np.testing.assert_allclose(both[number].image[:, 0].numpy(), (stored - low) / (high - low), atol=1e-6)
    with pytest.raises(DataError, match="other metadata"):
        ArrowTable([tmp_path / TRAIN, other])


def test_verify_goes_by_the_window_of_the_file(narrow: Path) -> None:
    code, findings, _ = run_verify(narrow, "--strict")
    assert (code, findings) == (0, [])


def test_another_window_packs_again(root: Path, tmp_path: Path) -> None:
    for flags, low in (((), -1000), (FLAGS, -160), ((), -1000)):
        assert pack_ct_rate(root, tmp_path, *flags) == 0
        assert min(image_of(row).min() for row in rows_of(tmp_path / TRAIN)) == pytest.approx(low, abs=5)


@pytest.mark.parametrize("store", ["crop", "native"])
def test_crop_fractions_reach_the_samples(root: Path, tmp_path: Path, store: str) -> None:
    size = ["--image-size", "40", "86", "80"] if store == "crop" else ["--store", "native"]
    fractions = ["--crop-fractions", "1", "0.5", "0.75"]
    arguments = ["ct_rate", "--root", str(root), "--workers", "1", *size]
    assert main([*arguments, "--out", str(tmp_path / "part"), *fractions]) == 0
    assert main([*arguments, "--out", str(tmp_path / "whole"), "--crop-fractions", "none"]) == 0
    whole = _data(tmp_path / "whole" / TRAIN, size_dhw=(40, 86, 80))[0].image[:, 0]
    part = _data(tmp_path / "part" / TRAIN, size_dhw=(40, 43, 60))[0].image[:, 0]
    if store == "native":
        np.testing.assert_allclose(part, whole[:, 22:65, 10:70], atol=1e-6)
    assert stored_geometry(tmp_path / "part", ["clm_ct_rate"])["crop_fractions_dhw"] == [1, 0.5, 0.75]
    part_row, whole_row = (rows_of(tmp_path / name / TRAIN)[0] for name in ("part", "whole"))
    if store == "crop":
        shares = np.array(part_row["spacing_mm"]) / whole_row["spacing_mm"]
        np.testing.assert_allclose(shares, (1, 0.5, 0.75), rtol=1e-6)


def test_crop_of_slices_follows_too(tmp_path: Path) -> None:
    annotation = ctrg_tree(tmp_path / "raw", train=2, test=1)
    for name, flags in (("default", ()), ("same", ("0.88", "0.65625", "0.875")), ("whole", ("none",))):
        more = ("--crop-fractions", *flags) if flags else ()
        assert pack_ctrg(annotation, tmp_path / name, *more) == 0
    default, same, whole = (
        rows_of(tmp_path / name / "clm_chest_ctrg_test.arrow")[0] for name in ("default", "same", "whole")
    )
    assert default["row_crc32"] == same["row_crc32"]
    np.testing.assert_allclose(np.multiply(whole["spacing_mm"], (8, 6, 8)), (20 * 1.5, 32 * 0.75, 32 * 0.75))
    slices = [image_of(row).mean(axis=(1, 2)) for row in (default, whole)]
    assert slices[1][0] > slices[0][0] and slices[1][-1] < slices[0][-1]  # stored head to feet, packed the other way


@pytest.mark.parametrize(
    "flags",
    [
        ["--window-hu", "240", "-160"],
        ["--window-hu", "5", "5"],
        ["--window-hu", "-40000", "0"],
        ["--crop-fractions", "0", "1", "1"],
        ["--crop-fractions", "1", "1", "1.1"],
        ["--crop-fractions", "1", "nan", "1"],
        ["--crop-fractions", "0.5"],
    ],
)
def test_nonsense_is_refused(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str]) -> None:
    assert main(["ct_rate", "--root", str(root), "--out", str(tmp_path / "out"), *SIZE, *flags]) == 2
    message = capsys.readouterr().err
    assert flags[0] in message and "mend:" in message and len(message.splitlines()) <= 5
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["", "[1]", "[5,5]", "[1,0]", "[0.5,2]", "[-1000,99999]", "grey", "null", "[true,5]"])
def test_windows_that_are_none_are_damage(text: str) -> None:
    with pytest.raises(DataError, match="window"):
        parse_window(text, path="a.arrow")
    assert (parse_window("grey8"), parse_window("[-160,240]")) == (None, (-160, 240))


def test_values_outside_their_window_are_found(tmp_path: Path) -> None:
    for window, found in (("[-1024,3071]", False), ("[-900,900]", True)):
        schema = make_schema(geometry=GEOMETRY, window_hu=window)
        path = write_rows(tmp_path / window / TRAIN, packed_rows(2, schema=schema))
        assert ("outside_window" in codes(run_verify(path)[1])) is found
