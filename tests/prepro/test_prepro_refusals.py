"""What is left out or refused while packing, and what is left behind then."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from packing import manifest_of, pack_ct_rate, rows_of, visible
from prepro_builders import (
    FINDINGS,
    IMPRESSION,
    SMALL,
    KilledReader,
    chest,
    ct_rate_tree,
    save_nifti,
)

from mg3d.errors import DataError, EnvironmentProblem
from mg3d.scans.geometry import Geometry
from prepro.engines import create_engine
from prepro.make_arrow import PackOptions, pack
from prepro.readers.base import Case


def test_scans_that_kill_their_workers_leave_nothing_to_write(tmp_path: Path) -> None:
    case = Case("train_1_a_1", "train_1", "train", (tmp_path / "a.nii.gz",), FINDINGS, IMPRESSION, splits=("train",))
    with pytest.raises(DataError, match="the worker reading it was killed"):
        pack(KilledReader(), [case, case], [], PackOptions(tmp_path / "out", SMALL, create_engine(2)))
    assert list((tmp_path / "out").iterdir()) == []


def test_a_disk_that_is_too_small_is_refused_before_reading(tmp_path: Path) -> None:
    case = Case("a", "a", "train", (tmp_path / "a.nii.gz",), FINDINGS, IMPRESSION, splits=("train",))
    huge = Geometry(size=(100_000, 100_000, 100_000))
    with pytest.raises(EnvironmentProblem, match="GiB free"):
        pack(KilledReader(), [case], [], PackOptions(tmp_path / "out", huge))


def test_exclusions_are_listed_with_reasons(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = ct_rate_tree(tmp_path / "raw", train=6, valid=1)
    base = root / "dataset"
    table = base / "radiology_text_reports" / "train_reports.csv"
    lines = table.read_text(encoding="utf-8").splitlines()
    text = f'"{FINDINGS} Case 3.",'
    assert text in lines[3]
    lines[2] = "train_2_a_1.nii.gz,,,Not given.,Not given."
    lines[3] = lines[3].replace(text, "NA,").replace(f'"{IMPRESSION}"', "")
    del lines[4]
    table.write_text("\n".join(lines) + "\n")
    save_nifti(base / "train" / "odd" / "holiday.nii.gz", chest())
    (base / "train" / "train_5" / "train_5_a" / "train_5_a_1.nii.gz").write_bytes(b"<html>")
    assert pack_ct_rate(root, tmp_path / "out", "--val-fraction", "0") == 1
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (summary["rows"]["train"], summary["excluded"], summary["failed"]) == (2, 4, 1)
    reasons = {item["image_id"]: item["reason"] for item in manifest_of(tmp_path / "out", "clm_ct_rate")["exclusions"]}
    assert "fewer than 3 words" in reasons["train_2_a_1"]
    assert "fewer than 3 words" in reasons["train_3_a_1"]
    assert "no row" in reasons["train_4_a_1"]
    assert "NIfTI" in reasons["train_5_a_1"]
    assert "split_patient" in reasons["holiday"]


def test_equal_content_in_two_splits_stops_a_clean_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = ct_rate_tree(tmp_path / "raw", train=2, valid=1)
    for path in (root / "dataset").rglob("*.nii.gz"):
        save_nifti(path, chest(5))
    assert pack_ct_rate(root, tmp_path / "out") == 2
    error = capsys.readouterr().err.splitlines()[-2:]
    assert "equal content" in error[0]
    assert "train_1_a_1" in error[0] and "valid_1_a_1" in error[0]
    assert visible(tmp_path / "out") == []
    assert pack_ct_rate(root, tmp_path / "out", "--split-protocol", "reference") == 0
    assert manifest_of(tmp_path / "out", "clm_ct_rate")["shared_between_splits"]["count"] == 1
    manifest = manifest_of(tmp_path / "out", "clm_ct_rate_train")
    assert manifest["duplicates"] == [["train_1_a_1", "train_2_a_1"]]


def test_stop_at_the_first_bad_scan_leaves_the_old_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = ct_rate_tree(tmp_path / "raw", train=3, valid=1)
    assert pack_ct_rate(root, tmp_path / "out") == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    bad = root / "dataset" / "valid" / "valid_1" / "valid_1_a" / "valid_1_a_1.nii.gz"
    bad.write_bytes(bad.read_bytes()[:-30])
    capsys.readouterr()
    assert pack_ct_rate(root, tmp_path / "out", "--on-bad", "stop") == 2
    assert "valid_1_a_1" in capsys.readouterr().err
    assert {name: (tmp_path / "out" / name).read_bytes() for name in visible(tmp_path / "out")} == before


def test_no_word_of_a_report_reaches_the_messages(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    root = ct_rate_tree(tmp_path / "raw", train=4, valid=2)
    table = root / "dataset" / "radiology_text_reports" / "train_reports.csv"
    table.write_text(
        table.read_text(encoding="utf-8").replace("Trachea", "Jane Roe, born 1950-01-02, MRN 0815, trachea")
    )
    scans = sorted((root / "dataset" / "train").rglob("*.nii.gz"))
    scans[0].write_bytes(scans[0].read_bytes()[:2000])
    scans[1].write_bytes(scans[2].read_bytes())
    with caplog.at_level("DEBUG"):
        assert pack_ct_rate(root, tmp_path / "out", "--split-protocol", "reference") == 1
    captured = capsys.readouterr()
    manifests = "".join(path.read_text(encoding="utf-8") for path in (tmp_path / "out").glob("*.json"))
    assert "0815" in rows_of(tmp_path / "out" / "clm_ct_rate_train.arrow")[0]["findings"][0]
    for words in ("Jane", "1950", "0815", "bronchi"):
        assert words not in captured.out + captured.err + caplog.text + manifests
