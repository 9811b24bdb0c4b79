"""Non-finite input, loss, gradient and weights in the real model: no step is taken, and the capture shows it again."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_job import make_job
from tiny_runs import lines, newest
from torch import Tensor

from mg3d.config_schema import MG3DConfig, resolve_config
from mg3d.errors import RunFailedError
from mg3d.models.mg3d_module import MG3DModule
from mg3d.training import rng_state
from mg3d.training.trainer import run

BAD_STEP = 3
TINY = {
    "vision_encoder_options": {"embed_dim": 12, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8], "window_size": 4},
    "hidden_size": 48, "image_size": [64, 32, 32], "max_text_len": 40, "vocab_size": None, "num_top_layer": 1,
    "max_steps": 6, "batch_size": 4, "per_gpu_batchsize": 2, "num_workers": 0, "num_gpus": 0, "precision": 32,
    "warmup_steps": 0, "drop_rate": 0.1, "freeze_text_encoder": False, "text_encoder_eval": False, "mim_window": 16,
    "checkpoint_every_n_steps": 1, "save_top_k": 0, "memory_queue": "xbm", "memory_queue_size": 4,
    "loss_names": {"sen_mlm": 1, "swin_unetr_mim": 1, "local_itc": 0.1, "itc": 1},
}  # fmt: skip


class BadGradient(torch.autograd.Function):
    """Zero forward, one value backward."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, value: float) -> Tensor:
        ctx.shape, ctx.value = weight.shape, value
        return weight.new_zeros(())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return torch.full(ctx.shape, ctx.value), None


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    words = make_job(tmp_path_factory.mktemp("job"), rows=8)
    found = dict(word.partition("=")[::2] for word in words)
    return {key: found[key] for key in ("data_root", "tokenizer")} | {"text_encoder_random_init": True}


def spoil(monkeypatch: pytest.MonkeyPatch, place: str, value: float) -> None:
    """Let one value of the ``BAD_STEP``-th step be ``value``."""
    plain = MG3DModule.training_step

    def spoilt(self: MG3DModule, batch: dict, batch_idx: int) -> dict[str, Tensor]:
        if self.global_step + 1 != BAD_STEP:
            return plain(self, batch, batch_idx)
        if place == "input":
            batch["image"][0, 3, 0, 5, 5] = value
        found = plain(self, batch, batch_idx)
        extra = {"loss": value, "gradient": BadGradient.apply(self.multi_modal_vision_proj.weight, value)}
        return {**found, "loss": found["loss"] + extra.get(place, 0.0)}

    monkeypatch.setattr(MG3DModule, "training_step", spoilt)


def stopped(tmp_path: Path, places: dict[str, Any], **keys: Any) -> tuple[MG3DConfig, Path, dict[str, Any]]:
    """Config, folder and capture of a run that must end at a non-finite step."""
    cfg = resolve_config({**TINY, **places, "log_dir": str(tmp_path), "exp_name": "tiny", **keys})
    with pytest.raises(RunFailedError, match=r"was not taken: the (loss|gradient norm) is (nan|inf)") as caught:
        run(cfg)
    assert caught.value.exit_code == 1
    run_dir = newest(tmp_path)
    (path,) = run_dir.glob("nonfinite_step*.pt")
    assert str(path) in str(caught.value)
    return cfg, run_dir, torch.load(path, weights_only=True)


def expect_no_bad_step(run_dir: Path, capture: dict[str, Any]) -> None:
    """The newest checkpoint is the one before the bad step, finite, and holds the weights of the capture."""
    last = torch.load(run_dir / "checkpoints/last.ckpt", weights_only=True)
    assert last["global_step"] == capture["step"] - 1 == max(lines(run_dir))
    for name, value in last["state_dict"].items():
        assert torch.isfinite(value).all(), name
        assert torch.equal(value, capture["state_dict"][name]), name


def replayed(cfg: MG3DConfig, capture: dict[str, Any]) -> list[dict[str, float]]:
    """Terms of every batch of the failed step, computed again from the capture alone."""
    module = MG3DModule(cfg).train()
    module.load_state_dict(capture["state_dict"], strict=True)
    rng_state.restore(capture["rng"])
    found = [module.training_step(batch, 0) for batch in capture["batches"]]
    return [{name: float(value.detach()) for name, value in terms.items()} for terms in found]


@pytest.mark.parametrize("place", ["input", "loss", "gradient"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_no_step_is_taken_and_good_terms_come_back_exactly(
    tmp_path: Path, places: dict[str, Any], monkeypatch: pytest.MonkeyPatch, place: str, value: float
) -> None:
    with monkeypatch.context() as patch:
        spoil(patch, place, value)
        cfg, run_dir, capture = stopped(tmp_path, places)
    assert capture["step"] == BAD_STEP and len(capture["batches"]) == 2
    assert capture["image_id"] and not any("report" in batch for batch in capture["batches"])
    expect_no_bad_step(run_dir, capture)
    again = replayed(cfg, capture)
    assert again[-1].keys() - {"loss"} == capture["terms"].keys()
    for name, wanted in capture["terms"].items():
        assert again[-1][name] == pytest.approx(wanted, rel=0, abs=0, nan_ok=True), name
    if place == "input":
        assert not math.isfinite(sum(terms["loss"] for terms in again) / 2) and not math.isfinite(capture["losses"][0])


def test_a_diverged_run_ends_before_the_step_and_its_capture_diverges_again(
    tmp_path: Path, places: dict[str, Any]
) -> None:
    cfg, run_dir, capture = stopped(tmp_path, places, learning_rate=1e25, optim_type="sgd", max_steps=20)
    expect_no_bad_step(run_dir, capture)
    again = replayed(cfg, capture)
    assert [str(terms["loss"]) for terms in again] == [str(loss) for loss in capture["losses"]]
    finite = [loss for loss in capture["losses"] if math.isfinite(loss)]
    assert not finite or capture["reason"].startswith("the gradient norm")
