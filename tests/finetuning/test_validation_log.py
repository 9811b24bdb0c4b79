"""One line a validation, in a real training."""

from __future__ import annotations

from pathlib import Path

import pytorch_lightning as pl
import torch

from mg3d.finetuning.validation_log import ValidationLog
from mg3d.training.logging_jsonl import read_lines


class Tiny(pl.LightningModule):
    """One weight; the figure of a validation is the number of steps so far."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = (self.weight - batch).square().mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("val/steps", float(self.trainer.global_step))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_line_after_each_validation_and_none_for_the_check_before_training(tmp_path: Path) -> None:
    batches = torch.utils.data.DataLoader(torch.ones(3, 1))
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ValidationLog(tmp_path)],
    )
    trainer.fit(Tiny(), batches, batches)
    lines = read_lines(tmp_path / "validation.jsonl")
    assert lines == [{"step": 3 * k, "epoch": k - 1, "val/steps": 3.0 * k} for k in (1, 2)]
