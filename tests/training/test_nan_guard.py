"""A non-finite loss or gradient never reaches the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.precision import MixedPrecision
from tiny_runs import lines, newest
from tiny_task import TINY_TASK, TinyData, TinyModule, tiny_config

from mg3d.errors import RunFailedError
from mg3d.training import nan_guard, rng_state
from mg3d.training.callbacks import StepMonitor
from mg3d.training.trainer import run


def train(tmp_path: Path, **options: Any) -> Path:
    keys = {key: options.pop(key) for key in ("max_bad_steps", "checkpoint_every_n_steps") if key in options}
    cfg = tiny_config(log_dir=str(tmp_path), max_epoch=1, vision_encoder_options=options, **keys)
    return Path(run(cfg, TINY_TASK)["run_dir"])


@pytest.mark.parametrize("place", ["loss", "gradient"])
def test_the_step_is_not_taken_and_a_capture_is_written(tmp_path: Path, place: str) -> None:
    with pytest.raises(RunFailedError, match=f"step 4 was not taken: the {place}.*case_") as caught:
        train(tmp_path, nan_steps=[4], nan_in=place, checkpoint_every_n_steps=1)
    assert caught.value.exit_code == 1
    run_dir = newest(tmp_path)
    assert sorted(lines(run_dir)) == [1, 2, 3]
    last = torch.load(run_dir / "checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] == 3 and all(value.isfinite().all() for value in last["state_dict"].values())
    capture = torch.load(run_dir / "nonfinite_step4.pt", weights_only=True)
    assert capture["step"] == 4 and len(capture["image_id"]) == 4
    assert capture["image_id"] == [f"case_{row}" for row in capture["index"]]
    assert "net.0.weight" in capture["gradients"] and "error_loss" in capture["terms"]
    assert torch.equal(capture["state_dict"]["net.0.weight"], last["state_dict"]["net.0.weight"])
    assert b"secret words" not in (run_dir / "nonfinite_step4.pt").read_bytes()
    assert (run_dir / "nonfinite_step4.pt").stat().st_mode & 0o077 == 0


def test_the_capture_replays_to_the_same_loss(tmp_path: Path) -> None:
    with pytest.raises(RunFailedError):
        train(tmp_path, nan_steps=[3])
    capture = torch.load(newest(tmp_path) / "nonfinite_step3.pt", weights_only=True)
    module = TinyModule(tiny_config(), 1)
    module.load_state_dict(capture["state_dict"])
    rng_state.restore(capture["rng"])
    error = (module.net(capture["batches"][0]["x"]) - capture["batches"][0]["x"]).square().mean()
    assert float(error.detach()) == capture["terms"]["error_loss"]


def test_a_few_bad_steps_may_be_left_out(tmp_path: Path) -> None:
    run_dir = train(tmp_path, nan_steps=[2, 4], max_bad_steps=2, checkpoint_every_n_steps=1)
    logged = lines(run_dir)
    assert [step for step in logged if "skipped" in logged[step]] == [2, 4]
    assert logged[2]["loss"] == "nan" and logged[3]["loss"] != "nan"
    last = torch.load(run_dir / "checkpoints/last.ckpt", weights_only=True)
    assert all(value.isfinite().all() for value in last["state_dict"].values())
    assert last["callbacks"]["StepMonitor"]["bad_steps"] == 2
    with pytest.raises(RunFailedError, match="step 4"):
        train(tmp_path, nan_steps=[2, 4], max_bad_steps=1)


def test_a_left_out_step_changes_no_weight(tmp_path: Path) -> None:
    one = train(tmp_path / "one", nan_steps=[6], max_bad_steps=1, checkpoint_every_n_steps=5)
    with pytest.raises(RunFailedError):
        train(tmp_path / "two", nan_steps=[6], checkpoint_every_n_steps=5)
    after = torch.load(one / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    before = torch.load(newest(tmp_path / "two") / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(after[name], before[name]) for name in after if name.startswith("net"))


class _Scaler:
    def __init__(self, scale: float) -> None:
        self.scale = scale

    def is_enabled(self) -> bool:
        return True

    def get_scale(self) -> float:
        return self.scale


def test_the_loss_scaler_may_skip_until_its_scale_is_used_up() -> None:
    nan, inf = float("nan"), float("inf")
    assert nan_guard.diagnose(1.0, 1.0, None) == ""
    assert nan_guard.diagnose(1.0, inf, _Scaler(65536.0)) == ""
    assert "gradient norm is inf" in nan_guard.diagnose(1.0, inf, _Scaler(1.0))
    assert "gradient norm is nan" in nan_guard.diagnose(1.0, nan, None)
    assert "loss is nan" in nan_guard.diagnose(nan, 1.0, _Scaler(65536.0))


@pytest.mark.parametrize("scale, skipped", [(2.0**10, 0), (2.0**120, 1)])
def test_half_precision_logs_the_true_loss_and_lets_the_scaler_skip(tmp_path: Path, scale: float, skipped: int) -> None:
    cfg = tiny_config(max_steps=3)
    torch.manual_seed(0)
    module = TinyModule(cfg, 3)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, backoff_factor=2.0**-110)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=[StepMonitor(tmp_path)],
        plugins=[MixedPrecision("16-mixed", "cpu", scaler)],
    )
    trainer.fit(module, datamodule=TinyData(cfg))
    logged = lines(tmp_path)
    assert [step for step in logged if "skipped" in logged[step]] == list(range(1, skipped + 1))
    assert all(0.5 < line["loss"] < 5 and line["loss"] >= line["error_loss"] for line in logged.values())
    assert all(value.isfinite().all() for value in module.state_dict().values())


def test_norm_and_offenders() -> None:
    module = torch.nn.Linear(2, 1)
    assert nan_guard.gradient_norm(module.parameters()) == 0.0
    module.weight.grad, module.bias.grad = torch.tensor([[3.0, 0.0]]), torch.tensor([4.0])
    assert nan_guard.gradient_norm(module.parameters()) == pytest.approx(5.0)
    module.bias.grad = torch.tensor([float("inf")])
    assert list(nan_guard.offending_gradients(module)) == ["bias"]
    module.register_buffer("queue", torch.tensor([float("nan")]))
    assert nan_guard.spoiled_buffers(module) == ["queue"]
