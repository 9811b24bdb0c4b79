"""Run folders are never shared, JSON files never half written."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mg3d.errors import EnvironmentProblem, RunFailedError
from mg3d.training.run_folder import create_run_folder, run_name, versions, write_json


def test_name_is_the_published_one() -> None:
    assert run_name("task_pretrain_mg3d", 0, "") == "task_pretrain_mg3d-seed0-from_"
    assert run_name("x", 3, "weights/swin_b.ckpt") == "x-seed3-from_swin_b"


def test_runs_started_together_get_folders_of_their_own(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: create_run_folder(tmp_path, "x", 0), range(24)))
    assert len(set(folders)) == 24
    assert all((folder / "checkpoints").is_dir() for folder in folders)
    assert [number for number, _ in versions(folders[0].parent)] == list(range(23, -1, -1))


def test_a_removed_version_is_not_used_again_before_the_newest(tmp_path: Path) -> None:
    first, second = create_run_folder(tmp_path, "x", 0), create_run_folder(tmp_path, "x", 0)
    (first / "checkpoints").rmdir()
    first.rmdir()
    assert create_run_folder(tmp_path, "x", 0).name == "version_2" and second.name == "version_1"


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentProblem, match="cannot make a run folder") as caught:
        create_run_folder(tmp_path / "file", "x", 0)
    assert caught.value.exit_code == 2


def test_json_is_plain_and_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": (1, 2), "p": Path("x"), 3: None})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": [1, 2], "p": "x", "3": None}

    def fail(source: str, target: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(RunFailedError, match=r"cannot write .*a\.json: No space left"):
        write_json(path, {"b": 1})
    assert json.loads(path.read_text(encoding="utf-8"))["p"] == "x"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]
