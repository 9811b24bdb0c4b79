"""A full or read-only disk ends a run with a clear message and leaves what was there."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from tiny_runs import lines, newest
from tiny_task import TINY_TASK, tiny_config

from mg3d.errors import RunFailedError
from mg3d.training import checkpoint_io
from mg3d.training.checkpoint_io import check_file
from mg3d.training.trainer import run
from tests.full_disk import small_files


def test_disk_full_at_the_second_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync, count = os.fsync, [0]

    def fill(descriptor: int) -> None:
        count[0] += 1
        if (count[0] > 12) and os.fstat(descriptor).st_size > 2000:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(checkpoint_io.os, "fsync", fill)
    cfg = tiny_config(log_dir=str(tmp_path), checkpoint_every_n_steps=2)
    with pytest.raises(RunFailedError, match=r"cannot write .*\.ckpt.*: No space left on device .* free"):
        run(cfg, TINY_TASK)
    monkeypatch.undo()
    run_dir = newest(tmp_path)
    left = list((run_dir / "checkpoints").iterdir())
    assert [entry for entry in left if entry.name.startswith(".")] == []
    assert check_file(run_dir / "checkpoints/last.ckpt") == ""
    assert json.loads((run_dir / "status.json").read_text(encoding="utf-8"))["state"] == "failed"


def test_disk_full_while_logging(tmp_path: Path) -> None:
    with small_files(40_000), pytest.raises(RunFailedError, match=r"cannot (append to|write|save)") as caught:
        run(tiny_config(log_dir=str(tmp_path), max_epoch=None, max_steps=400), TINY_TASK)
    assert caught.value.exit_code == 1 and len(lines(newest(tmp_path))) > 10
