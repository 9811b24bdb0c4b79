"""``--series`` and ``--follow-links`` on every command that has them."""

from __future__ import annotations

import csv
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from prepro import prepro_pretraining_data, verify
from tests.inference.tiny_weights import checkpoint, chest_hu, save_nifti
from tests.tools.command import answer, refusal
from tools import embed, visualize_datasets, zero_shot

sys.path += [str(Path(__file__).resolve().parents[1] / folder) for folder in ("scans", "prepro")]
from dicom_bytes import save_slices
from prepro_builders import FINDINGS, IMPRESSION, ct_rate_tree

OTHER = {0x0020000E: "1.2.3.10", 0x00200011: "5"}
GRID = ("--image-size", 16, 16, 16, "--workers", 1)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("weights"))


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    save_nifti(tmp_path / "scans" / "case_1" / "ct.nii.gz", chest_hu(1))
    save_nifti(tmp_path / "store" / "case_2" / "ct.nii.gz", chest_hu(2))
    (tmp_path / "scans" / "case_2").symlink_to(tmp_path / "store" / "case_2")
    return tmp_path / "scans"


@pytest.fixture
def two_series(tmp_path: Path) -> Path:
    volume = np.ascontiguousarray(chest_hu(3).transpose(2, 1, 0))
    heights = [3.0 * number for number in range(volume.shape[2])]
    save_slices(tmp_path / "s", volume, heights)
    save_slices(tmp_path / "s", volume[:, :, :-6], heights[:-6], OTHER, start="B")
    return tmp_path / "s"


def test_embed_says_which_links_it_left_out_or_follows_them(
    linked: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (linked, "--weights", weights, "--out", tmp_path / "e.parquet", "--workers", 1)
    found = answer(capsys, embed.main, *words)
    assert (found["embedded"], found["links_left_out"]) == (1, 1)
    assert "1 links to folders outside" in found["told"] and "--follow-links" in found["told"]
    found = answer(capsys, embed.main, *words, "--follow-links")
    assert (found["embedded"], found["already_there"]) == (1, 1) and "links_left_out" not in found


def test_zero_shot_says_which_links_it_left_out_or_follows_them(
    linked: Path, weights: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (linked, "--weights", weights, "--findings", "Cardiomegaly")
    found = answer(capsys, zero_shot.main, *words)
    assert (found["scans"], found["links_left_out"]) == (1, 1) and "--follow-links" in found["told"]
    assert answer(capsys, zero_shot.main, *words, "--follow-links")["scans"] == 2


def test_embed_takes_the_series_it_is_told(
    two_series: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (two_series, "--weights", weights, "--out", tmp_path / "e.parquet", "--workers", 1)
    assert "--series UID or --series largest" in refusal(capsys, embed.main, *words)
    assert answer(capsys, embed.main, *words, "--series", "largest")["embedded"] == 1
    assert "no series '9.9'" in refusal(
        capsys, zero_shot.main, two_series, "--weights", weights, "--findings", "X", "--series", "9.9"
    )


def test_own_data_are_packed_checked_and_shown_with_the_series_told(
    two_series: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "own.csv"
    with table.open("w", newline="", encoding="utf-8") as handle:
        csv.writer(handle).writerows([("volume", "findings", "split"), ("s", FINDINGS, "train")])
    words = ("own", "--table", table, "--out", tmp_path / "out", *GRID)
    pack = prepro_pretraining_data.main
    assert answer(capsys, pack, *words, "--series", "1.2.3.10")["warned"] == 1
    assert answer(capsys, verify.main, table, "--workers", 1, code=2)["errors"] >= 1
    assert answer(capsys, verify.main, table, "--workers", 1, "--series", "largest")["errors"] == 0
    drawn = answer(capsys, visualize_datasets.main, table, "--out", tmp_path / "g", "--series", "largest")
    assert (drawn["drawn"], drawn["bad"]) == (1, 0)


@pytest.fixture
def linked_tree(tmp_path: Path) -> Path:
    """A CT-RATE download of three patients; one is a link to a store inside the root, one to a store outside."""
    root = ct_rate_tree(tmp_path / "raw", train=3, valid=1)
    for number, store in ((1, root / "store"), (2, tmp_path / "store")):
        store.mkdir()
        patient = root / "dataset" / "train" / f"train_{number}"
        shutil.move(patient, store)
        patient.symlink_to(store / patient.name)
    return root


def test_linked_patients_are_packed_and_those_outside_are_named(
    linked_tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    pack = prepro_pretraining_data.main
    words = ("ct_rate", "--root", linked_tree, *GRID, "--val-fraction", 0)
    found = answer(capsys, pack, *words, "--out", tmp_path / "a")
    assert (found["rows"], found["excluded"]) == ({"train": 2, "val": 0, "test": 1}, 1)
    assert "1 links to folders outside" in caplog.text and "--follow-links" in caplog.text
    found = answer(capsys, pack, *words, "--out", tmp_path / "b", "--follow-links")
    assert (found["rows"], found["excluded"]) == ({"train": 3, "val": 0, "test": 1}, 0)


def test_verify_names_the_links_that_packing_leaves_out(linked_tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, verify.main, linked_tree, "--workers", 1, "--strict", code=1)
    assert "train_2: link to a folder outside the root (--follow-links searches it)" in found["printed"]
    assert found["scans"] == 4 and found["warnings"] >= 1
    found = answer(capsys, verify.main, linked_tree, "--workers", 1, "--strict", "--follow-links")
    assert (found["scans"], found["warnings"], found["errors"]) == (4, 0, 0)
    assert IMPRESSION not in found["printed"]
