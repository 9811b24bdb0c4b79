"""One run in this process, with a small stand-in for data and model: what it leaves behind, and how it is built."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import compared, lines, resumed_step
from tiny_task import ROWS, TINY_TASK, tiny_config

from mg3d.errors import CheckpointError, ConfigError
from mg3d.training import hardware
from mg3d.training.checkpoint_io import read_sidecar, save_file
from mg3d.training.logging_jsonl import JsonLines, read_lines
from mg3d.training.processes import ProcessLayout
from mg3d.training.steps import accumulation, training_steps, validation_interval
from mg3d.training.trainer import run


def train(tmp_path: Path, **keys: Any) -> Path:
    return Path(run(tiny_config(log_dir=str(tmp_path), **keys), TINY_TASK)["run_dir"])


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of three epochs of six steps."""
    return train(tmp_path_factory.mktemp("finished"), checkpoint_every_n_steps=4, log_every_n_steps=2)


def test_every_run_leaves_the_same_trace(finished: Path) -> None:
    assert finished.parent.name == "tiny-seed0-from_" and finished.name == "version_0"
    assert read(finished / "config.json")["exp_name"] == "tiny"
    recorded = read(finished / "environment.json")
    assert torch.__version__.startswith(recorded["packages"]["torch"]) and recorded["resumed_from"] is None
    assert {"code", "hardware", "data", "python", "command"} <= recorded.keys()
    assert read(finished / "status.json")["state"] == "finished"
    metrics = read(finished / "metrics.json")
    assert math.isfinite(metrics["val/the_metric"]["mean"]) and "tiny/train/loss" not in metrics
    names = {entry.name for entry in (finished / "checkpoints").iterdir() if entry.suffix == ".ckpt"}
    assert "last.ckpt" in names and sum(name.startswith("best-epoch") for name in names) == 2


def test_step_log_has_a_line_for_every_optimizer_step(finished: Path) -> None:
    logged = lines(finished)
    assert sorted(logged) == list(range(1, 19))
    line = logged[7]
    assert line["epoch"] == 1 and line["lr"] == pytest.approx([1e-2 * (1 - 6 / 19)])
    assert {"loss", "error_loss", "noise", "grad_norm", "samples_per_s", "seconds"} <= line.keys()
    assert line["loss"] == torch.tensor(line["loss"], dtype=torch.float32).item()  # all digits of a float32


def test_tensorboard_has_rates_norms_and_pictures(finished: Path) -> None:
    events = EventAccumulator(str(finished), size_guidance={"images": 0})
    events.Reload()
    assert {"lr-Adam", "train/grad_norm", "train/samples_per_s", "val/the_metric"} <= set(events.Tags()["scalars"])
    assert events.Tags()["images"] == ["val/picture"]


def test_every_checkpoint_loads_with_weights_only_and_has_a_sidecar(finished: Path) -> None:
    paths = list((finished / "checkpoints").glob("*.ckpt"))
    for path in paths:
        content = torch.load(path, weights_only=True)
        assert content["hyper_parameters"]["config"]["exp_name"] == "tiny"
        assert len(content["mg3d_rng"]) == 1 and content["optimizer_states"]
        assert read_sidecar(path)[1]["step"] == content["global_step"]
    assert len(paths) == 3


def test_same_seed_same_losses_other_seed_others(finished: Path, tmp_path: Path) -> None:
    again = train(tmp_path / "same", log_every_n_steps=5)
    assert [compared(line) for line in lines(again).values()] == [compared(line) for line in lines(finished).values()]
    other = train(tmp_path / "other", seed=1, max_epoch=1)
    assert lines(other)[1]["loss"] != lines(finished)[1]["loss"]


def test_accumulation_makes_steps_of_several_batches(tmp_path: Path) -> None:
    run_dir = train(tmp_path, batch_size=16, max_epoch=2)  # 6 batches: a step of 4 and one of 2
    logged = lines(run_dir)
    assert sorted(logged) == [1, 2, 3, 4]
    assert logged[4]["lr"] == pytest.approx([1e-2 * (1 - 3 / 5)])


def test_steps_are_counted_without_asking_the_trainer() -> None:
    def batches(world: int) -> int:
        return ROWS // (4 * world)

    assert training_steps(tiny_config(max_epoch=3), batches, 1) == 18
    assert training_steps(tiny_config(max_epoch=3, batch_size=16), batches, 1) == 6
    assert training_steps(tiny_config(max_epoch=3), batches, 2) == 9
    assert training_steps(tiny_config(max_steps=7), batches, 1) == 7
    assert accumulation(tiny_config(batch_size=3, per_gpu_batchsize=4), 1) == 1
    assert accumulation(tiny_config(batch_size=32, per_gpu_batchsize=4), 4) == 2


def test_validation_comes_between_two_optimizer_steps() -> None:
    def interval(given: float, batch_size: int, batches: int) -> float:
        return validation_interval(tiny_config(val_check_interval=given, batch_size=batch_size), batches, 1)

    assert interval(0.5, 4, 6) == 0.5 and interval(1.0, 16, 6) == 1.0 and interval(3, 4, 6) == 3
    assert interval(0.5, 8, 6) == 4 and interval(3, 8, 10) == 4 and interval(5, 16, 6) == 6
    with pytest.raises(ConfigError, match="val_check_interval=7"):
        interval(7, 4, 6)


