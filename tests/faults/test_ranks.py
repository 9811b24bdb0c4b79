"""Two processes over gloo: killed together, one alone, stopped, and one that meets a NaN."""

from __future__ import annotations

import os
import signal
import socket
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from kept_checkpoints import assert_same, final_state
from tiny_runs import compared, finish, lines, newest, resumed_step, start, wait_until

pytestmark = pytest.mark.slow


def start_ranks(log_dir: Path, **keys: Any) -> list[BaseProcess]:
    """Both ranks of a run; each writes its output beside the log folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    keys = {"batch_size": 4, "per_gpu_batchsize": 2, "checkpoint_every_n_steps": 4, **keys}
    return [
        start(log_dir, {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, output=f"output{rank}.txt", **keys)
        for rank in (0, 1)
    ]


def finish_ranks(processes: list[BaseProcess], log_dir: Path) -> list[int]:
    return [finish(process, log_dir, f"output{rank}.txt") for rank, process in enumerate(processes)]


def wait_for_step(processes: list[BaseProcess], log_dir: Path, step: int) -> None:
    wait_until(lambda: list(log_dir.glob("*/version_*")) and step in lines(newest(log_dir)), processes[0])


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    log_dir = tmp_path_factory.mktemp("unbroken")
    assert finish_ranks(start_ranks(log_dir), log_dir) == [0, 0]
    return lines(newest(log_dir))


def test_killed_after_an_epochs_end_of_a_step_limited_run(tmp_path: Path) -> None:
    keys = {"max_steps": 16, "checkpoint_every_n_steps": 0}
    assert finish_ranks(start_ranks(tmp_path / "whole", **keys), tmp_path / "whole") == [0, 0]
    processes = start_ranks(tmp_path, **keys, vision_encoder_options={"sleep_s": 0.05})
    wait_for_step(processes, tmp_path, 8)  # an epoch has six steps
    for process in processes:
        process.kill()
    finish_ranks(processes, tmp_path)
    assert finish_ranks(start_ranks(tmp_path, **keys, resume_from="last"), tmp_path) == [0, 0]
    assert resumed_step(newest(tmp_path)) == 6
    whole, resumed = newest(tmp_path / "whole"), newest(tmp_path)
    assert [compared(line) for line in lines(resumed).values()] == [compared(line) for line in lines(whole).values()]
    assert_same(final_state(whole), final_state(resumed), "")


def test_another_number_of_processes_is_refused(tmp_path: Path) -> None:
    assert finish_ranks(start_ranks(tmp_path, max_steps=2), tmp_path) == [0, 0]
    alone = start(tmp_path, batch_size=4, per_gpu_batchsize=2, max_steps=4, resume_from="last")
    assert finish(alone, tmp_path) == 2
    assert "world_size=1, in the checkpoint 2" in (tmp_path / "output.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_together_and_resumed(tmp_path: Path, unbroken: dict[int, dict[str, Any]], workers: int) -> None:
    processes = start_ranks(tmp_path, num_workers=workers, vision_encoder_options={"sleep_s": 0.05})
    wait_for_step(processes, tmp_path, 10)
    for process in processes:
        process.kill()
    assert finish_ranks(processes, tmp_path) == [-signal.SIGKILL] * 2
    assert finish_ranks(start_ranks(tmp_path, num_workers=workers, resume_from="last"), tmp_path) == [0, 0]
    resumed = lines(newest(tmp_path))
    assert max(resumed) == max(unbroken) == 18 and 6 <= resumed_step(newest(tmp_path)) <= 12
    assert all(compared(line) == compared(unbroken[step]) for step, line in resumed.items())


def test_one_killed_the_other_ends(tmp_path: Path) -> None:
    processes = start_ranks(tmp_path, vision_encoder_options={"sleep_s": 0.05})
    wait_for_step(processes, tmp_path, 3)
    processes[1].kill()
    since = time.monotonic()
    codes = finish_ranks(processes, tmp_path)
    assert codes == [1, -signal.SIGKILL] and time.monotonic() - since < 60
    assert "another process of the run ended" in (tmp_path / "output0.txt").read_text(encoding="utf-8")


def test_one_is_told_to_stop_and_both_save_and_end(tmp_path: Path, unbroken: dict[int, dict[str, Any]]) -> None:
    processes = start_ranks(tmp_path, vision_encoder_options={"sleep_s": 0.05})
    wait_for_step(processes, tmp_path, 8)
    os.kill(processes[1].pid, signal.SIGTERM)
    assert finish_ranks(processes, tmp_path) == [143, 143]
    done = max(lines(newest(tmp_path)))
    assert finish_ranks(start_ranks(tmp_path, resume_from="last"), tmp_path) == [0, 0]
    resumed = lines(newest(tmp_path))
    assert resumed_step(newest(tmp_path)) == done
    assert all(compared(line) == compared(unbroken[step]) for step, line in resumed.items())


def test_a_nan_on_one_rank_stops_both(tmp_path: Path) -> None:
    options = {"nan_steps": [3], "nan_rank": 1}
    assert finish_ranks(start_ranks(tmp_path, vision_encoder_options=options), tmp_path) == [1, 1]
    run_dir = newest(tmp_path)
    assert sorted(lines(run_dir)) == [1, 2]
    assert {path.name for path in run_dir.glob("nonfinite*.pt")} == {
        "nonfinite_step3.pt",
        "nonfinite_step3_rank1.pt",
    }


def test_a_wrong_number_of_processes_is_refused(tmp_path: Path) -> None:
    processes = start_ranks(tmp_path, num_nodes=2)
    assert finish_ranks(processes, tmp_path) == [2, 2]
    assert "num_nodes=2" in (tmp_path / "output0.txt").read_text(encoding="utf-8")
