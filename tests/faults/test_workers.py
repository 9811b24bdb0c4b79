"""Loader workers that die or meet a bad sample end the run with a message a user can act on."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from tiny_runs import finish, lines, newest, start, wait_until
from torch.utils.data import DataLoader, Dataset

from mg3d.errors import DataError
from mg3d.training.failures import told_plainly


class BadRow(Dataset):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, row: int) -> Any:
        raise DataError("checksum differs", "pack the file again", case_id="train_7_a_1", path="/data/a b.arrow")


def test_an_error_in_a_worker_keeps_its_own_words() -> None:
    with pytest.raises(DataError) as caught, told_plainly():
        next(iter(DataLoader(BadRow(), num_workers=1)))
    assert caught.value.message == "/data/a b.arrow, case train_7_a_1: checksum differs"
    assert caught.value.remedy == "pack the file again"
    assert "Traceback" not in str(caught.value)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_killed_worker_ends_the_run_and_leaves_no_process(tmp_path: Path) -> None:
    process = start(tmp_path, num_workers=2, vision_encoder_options={"sleep_s": 0.2})
    wait_until(lambda: list(tmp_path.glob("*/version_*")) and 2 in lines(newest(tmp_path)), process)
    workers = children(process.pid)
    os.kill(workers[0], signal.SIGKILL)
    assert finish(process, tmp_path) == 1
    told = (tmp_path / "output.txt").read_text()
    assert "error: DataLoader worker" in told and "lower num_workers" in told
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
