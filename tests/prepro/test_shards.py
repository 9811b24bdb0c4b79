"""Several files per split, several processes on one output folder, and disks that give up."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from packing import SIZE, contents, manifest_of, pack_ct_rate, visible
from prepro_builders import chest, ct_rate_tree, save_nifti

from mg3d.datasets.arrow_files import find_arrow_files
from mg3d.datasets.arrow_table import ArrowTable
from prepro import arrow_writer

SCRIPT = Path(__file__).resolve().parents[2] / "prepro" / "prepro_pretraining_data.py"
SHARDS = ("--rows-per-shard", "3")


@pytest.fixture(scope="module")
def download(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ct_rate_tree(tmp_path_factory.mktemp("shards") / "raw", train=9, valid=2)


def command(root: Path, out: Path, *more: object) -> list[str]:
    return [sys.executable, str(SCRIPT), "ct_rate", "--root", str(root), "--out", str(out), *SIZE, *map(str, more)]


def test_shards_hold_the_rows_of_the_single_file(download: Path, tmp_path: Path) -> None:
    pack_ct_rate(download, tmp_path / "one")
    pack_ct_rate(download, tmp_path / "many", *SHARDS)
    files = find_arrow_files(tmp_path / "many", "clm_ct_rate", "train")
    assert [path.name for path in files] == [f"clm_ct_rate_train-0000{n}-of-00003.arrow" for n in range(3)]
    one, many = ArrowTable(find_arrow_files(tmp_path / "one", "clm_ct_rate", "train")), ArrowTable(files)
    assert len(one) == len(many) == 8
    for index in range(8):
        first, second = one.row(index), many.row(index)
        assert first.pop("image").tobytes() == second.pop("image").tobytes()
        assert first == second
    whole, parts = (manifest_of(tmp_path / name, "clm_ct_rate") for name in ("one", "many"))
    assert whole["rows"] == parts["rows"] == {"train": 8, "val": 1, "test": 2}
    assert whole["text"] == parts["text"]
    assert [entry["rows"] for entry in parts["files"]] == [3, 3, 2, 1, 2]


def test_two_processes_share_the_files(download: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pack_ct_rate(download, tmp_path / "alone", *SHARDS)
    capsys.readouterr()
    assert pack_ct_rate(download, tmp_path / "out", *SHARDS, "--shard", "2/2") == 0
    second = json.loads(capsys.readouterr().out)
    assert (second["published"], len(second["missing"])) == (False, 3)
    assert second["rows"] == {"train": 3, "val": 1, "test": 0}
    assert visible(tmp_path / "out") == []
    assert pack_ct_rate(download, tmp_path / "out", *SHARDS, "--shard", "1/2") == 0
    first = json.loads(capsys.readouterr().out)
    assert (first["published"], first["missing"]) == (True, [])
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


def test_processes_at_the_same_time(download: Path, tmp_path: Path) -> None:
    pack_ct_rate(download, tmp_path / "alone", *SHARDS)
    jobs = [
        subprocess.Popen(
            command(download, tmp_path / "out", *SHARDS, "--shard", f"{part}/2"),
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        for part in (1, 2)
    ]
    summaries = [json.loads(job.communicate(timeout=100)[0]) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0]
    assert any(summary["published"] for summary in summaries)
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


def test_more_parts_than_files_is_a_mistake(download: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pack_ct_rate(download, tmp_path / "out", "--shard", "1/4") == 2
    assert "--rows-per-shard" in capsys.readouterr().err


def _hold(path: Path, text: str, mode: int = fcntl.LOCK_EX) -> int:
    path.parent.mkdir(exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    fcntl.flock(descriptor, mode)
    os.write(descriptor, text.encode())
    return descriptor


def test_a_file_another_process_writes_is_left_alone(
    download: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    held = _hold(out / ".clm_ct_rate_train.arrow.lock", "node7 4711 \n")
    assert pack_ct_rate(download, out) == 2
    assert "being written by host node7, process 4711" in capsys.readouterr().err
    os.close(held)  # its process died
    assert pack_ct_rate(download, out) == 0
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_other_settings_beside_a_running_process_are_refused(
    download: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    held = _hold(out / ".clm_ct_rate.run.lock", f"node7 4711 {'a' * 64}\n", fcntl.LOCK_SH)
    assert pack_ct_rate(download, out) == 2
    assert "host node7, process 4711 is packing clm_ct_rate" in capsys.readouterr().err
    os.close(held)
    assert pack_ct_rate(download, out) == 0


def test_leftovers_of_another_plan_are_removed_with_one_line(
    download: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    pack_ct_rate(download, out, *SHARDS, "--shard", "1/2")
    others = [out / ".clm_ct_rate_train-00000-of-00009.arrow.partial", out / ".clm_own_train.arrow.partial"]
    for path in others:
        path.touch()
    caplog.clear()
    pack_ct_rate(download, out)
    assert [path.exists() for path in others] == [False, True]
    assert sum("leftover files" in message for message in caplog.messages) == 1


def test_a_new_set_replaces_the_old_one_whole(
    download: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    pack_ct_rate(download, out, *SHARDS)
    assert pack_ct_rate(download, out, "--rows-per-shard", "4") == 0
    assert len(find_arrow_files(out, "clm_ct_rate", "train")) == 2
    assert len(visible(out)) == 2 * 4 + 1
    (out / "clm_ct_rate.manifest.json").unlink()
    assert pack_ct_rate(download, out) == 2
    assert "files of another packing" in capsys.readouterr().err
    assert len(visible(out)) == 2 * 4


def test_a_leak_between_shards_keeps_the_set_unpublished(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = ct_rate_tree(tmp_path / "raw", train=9, valid=2)
    for name in ("train/train_3/train_3_a/train_3_a_1", "valid/valid_2/valid_2_a/valid_2_a_1"):
        save_nifti(root / "dataset" / f"{name}.nii.gz", chest(77))
    shards = (*SHARDS, "--val-fraction", "0")
    parts = [pack_ct_rate(root, tmp_path / "out", *shards, "--shard", part) for part in ("1/2", "2/2")]
    assert parts == [0, 2]
    error = capsys.readouterr().err
    assert "valid_2_a_1 (test) and train_3_a_1 (train)" in error
    assert visible(tmp_path / "out") == []
    listed = tmp_path / "leave_out.txt"
    listed.write_text("train_3_a_1\n")
    assert pack_ct_rate(root, tmp_path / "out", *shards, "--exclude", str(listed)) == 0
    manifest = manifest_of(tmp_path / "out", "clm_ct_rate")
    assert manifest["rows"]["train"] == 8
    assert [item["image_id"] for item in manifest["exclusions"]] == ["train_3_a_1"]


def test_a_full_disk_is_explained_and_survived(
    download: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    pack_ct_rate(download, tmp_path / "whole")
    real = arrow_writer._Sink.write

    def full(sink: arrow_writer._Sink, data: object) -> int:
        if sink._position > 9000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(sink, data)

    with monkeypatch.context() as patch:
        patch.setattr(arrow_writer._Sink, "write", full)
        assert pack_ct_rate(download, out) == 1
    error = capsys.readouterr().err
    assert "No space left" in error and "free, this run needed" in error
    assert visible(out) == []
    assert pack_ct_rate(download, out) == 0
    assert contents(out) == contents(tmp_path / "whole")


def test_a_size_limit_ends_the_command_without_traceback(download: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        command(download, tmp_path / "out"),
        capture_output=True,
        encoding="utf-8",
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000)),
    )
    assert done.returncode == 1
    assert "File too large" in done.stderr and "Traceback" not in done.stderr
    assert visible(tmp_path / "out") == []


@pytest.mark.parametrize("place", ["file/out", "/proc/out"])
def test_a_folder_that_cannot_be_written_is_refused(
    download: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    (tmp_path / "file").touch()
    assert pack_ct_rate(download, tmp_path / place) == 2
    assert "cannot write in" in capsys.readouterr().err
