"""From whichever checkpoint a run is resumed, it ends as if nothing had happened: one run, all of its checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from kept_checkpoints import assert_same, final_state, keep_every_checkpoint
from tiny_runs import compared, lines
from tiny_task import TINY_TASK, tiny_config

from mg3d.training.checkpoint_io import save_file
from mg3d.training.trainer import run

KINDS: dict[str, dict[str, Any]] = {
    "steps": {"max_steps": 16, "checkpoint_every_n_steps": 1},
    "epochs": {"max_epoch": 3, "checkpoint_every_n_steps": 1},
    "steps validated inside": {"max_steps": 15, "val_check_interval": 0.5, "checkpoint_every_n_steps": 1},
    "epochs validated inside": {"max_epoch": 2, "val_check_interval": 2, "checkpoint_every_n_steps": 1},
    "steps accumulated": {"max_steps": 8, "batch_size": 16, "checkpoint_every_n_steps": 1, "val_check_interval": 0.5},
    "epochs accumulated": {"max_epoch": 3, "batch_size": 8, "val_check_interval": 3, "checkpoint_every_n_steps": 1},
    "steps to an epoch's end": {"max_steps": 12, "checkpoint_every_n_steps": 4, "num_workers": 2},
}


def train(log_dir: Path, **keys: Any) -> Path:
    return Path(run(tiny_config(log_dir=str(log_dir), **keys), TINY_TASK)["run_dir"])


def trace(run_dir: Path) -> dict[str, Any]:
    """What a run left, without its clock."""
    last = torch.load(run_dir / "checkpoints/last.ckpt", weights_only=True)
    return {
        "lines": {step: compared(line) for step, line in lines(run_dir).items()},
        "metrics": json.loads((run_dir / "metrics.json").read_text(encoding="utf-8")),
        **final_state(run_dir),
        "random": last["mg3d_rng"][0],
        "logger step": last["loops"]["fit_loop"]["epoch_loop.state_dict"]["_batches_that_stepped"],
    }


FAST = ("steps", "steps accumulated", "steps to an epoch's end")
SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS if kind not in FAST]


@pytest.mark.parametrize("kind", [*FAST, *SLOW])
def test_every_checkpoint_of_a_run_leads_to_the_same_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    keys = KINDS[kind]
    with monkeypatch.context() as patch:
        keep_every_checkpoint(patch, tmp_path / "kept")
        whole = train(tmp_path / "whole", save_top_k=2, **keys)
    expected = trace(whole)
    kept = sorted((tmp_path / "kept").glob("*.ckpt"))
    places = {torch.load(path, weights_only=True)["global_step"] for path in kept}
    assert len(kept) > len(places)  # some steps were saved at more than one place of the loop
    for path in kept:
        resumed = train(tmp_path / path.stem, save_top_k=2, resume_from=str(path), **keys)
        found = trace(resumed)
        at = torch.load(path, weights_only=True)["global_step"]  # a copy has no log beside it
        wanted = {**expected, "lines": {step: line for step, line in expected["lines"].items() if step > at}}
        assert_same(wanted, found, path.name)


def without_place(path: Path) -> Path:
    """The checkpoint as it was written before the place was recorded."""
    content = torch.load(path, weights_only=True)
    del content["mg3d_position"], content["mg3d_metrics"]
    save_file(content, path)
    return path


@pytest.mark.parametrize("kind", ["steps", "epochs validated inside"])
def test_checkpoints_without_a_recorded_place_are_read_by_their_counters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    keys = KINDS[kind] | {"checkpoint_every_n_steps": 3}
    with monkeypatch.context() as patch:
        keep_every_checkpoint(patch, tmp_path / "kept")
        whole = trace(train(tmp_path / "whole", **keys))
    for path in sorted((tmp_path / "kept").glob("*.ckpt")):
        found = trace(train(tmp_path / path.stem, resume_from=str(without_place(path)), **keys))
        assert all(whole["lines"][step] == line for step, line in found["lines"].items()), path.name
        assert_same(whole["weights"], found["weights"], path.name)
        assert_same(whole["optimizer"], found["optimizer"], path.name)
