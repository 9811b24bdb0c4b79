"""Runs killed at any step go on as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from kept_checkpoints import assert_same, final_state
from tiny_runs import (
    CONTEXT,
    compared,
    finish,
    kill_after_step,
    lines,
    newest,
    resumed_step,
    start,
    train,
    wait_until,
    write_checkpoints,
)

from mg3d.training.checkpoint_io import load_file, newest_checkpoint, read_sidecar, remove_leftovers

SLOW_STEPS = {"sleep_s": 0.03}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """Lines of a run of 18 steps that nothing disturbed."""
    return lines(train(tmp_path_factory.mktemp("unbroken"), checkpoint_every_n_steps=5))


def expect_equal(resumed: Path, unbroken: dict[int, dict[str, Any]]) -> int:
    """The log of a resumed run equals that of the unbroken one, each step once; returns the first step of its own."""
    logged = lines(resumed)
    assert list(logged) == list(unbroken) and len(
        (resumed / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ) == len(unbroken)
    for step, line in logged.items():
        assert compared(line) == compared(unbroken[step]), step
    return resumed_step(resumed) + 1


@pytest.mark.parametrize(
    "step, workers",
    [(9, 0), (9, 2), *(pytest.param(step, n, marks=pytest.mark.slow) for step in (6, 13) for n in (0, 2))],
)
def test_killed_at_a_step(tmp_path: Path, unbroken: dict[int, dict[str, Any]], step: int, workers: int) -> None:
    keys = {"checkpoint_every_n_steps": 5, "num_workers": workers}
    broken, code = kill_after_step(tmp_path, step, vision_encoder_options=SLOW_STEPS, **keys)
    assert code == -signal.SIGKILL and max(lines(broken)) < 18
    assert expect_equal(train(tmp_path, resume_from="last", **keys), unbroken) <= step + 1


def test_killed_after_an_epochs_end_of_a_step_limited_run(tmp_path: Path) -> None:
    keys = {"max_steps": 16, "val_check_interval": 1.0}
    whole = train(tmp_path / "whole", **keys)
    kill_after_step(tmp_path, 8, vision_encoder_options=SLOW_STEPS, **keys)
    resumed = train(tmp_path, resume_from="last", **keys)
    assert expect_equal(resumed, lines(whole)) == 7
    assert_same(final_state(whole), final_state(resumed), "")


@pytest.mark.slow
def test_killed_again_and_again(tmp_path: Path, unbroken: dict[int, dict[str, Any]]) -> None:
    keys = {"checkpoint_every_n_steps": 2, "vision_encoder_options": SLOW_STEPS}
    kill_after_step(tmp_path, 4, **keys)
    for step in (8, 12):
        kill_after_step(tmp_path, step, resume_from="last", **keys)
    resumed = train(tmp_path, resume_from="last", **keys)
    assert resumed.name == "version_3"
    assert expect_equal(resumed, unbroken) > 8


@pytest.mark.slow
def test_killed_while_writing_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    halves, steps = 0, []
    for trial in range(20):
        process = CONTEXT.Process(target=write_checkpoints, args=(path, 1000 * trial))
        process.start()
        wait_until(lambda first=1000 * trial: path.exists() and read_sidecar(path)[1].get("step", -1) >= first, process)
        process.join(0.003 * trial)
        process.kill()
        process.join()
        halves += len(remove_leftovers(tmp_path))
        choice = newest_checkpoint([tmp_path])
        assert choice.skipped == ()
        steps.append(load_file(choice.path)["global_step"])
    assert steps == sorted(steps) and steps[-1] >= 18_000
    assert halves > 0  # otherwise no kill has hit a write, and the test has shown nothing


def test_a_damaged_last_checkpoint_is_passed_over_and_named(tmp_path: Path, unbroken: dict) -> None:
    broken, _ = kill_after_step(tmp_path, 13, checkpoint_every_n_steps=5, vision_encoder_options=SLOW_STEPS)
    last = broken / "checkpoints/last.ckpt"
    data = bytearray(last.read_bytes())
    data[len(data) // 2] ^= 1
    last.write_bytes(bytes(data))
    resumed = train(tmp_path, resume_from="last", checkpoint_every_n_steps=5)
    assert "skipped" in (tmp_path / "output.txt").read_text(encoding="utf-8")
    assert "best-" in json.loads((resumed / "environment.json").read_text(encoding="utf-8"))["resumed_from"]
    expect_equal(resumed, unbroken)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_saves_and_tells_by_the_exit_code(tmp_path: Path, unbroken: dict, signum: int) -> None:
    stopped, code = kill_after_step(tmp_path, 8, signum, vision_encoder_options=SLOW_STEPS)
    assert code == 128 + signum
    assert json.loads((stopped / "status.json").read_text(encoding="utf-8"))["state"] == "stopped"
    done = max(lines(stopped))
    assert 8 <= done < 12
    assert expect_equal(train(tmp_path, resume_from="last"), unbroken) == done + 1


def test_a_stop_signal_during_a_validation(tmp_path: Path, unbroken: dict[int, dict[str, Any]]) -> None:
    stopped, code = kill_after_step(tmp_path, 6, signal.SIGTERM, vision_encoder_options={"val_sleep_s": 0.1})
    assert code == 143 and max(lines(stopped)) == 6
    assert expect_equal(train(tmp_path, resume_from="last"), unbroken) == 7


def test_an_order_of_two_signals_ends_at_once(tmp_path: Path) -> None:
    process = start(tmp_path, vision_encoder_options={"sleep_s": 5})
    wait_until(lambda: list(tmp_path.glob("*/version_0/events*")), process)
    wait_until(lambda: "Epoch 0" in (tmp_path / "output.txt").read_text(encoding="utf-8"), process)
    os.kill(process.pid, signal.SIGTERM)
    wait_until(lambda: "saving a checkpoint" in (tmp_path / "output.txt").read_text(encoding="utf-8"), process)
    os.kill(process.pid, signal.SIGTERM)
    assert finish(process, tmp_path) == -signal.SIGTERM
    assert newest(tmp_path).name == "version_0"
