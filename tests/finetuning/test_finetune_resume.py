"""A run that was killed goes on as if nothing had happened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from kept_checkpoints import assert_same, keep_every_checkpoint
from tiny_benchmark import BALLS, OUTLINES

from mg3d.errors import CheckpointError, ConfigError, MG3DError
from mg3d.finetuning.benchmark import Benchmark
from mg3d.finetuning.config import resolve_finetune_config
from mg3d.finetuning.run import run
from mg3d.training.best_checkpoints import copy_checkpoint
from mg3d.training.callbacks import StepMonitor
from mg3d.training.checkpoint_io import load_file
from mg3d.training.logging_jsonl import read_lines


class Killed(BaseException):
    """Stands for a process that is gone."""


def settings(root: Path, benchmark: Benchmark, **more: Any) -> dict[str, Any]:
    """Keys of a run of a few steps on the CPU."""
    keys = {
        "phantom": True,
        "data_root": str(root / benchmark.name),
        "work_dir": str(root / f"{benchmark.name}_work"),
        "encoder": "unet",
        "feature_size": 2,
        "max_epoch": 4,
        "batch_size": 4,
        "data_fraction": 0.34,
        "num_gpus": 0,
        "log_every_n_steps": 1,
        "bootstrap_rounds": 20,
        "predict": False,
        "roi": [32, 32, 32],
    }
    return keys | more


def go(root: Path, log_dir: Path, benchmark: Benchmark = BALLS, **more: Any) -> dict[str, Any]:
    """Run in this process."""
    return run(resolve_finetune_config(settings(root, benchmark, log_dir=str(log_dir), **more), benchmark), benchmark)


def die_after(step: int, patch: pytest.MonkeyPatch) -> None:
    """End the process, so to speak, at the batch that follows an optimizer step."""
    original = StepMonitor.on_train_batch_start

    def start(self: StepMonitor, trainer: Any, *arguments: Any) -> None:
        if trainer.global_step == step:
            raise Killed
        original(self, trainer, *arguments)

    patch.setattr(StepMonitor, "on_train_batch_start", start)


def result_of(folder: str | Path) -> dict[str, Any]:
    """What a finished run left, without its places and times."""
    place = Path(folder)
    states = {name: load_file(place / "checkpoints" / f"{name}.ckpt") for name in ("best", "last")}
    return {
        "metrics": json.loads((place / "metrics.json").read_text(encoding="utf-8")),
        "rows": (place / "per_case.csv").read_text(encoding="utf-8"),
        **{name: state["state_dict"] for name, state in states.items()},
        "optimizer": states["last"]["optimizer_states"][0]["state"],
        "steps": {name: state["global_step"] for name, state in states.items()},
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Data, and the result of four epochs in one go."""
    root = tmp_path_factory.mktemp("resume")
    return root, result_of(go(root, root / "whole")["run_dir"])


@pytest.mark.parametrize(("killed_at", "every"), [(4, 0), (3, 1)], ids=["after two epochs", "inside an epoch"])
def test_resumed_run_equals_one_in_one_go(
    whole: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int, every: int
) -> None:
    root, expected = whole
    with monkeypatch.context() as patch:
        die_after(killed_at, patch)
        with pytest.raises(Killed):
            go(root, tmp_path, checkpoint_every_n_steps=every)
    versions = sorted(tmp_path.glob("balls-*/version_*"))
    assert json.loads((versions[0] / "status.json").read_text(encoding="utf-8"))["state"] == "failed"
    found = go(root, tmp_path, checkpoint_every_n_steps=every, resume="last")
    assert Path(found["run_dir"]).name == "version_1"
    assert_same(expected, result_of(found["run_dir"]), "")


