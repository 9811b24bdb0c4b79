"""A small stand-in for data and model, with every source of state that a resume must restore.

Run as a script it trains like ``main.py``: ``python tiny_task.py key=value ...``.
"""

from __future__ import annotations

import ast
import logging
import sys
import time
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from mg3d.config_schema import MG3DConfig, resolve_config
from mg3d.datamodules.sampler import EpochBatchSampler
from mg3d.datamodules.stateful_loader import StatefulLoader, finished_batches
from mg3d.errors import MG3DError
from mg3d.training.trainer import Task, run

ROWS, WIDTH = 24, 6


class TinyDataset(Dataset):
    """Row ``i`` of epoch ``e`` is drawn from a generator seeded by both."""

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, sample: Any) -> dict[str, Any]:
        seed = 1000 * sample.epoch + sample.row
        values = torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))
        return {"x": values, "index": sample.row, "image_id": f"case_{sample.row}", "report": "secret words"}


class TinyData(pl.LightningDataModule):
    def __init__(self, cfg: MG3DConfig) -> None:
        super().__init__()
        self.cfg = cfg

    def _loader(self, shuffle: bool) -> StatefulLoader:
        rank, world = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        sampler = EpochBatchSampler(
            range(ROWS), self.cfg.per_gpu_batchsize, shuffle=shuffle, rank=rank, world_size=world
        )
        return StatefulLoader(TinyDataset(), sampler, default_collate, num_workers=self.cfg.num_workers * shuffle)

    def batches_per_epoch(self, world_size: int = 1) -> int:
        return ROWS // (self.cfg.per_gpu_batchsize * world_size)

    def train_dataloader(self) -> StatefulLoader:
        loader = self._loader(shuffle=True)
        loader.progress = finished_batches(self.trainer)
        return loader

    def val_dataloader(self) -> StatefulLoader:
        return self._loader(shuffle=False)

    def test_dataloader(self) -> StatefulLoader:
        return self._loader(shuffle=False)


class TinyModule(pl.LightningModule):
    def __init__(self, cfg: MG3DConfig, steps: int) -> None:
        super().__init__()
        self.save_hyperparameters({"config": cfg.to_dict()})
        self.cfg, self.steps = cfg, steps
        self.net = nn.Sequential(nn.Linear(WIDTH, 16), nn.Dropout(0.2), nn.ReLU(), nn.Linear(16, WIDTH))
        self.register_buffer("queue", torch.zeros(4, WIDTH))

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        options = self.cfg.vision_encoder_options
        time.sleep(float(options.get("sleep_s", 0)))
        x = batch["x"]
        error = (self.net(x) - x).square().mean()
        self.queue.copy_(torch.cat([self.queue[1:], x[:1]]))
        total = error + self.queue.abs().mean() * error
        bad = self.global_step + 1 in options.get("nan_steps", [])
        if bad and self.global_rank == options.get("nan_rank", self.global_rank):
            total = (
                total * float("nan")
                if options.get("nan_in", "loss") == "loss"
                else total + _NanGradient.apply(self.net[0].weight)
            )
        self.last_step_terms = {"error_loss": float(error.detach())}
        self.log("tiny/train/loss", total)
        return {"loss": total, "error_loss": error.detach(), "noise": torch.rand(())}

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        time.sleep(float(self.cfg.vision_encoder_options.get("val_sleep_s", 0)))
        loss = (self.net(batch["x"] + 0.01 * torch.randn_like(batch["x"])) - batch["x"]).square().mean()
        self.log("val/the_metric", -loss, sync_dist=True)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.log("test/loss", (self.net(batch["x"]) - batch["x"]).square().mean(), sync_dist=True)

    def visualise(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        return {"val/picture": batch["x"].sigmoid()}

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / (self.steps + 1))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class _NanGradient(torch.autograd.Function):
    """Zero forward, NaN backward."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        ctx.shape = weight.shape
        return weight.new_zeros(())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return torch.full(ctx.shape, float("nan"))


TINY_TASK = Task(datamodule=TinyData, module=TinyModule)
TINY_KEYS: dict[str, Any] = {
    "exp_name": "tiny",
    "num_gpus": 0,
    "precision": 32,
    "batch_size": 4,
    "per_gpu_batchsize": 4,
    "num_workers": 0,
    "max_epoch": 3,
    "num_threads": 1,
    "resume_allow": ["vision_encoder_options"],  # here they only say what disturbs a run
}


def tiny_config(**keys: Any) -> MG3DConfig:
    return resolve_config({**TINY_KEYS, **keys})


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def main() -> int:
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    keys = {name: _value(text) for name, _, text in (argument.partition("=") for argument in sys.argv[1:])}
    try:
        result = run(tiny_config(**keys), TINY_TASK)
    except MG3DError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    sys.stdout.write(f"run_dir={result['run_dir']}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
