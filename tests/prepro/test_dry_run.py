"""The dry run: what would be packed, why not, how long and how large."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from packing import pack_ct_rate
from prepro_builders import ct_rate_tree


def test_dry_run_counts_estimates_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = ct_rate_tree(tmp_path / "raw", train=12, valid=3)
    table = root / "dataset" / "radiology_text_reports" / "train_reports.csv"
    lines = table.read_text(encoding="utf-8").splitlines()
    table.write_text("\n".join(line for line in lines if "train_5_" not in line) + "\n")
    assert pack_ct_rate(root, tmp_path / "out", "--dry-run", "--workers", "4") == 0
    written = capsys.readouterr()
    figures = json.loads(written.out.splitlines()[-1])
    assert figures["rows"] == {"train": 10, "val": 1, "test": 3}
    assert figures["excluded"] == 1
    assert (figures["sampled"], figures["failed"], figures["workers"]) == (5, 0, 4)
    assert figures["seconds_per_scan"] > 0
    assert "no row in the report table" in written.err
    assert not (tmp_path / "out").exists()


def test_dry_run_estimates_the_disk_within_a_quarter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = ct_rate_tree(tmp_path / "raw", train=3, valid=1)
    size = ("--image-size", "64", "48", "64")
    assert pack_ct_rate(root, tmp_path / "out", *size, "--dry-run") == 0
    estimate = json.loads(capsys.readouterr().out)["estimated_bytes"]
    assert pack_ct_rate(root, tmp_path / "out", *size) == 0
    written = sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert 0.75 < estimate / written < 1.25


def test_dry_run_counts_damaged_scans(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = ct_rate_tree(tmp_path / "raw", train=2, valid=1)
    for path in root.rglob("train_*.nii.gz"):
        path.write_bytes(b"")
    assert pack_ct_rate(root, tmp_path / "out", "--dry-run") == 1
    assert json.loads(capsys.readouterr().out)["failed"] == 2