def test_killed_after_training_keeps_the_best(
    whole: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, expected = whole

    def never(*_: Any, **__: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("mg3d.finetuning.run.evaluate_checkpoints", never)
        with pytest.raises(Killed):
            go(root, tmp_path)
    found = go(root, tmp_path, resume="last")
    assert_same(expected, result_of(found["run_dir"]), "")


def test_the_best_checkpoint_resumes_too(whole: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    root, expected = whole
    first = next((root / "whole").glob("balls-*/version_0")) / "checkpoints" / "best.ckpt"
    found = go(root, tmp_path, resume=str(first))
    assert_same(expected, result_of(found["run_dir"]), "")


@pytest.mark.slow
@pytest.mark.parametrize(
    "keys", [{"max_steps": 5}, {"max_epoch": 3, "schedule_interval": "epoch"}, {"max_steps": 4, "val_every_epochs": 2}]
)
def test_every_checkpoint_leads_to_the_same_end(
    whole: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any]
) -> None:
    root, keys = whole[0], {**keys, "checkpoint_every_n_steps": 1}
    with monkeypatch.context() as patch:
        keep_every_checkpoint(patch, tmp_path / "kept")
        expected = go(root, tmp_path / "whole", **keys)["run_dir"]
    for path in sorted((tmp_path / "kept").glob("*.ckpt")):
        beside = tmp_path / path.stem / "earlier"  # as in the folder of a run, with the best one so far
        beside.mkdir(parents=True)
        best = [kept for kept in sorted((tmp_path / "kept").glob("*-best.ckpt")) if kept <= path]
        for kept in best[-1:]:
            copy_checkpoint(kept, beside / "best.ckpt")
        copy_checkpoint(path, beside / "last.ckpt")
        found = go(root, tmp_path / path.stem, **keys, resume=str(beside / "last.ckpt"))["run_dir"]
        assert_same(result_of(expected), result_of(found), path.name)


def test_a_step_limit_resumed_at_an_epochs_end_writes_every_line_once(
    whole: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    root, expected = whole
    steps = expected["steps"]["last"]
    go(root, tmp_path, max_steps=steps // 2)
    found = Path(go(root, tmp_path, max_steps=steps, resume="last")["run_dir"])
    straight = Path(go(root, tmp_path / "straight", max_steps=steps)["run_dir"])
    for name in ("metrics.jsonl", "validation.jsonl"):
        one, other = ([line["step"] for line in read_lines(folder / name)] for folder in (found, straight))
        assert one == other and len(set(one)) == len(one)


def test_what_cannot_change_is_refused_in_training_and_in_scoring(
    whole: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    root, _ = whole
    folder = str(next((root / "whole").glob("balls-*/version_0")))
    for keys, named in (
        ({"learning_rate": 0.5}, r"learning_rate=0\.5, in the checkpoint 0\.001"),
        ({"fold": 1}, "fold=1, in the checkpoint 0"),
        ({"stages": ["evaluate"], "fold": 1}, "fold=1, in the checkpoint 0"),
        ({"strength": 2.0}, r"strength=2\.0"),
        ({"data_fraction": 1.0, "resume_allow": ["data_fraction"]}, "data: other content in training cases"),
    ):
        with pytest.raises(ConfigError, match=named):
            go(root, tmp_path, resume=folder, **keys)
    go(root, tmp_path / "scored", resume=folder, stages=["evaluate"], learning_rate=0.5, bootstrap_rounds=10)
    config = next((tmp_path / "scored").glob("*/version_0/config.json"))
    assert json.loads(config.read_text(encoding="utf-8"))["learning_rate"] == 0.5
    again = go(root, tmp_path / "new", resume=folder, learning_rate=0.5, max_epoch=1, resume_weights_only=True)
    assert again["steps"] == 2


@pytest.mark.slow
def test_segmentation_killed_inside_an_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys: dict[str, Any] = {"batch_size": 1, "data_fraction": 1.0, "max_epoch": 2, "checkpoint_every_n_steps": 1}
    whole = go(tmp_path, tmp_path / "whole", OUTLINES, **keys)
    with monkeypatch.context() as patch:
        die_after(4, patch)
        with pytest.raises(Killed):
            go(tmp_path, tmp_path / "cut", OUTLINES, **keys)
    found = go(tmp_path, tmp_path / "cut", OUTLINES, **keys, resume="last")
    assert_same(result_of(whole["run_dir"]), result_of(found["run_dir"]), "")


def test_scoring_alone_repeats_the_figures(whole: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    root, expected = whole
    folder = next((root / "whole").glob("balls-*/version_0"))
    found = go(root, tmp_path, resume=str(folder), stages=["evaluate"])
    metrics = json.loads((Path(found["run_dir"]) / "metrics.json").read_text(encoding="utf-8"))
    assert metrics == expected["metrics"]
    with pytest.raises(MG3DError, match="no trained model"):
        go(root, tmp_path / "none", stages=["evaluate"])


def test_another_model_is_refused(whole: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    root, _ = whole
    folder = next((root / "whole").glob("balls-*/version_0"))
    with pytest.raises(ConfigError, match="feature_size=4, in the checkpoint 2"):
        go(root, tmp_path, resume=str(folder), feature_size=4)
    with pytest.raises(CheckpointError, match="does not fit"):
        go(root, tmp_path, resume=str(folder), feature_size=4, resume_allow=["feature_size"])
