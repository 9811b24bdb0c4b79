"""Loader workers that die or meet a bad sample end the run with a message a user can act on."""

from __future__ import annotations

import os
import re
import signal
import socket
from multiprocessing import resource_sharer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from tiny_runs import lines, newest, start, wait_until
from torch.utils.data import DataLoader, Dataset

from mg3d.errors import DataError, RunFailedError
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


@pytest.mark.parametrize("place", ["absent", "closed"])
def test_a_worker_that_dies_while_handing_over_is_told_as_one(tmp_path: Path, place: str) -> None:
    """Its socket is gone, or closes before it answers; torch itself notices the death only later."""
    address = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as listener:
        if place == "closed":
            listener.bind(address)
            listener.listen()
            Thread(target=lambda: listener.accept()[0].close(), daemon=True).start()
        with pytest.raises(RunFailedError, match="a DataLoader worker ended") as caught, told_plainly():
            resource_sharer._resource_sharer.get_connection((address, 1))
    assert caught.value.exit_code == 1 and "lower num_workers" in caught.value.remedy
    with pytest.raises(FileNotFoundError), told_plainly():
        (tmp_path / "absent").read_text(encoding="utf-8")


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()]


def shared_memory_of(pids: list[int]) -> list[str]:
    """Files in shared memory that torch named after one of the processes."""
    return [entry.name for entry in Path("/dev/shm").glob("torch_*") if int(entry.name.split("_")[1]) in pids]


@pytest.mark.parametrize(("step", "victim"), [(1, 0), (2, 1), (4, 0)])
def test_a_killed_worker_ends_the_run_and_leaves_no_process(tmp_path: Path, step: int, victim: int) -> None:
    process = start(tmp_path, num_workers=2, vision_encoder_options={"sleep_s": 0.2})
    wait_until(lambda: list(tmp_path.glob("*/version_*")) and step in lines(newest(tmp_path)), process)
    assert process.is_alive(), (tmp_path / "output.txt").read_text()[-2500:]
    workers = children(process.pid)
    assert len(workers) == 2
    os.kill(workers[victim], signal.SIGKILL)
    process.join(60)
    assert process.exitcode == 1
    told = (tmp_path / "output.txt").read_text(encoding="utf-8")
    dead = rf"DataLoader worker \(pid(\(s\))? {workers[victim]}\)|a DataLoader worker ended while it handed over"
    assert re.search(f"error: ({dead})", told) and "lower num_workers" in told, told[-2500:]
    assert "Traceback" not in told
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    assert shared_memory_of([process.pid, *workers]) == []
