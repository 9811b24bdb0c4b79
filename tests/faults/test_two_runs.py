"""A run that lives is never disturbed by another one: not by a requeued job, a second start, or a jumping clock."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from tiny_runs import compared, finish, kill_after_step, lines, newest, start, train, wait_until

from mg3d.atomic import this_host
from mg3d.errors import EnvironmentProblem
from mg3d.training.checkpoint_io import newest_checkpoint, save_file
from mg3d.training.run_folder import CHECKPOINTS, refuse_living_run, run_lock, versions

SLOW_STEPS = {"sleep_s": 0.1}


def content(step: int) -> dict[str, object]:
    return {"global_step": step, "epoch": 0, "state_dict": {}, "optimizer_states": []}


def test_a_requeued_job_beside_the_living_run_is_refused_and_leaves_it_alone(tmp_path: Path) -> None:
    undisturbed = lines(train(tmp_path / "undisturbed", checkpoint_every_n_steps=2))
    keys = {"checkpoint_every_n_steps": 2, "vision_encoder_options": SLOW_STEPS}
    living = start(tmp_path / "log", **keys)
    wait_until(lambda: list((tmp_path / "log").glob("*/version_0/checkpoints/last.ckpt")), living)
    run_dir = newest(tmp_path / "log")
    partial = run_dir / CHECKPOINTS / f".last.ckpt.{this_host()}-{living.pid}-0123abcd.tmp"
    partial.write_bytes(b"being written")
    for place in ("last", str(run_dir), str(run_dir / CHECKPOINTS)):
        second = start(tmp_path / "log", output="second.txt", resume_from=place)
        assert finish(second, tmp_path / "log", "second.txt") == 2
        told = (tmp_path / "log" / "second.txt").read_text(encoding="utf-8")
        assert f"is being written by host {this_host()}, process {living.pid}" in told and "Traceback" not in told
    assert newest(tmp_path / "log") == run_dir and partial.is_file()
    partial.unlink()
    assert finish(living, tmp_path / "log") == 0
    found = lines(run_dir)
    assert {step: compared(line) for step, line in found.items()} == {
        step: compared(line) for step, line in undisturbed.items()
    }
    resumed = train(tmp_path / "log", resume_from="last", checkpoint_every_n_steps=2)  # its lock is free again
    assert resumed.name == "version_1"


def test_a_file_of_a_living_run_may_be_branched_off(tmp_path: Path) -> None:
    living = start(tmp_path / "log", checkpoint_every_n_steps=2, vision_encoder_options=SLOW_STEPS)
    wait_until(lambda: list((tmp_path / "log").glob("*/version_0/checkpoints/last.ckpt")), living)
    last = newest(tmp_path / "log") / CHECKPOINTS / "last.ckpt"
    branch = start(tmp_path / "log", output="second.txt", resume_from=str(last))
    assert finish(branch, tmp_path / "log", "second.txt") == 0
    assert finish(living, tmp_path / "log") == 0


def test_a_killed_run_with_loader_workers_can_be_resumed_at_once(tmp_path: Path) -> None:
    keys = {"checkpoint_every_n_steps": 2, "num_workers": 2}
    kill_after_step(tmp_path, 5, vision_encoder_options=SLOW_STEPS, **keys)
    assert train(tmp_path, resume_from="last", **keys).name == "version_1"


def test_the_newest_run_decides_even_before_its_first_checkpoint(tmp_path: Path) -> None:
    folders = [tmp_path / f"version_{number}" / CHECKPOINTS for number in (2, 1, 0)]
    for folder in folders:
        folder.mkdir(parents=True)
    save_file(content(1), folders[1] / "last.ckpt")
    with run_lock(folders[0].parent), pytest.raises(EnvironmentProblem, match="version_2"):
        refuse_living_run(folders)
    with run_lock(folders[2].parent):  # an older run does not matter
        refuse_living_run(folders)
        with pytest.raises(EnvironmentProblem), run_lock(folders[2].parent):
            pass


def test_two_runs_of_the_same_second_share_nothing(tmp_path: Path) -> None:
    pair = [start(tmp_path, output=f"{number}.txt", max_epoch=1) for number in range(2)]
    assert [finish(process, tmp_path, f"{number}.txt") for number, process in enumerate(pair)] == [0, 0]
    found = versions(next(path for path in tmp_path.iterdir() if path.is_dir()))
    assert [number for number, _ in found] == [1, 0]
    one, other = (lines(folder) for _, folder in found)
    assert {step: compared(line) for step, line in one.items()} == {s: compared(line) for s, line in other.items()}
    assert {json.loads((folder / "status.json").read_text(encoding="utf-8"))["state"] for _, folder in found} == {
        "finished"
    }


def test_a_clock_that_jumps_back_changes_neither_the_newest_run_nor_the_newest_checkpoint(tmp_path: Path) -> None:
    for number, step in ((0, 10), (1, 20)):
        folder = tmp_path / f"version_{number}" / CHECKPOINTS
        folder.mkdir(parents=True)
        for name, offset in (("last.ckpt", 0), ("best.ckpt", 5)):
            save_file(content(step - offset), folder / name, f"# mg3d step={step - offset} epoch=0 kind=full")
            past = time.time() - 10**6 * (number + 1) + 1000 * offset
            os.utime(folder / name, (past, past))
        os.utime(folder.parent, (past, past))
    folders = [folder / CHECKPOINTS for _, folder in versions(tmp_path)]
    assert newest_checkpoint(folders).path == tmp_path / "version_1" / CHECKPOINTS / "last.ckpt"
