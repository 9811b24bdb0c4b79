"""A run that is killed, damaged or changed: the next one goes on, and ends with the same bytes."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from packing import contents, pack_ct_rate, rows_of, visible
from prepro_builders import chest, ct_rate_tree, save_nifti

from prepro import shard_writer
from prepro.journal import Journal

SCRIPT = Path(__file__).resolve().parents[2] / "prepro" / "prepro_pretraining_data.py"
SHARDS = ("--rows-per-shard", "4")
RENAMES = 17  # two when a file is finished and two when it is published, of four files, and the data set's manifest


class Killed(BaseException):
    """Ends a run in this process as abruptly as an exception can."""


@pytest.fixture(scope="module")
def download(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = ct_rate_tree(tmp_path_factory.mktemp("resume") / "raw", train=9, valid=3)
    (root / "dataset" / "train" / "train_4" / "train_4_a" / "train_4_a_1.nii.gz").write_bytes(b"<html>")
    return root


@pytest.fixture(scope="module")
def unbroken(download: Path) -> dict[str, bytes]:
    out = download.parent / "unbroken"
    assert pack_ct_rate(download, out, *SHARDS) == 1
    return contents(out)


def die_at(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, call: int) -> None:
    """Let the ``call``-th call of a function end the run instead of doing its work."""
    real, calls = getattr(owner, name), iter(range(1, 1000))

    def deadly(*arguments: object, **more: object) -> object:
        if next(calls) == call:
            raise Killed
        return real(*arguments, **more)

    monkeypatch.setattr(owner, name, deadly)


def broken_off(download: Path, out: Path, monkeypatch: pytest.MonkeyPatch, entries: int) -> None:
    """Leave a run that was killed between a row and its journal line."""
    with monkeypatch.context() as patch:
        die_at(patch, Journal, "append", entries + 2)  # the header is a line, too
        with pytest.raises(Killed):
            pack_ct_rate(download, out)


@pytest.mark.parametrize("call", range(1, RENAMES + 1))
def test_death_before_any_rename_changes_nothing(
    download: Path, unbroken: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        die_at(patch, os, "replace", call)
        with pytest.raises(Killed):
            pack_ct_rate(download, out, *SHARDS)
    assert pack_ct_rate(download, out, *SHARDS) == 1
    assert contents(out) == unbroken


@pytest.mark.parametrize("call", [1, 2])
def test_death_right_after_finishing_a_file_leaves_nothing_behind(
    download: Path, unbroken: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        die_at(patch, shard_writer, "sync_directory", call)
        with pytest.raises(Killed):
            pack_ct_rate(download, out, *SHARDS)
    journals = list(out.glob(".*.journal.jsonl"))
    assert journals
    for journal in journals:  # the locks of a process killed with -9 stay, too
        Path(str(journal).replace(".journal.jsonl", ".lock")).write_text("host 1", encoding="utf-8")
    assert pack_ct_rate(download, out, *SHARDS) == 1
    assert contents(out) == unbroken


def test_every_rename_was_tried(download: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    die_at(monkeypatch, os, "replace", RENAMES + 1)
    assert pack_ct_rate(download, tmp_path / "out", *SHARDS) == 1


@pytest.mark.parametrize("call", [1, 2, 5, 9, 13])
def test_death_between_row_and_journal(
    download: Path, unbroken: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    with monkeypatch.context() as patch:
        die_at(patch, Journal, "append", call)
        with pytest.raises(Killed):
            pack_ct_rate(download, tmp_path / "out", *SHARDS)
    assert pack_ct_rate(download, tmp_path / "out", *SHARDS) == 1
    assert contents(tmp_path / "out") == unbroken


@pytest.mark.parametrize("damage", ["flip", "cut", "torn journal", "no journal", "no rows"])
def test_what_a_killed_run_left_is_verified(
    download: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    out = tmp_path / "out"
    pack_ct_rate(download, tmp_path / "whole")
    broken_off(download, out, monkeypatch, 6)
    partial, journal = (out / f".clm_ct_rate_train.arrow.{end}" for end in ("partial", "journal.jsonl"))
    data = bytearray(partial.read_bytes())
    assert len(rows_of(tmp_path / "whole" / "clm_ct_rate_train.arrow")) == 7
    if damage == "flip":
        data[len(data) // 2] ^= 1
        partial.write_bytes(data)
    elif damage == "cut":
        partial.write_bytes(data[: len(data) // 2])
    elif damage == "torn journal":
        journal.write_bytes(journal.read_bytes()[:-7])
    else:
        (journal if damage == "no journal" else partial).unlink()
    caplog.clear()
    assert pack_ct_rate(download, out) == 1
    assert contents(out) == contents(tmp_path / "whole")
    kept = [message.split()[4] for message in caplog.messages if "going on after" in message]
    wanted = {"flip": ["3"], "cut": ["3"], "torn journal": ["5"], "no journal": [], "no rows": []}[damage]
    assert kept == wanted


def test_other_settings_start_over_and_say_so(
    download: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken_off(download, tmp_path / "out", monkeypatch, 6)
    pack_ct_rate(download, tmp_path / "out", "--fragments", "sentence")
    pack_ct_rate(download, tmp_path / "fresh", "--fragments", "sentence")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")
    assert sum("clm_ct_rate_train.arrow: settings or scans changed: starting over" in m for m in caplog.messages) == 1


def test_a_finished_set_is_not_written_again(
    download: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    first = pack_ct_rate(download, out, *SHARDS), json.loads(capsys.readouterr().out)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    monkeypatch.setattr("prepro.readers.ct_rate.CtRateReader.load", None)
    again = pack_ct_rate(download, out, *SHARDS), json.loads(capsys.readouterr().out)
    for _, summary in (first, again):
        del summary["seconds"]
    assert again == first
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before


def test_a_mended_scan_is_packed_by_the_same_command(tmp_path: Path) -> None:
    root = ct_rate_tree(tmp_path / "raw", train=5, valid=1)
    bad = root / "dataset" / "train" / "train_2" / "train_2_a" / "train_2_a_1.nii.gz"
    good = bad.read_bytes()
    bad.write_bytes(b"")
    assert pack_ct_rate(root, tmp_path / "out", "--val-fraction", "0") == 1
    bad.write_bytes(good)
    assert pack_ct_rate(root, tmp_path / "out", "--val-fraction", "0") == 0
    names = [row["image_id"] for row in rows_of(tmp_path / "out" / "clm_ct_rate_train.arrow")]
    assert names == [f"train_{number}_a_1" for number in range(1, 6)]


def test_stop_also_refuses_what_an_earlier_run_left_out(
    download: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pack_ct_rate(download, tmp_path / "out") == 1
    capsys.readouterr()
    assert pack_ct_rate(download, tmp_path / "out", "--on-bad", "stop") == 2
    assert "train_4_a_1" in capsys.readouterr().err


def _start(root: Path, out: Path) -> subprocess.Popen[bytes]:
    words = ["ct_rate", "--root", root, "--out", out, "--image-size", 64, 64, 64, "--target-spacing", "none", *SHARDS]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), *map(str, words), "--workers", "1"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _await_start(process: subprocess.Popen[bytes], out: Path) -> float:
    while process.poll() is None and not (out.is_dir() and list(out.glob(".*.journal.jsonl"))):
        time.sleep(0.002)
    return time.monotonic()


def kill_and_repeat(root: Path, folder: Path, trials: int) -> None:
    """Kill the command at random moments, run it again, and compare with a run that was left alone."""
    process = _start(root, folder / "whole")
    began = _await_start(process, folder / "whole")
    assert process.wait() == 0
    duration = time.monotonic() - began
    wanted = contents(folder / "whole")
    moments = random.Random(1)
    for trial in range(trials):
        out = folder / str(trial)
        process = _start(root, out)
        _await_start(process, out)
        time.sleep(duration * moments.random())
        process.kill()
        process.wait()
        assert _start(root, out).wait() == 0
        assert contents(out) == wanted


@pytest.fixture(scope="module")
def larger_download(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = ct_rate_tree(tmp_path_factory.mktemp("larger"), train=24, valid=4)
    save_nifti(root / "dataset" / "train" / "train_1" / "train_1_a" / "train_1_a_1.nii.gz", chest(7), axes="RAI")
    return root


def test_kill_9_at_random_moments(larger_download: Path, tmp_path: Path) -> None:
    kill_and_repeat(larger_download, tmp_path, trials=2)


@pytest.mark.slow
def test_kill_9_at_ten_random_moments(larger_download: Path, tmp_path: Path) -> None:
    kill_and_repeat(larger_download, tmp_path, trials=10)


def test_names_are_hidden_until_the_end(download: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken_off(download, tmp_path / "out", monkeypatch, 8)
    assert visible(tmp_path / "out") == []