def test_a_step_limit_ends_the_run_and_the_final_weights_are_validated(tmp_path: Path) -> None:
    run_dir = train(tmp_path, max_steps=8, max_epoch=None)
    assert sorted(lines(run_dir))[-1] == 8
    validated = read(run_dir / "metrics.json")["val/the_metric"]["mean"]
    last = torch.load(run_dir / "checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] == 8
    best = [path for path in (run_dir / "checkpoints").glob("best*.ckpt")]
    assert len(best) == 1 and "step6" in best[0].name and math.isfinite(validated)


def test_finetuning_keeps_weights_only_and_cannot_be_resumed(tmp_path: Path) -> None:
    run_dir = train(tmp_path, exp_name="task_finetune_tiny", max_epoch=1)
    for path in (run_dir / "checkpoints").glob("*.ckpt"):
        content = torch.load(path, weights_only=True)
        assert "optimizer_states" not in content and content["state_dict"]
    for given in ("last", str(run_dir / "checkpoints/last.ckpt"), str(run_dir)):
        with pytest.raises(CheckpointError, match="weights only"):
            train(tmp_path, exp_name="task_finetune_tiny", resume_from=given)


def test_resume_needs_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="none found"):
        train(tmp_path, resume_from="last")
    with pytest.raises(CheckpointError, match="no such file"):
        train(tmp_path, resume_from=str(tmp_path / "absent.ckpt"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("named", ["last", "folder", "file"])
def test_resume_goes_on_in_a_new_version(tmp_path: Path, named: str) -> None:
    whole = lines(train(tmp_path / "whole", max_steps=18))
    first = train(tmp_path, max_steps=9)
    given = {"last": "last", "folder": str(first), "file": str(first / "checkpoints/last.ckpt")}[named]
    second = train(tmp_path, max_steps=18, resume_from=given)  # longer than planned: its schedule differs by now
    assert second.name == "version_1" and sorted(lines(second)) == list(range(1, 19))
    assert read(second / "environment.json")["resumed_from"] == str(first / "checkpoints/last.ckpt")
    assert [line["noise"] for line in lines(second).values()] == [whole[step]["noise"] for step in range(1, 19)]


def test_resume_from_the_checkpoint_of_a_validation_inside_an_epoch(tmp_path: Path) -> None:
    whole = train(tmp_path, val_check_interval=0.5, save_top_k=-1 + 2)
    best = next((whole / "checkpoints").glob("best*.ckpt"))
    at = torch.load(best, weights_only=True)["global_step"]
    resumed = train(tmp_path, val_check_interval=0.5, resume_from=str(best))
    assert resumed_step(resumed) == at
    assert [compared(line) for line in lines(resumed).values()] == [compared(line) for line in lines(whole).values()]


def test_only_testing_trains_nothing(tmp_path: Path) -> None:
    run_dir = train(tmp_path, test_only=True)
    assert "test/loss" in read(run_dir / "metrics.json") and not (run_dir / "metrics.jsonl").exists()


def test_fast_dev_run_saves_no_checkpoint(tmp_path: Path) -> None:
    run_dir = train(tmp_path, fast_dev_run=True)
    assert sorted(lines(run_dir)) == [1] and not list((run_dir / "checkpoints").iterdir())


def test_neither_steps_nor_epochs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError):
        train(tmp_path, max_epoch=None)


def test_hardware_follows_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = ProcessLayout("none", 1, 1, 0, 0, "")
    two = ProcessLayout("torchrun", 1, 2, 0, 0, "localhost")
    chosen = hardware.choose_hardware(tiny_config(num_gpus=0, precision=16), alone)
    assert (chosen.accelerator, chosen.devices, chosen.precision, chosen.strategy) == ("cpu", 1, "32-true", "auto")
    pair = hardware.choose_hardware(tiny_config(num_gpus=0, precision="bf16"), two)
    assert (pair.world_size, pair.backend, pair.precision) == (2, "gloo", "bf16-mixed")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert hardware.choose_hardware(tiny_config(num_gpus=None, precision=16), alone).devices == 4
    some = hardware.choose_hardware(tiny_config(num_gpus=2, devices=[1, 3], precision=16), alone)
    assert (some.devices, some.precision, some.backend) == ([1, 3], "16-mixed", "nccl")
    with pytest.raises(ConfigError, match="4 GPUs are visible"):
        hardware.choose_hardware(tiny_config(num_gpus=8), alone)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match="no GPU is visible"):
        hardware.choose_hardware(tiny_config(num_gpus=2), alone)


def test_step_log_survives_a_cut_line_and_keeps_infinities_as_text(tmp_path: Path) -> None:
    log = JsonLines(tmp_path / "a.jsonl")
    log.write({"loss": float("nan"), "value": 0.1})
    with log.path.open("a") as stream:
        stream.write('{"loss": 0.')
    assert read_lines(log.path) == [{"loss": "nan", "value": 0.1}]


def test_initial_weights_leave_a_report(tmp_path: Path) -> None:
    first = train(tmp_path, max_epoch=1)
    weights = tmp_path / "weights.ckpt"
    save_file({"state_dict": torch.load(first / "checkpoints/last.ckpt", weights_only=True)["state_dict"]}, weights)
    second = train(tmp_path, max_epoch=1, load_path=str(weights))
    assert second.parent.name == "tiny-seed0-from_weights"
    report = read(second / "weights_report.json")
    assert "net.0.weight" in report["loaded"] and report["missing"] == []
