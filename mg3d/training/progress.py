"""What the terminal shows while a run is under way."""

from __future__ import annotations

import logging
import sys
import time
import warnings
from datetime import timedelta
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import TQDMProgressBar
from torch import Tensor

from mg3d.training.step_window import whole_loss

NOISE = (
    r".*LeafSpec.*is deprecated.*",  # torch to lightning
    r".*module\(s\) in eval mode at the start of training.*",  # the frozen text encoder, on purpose
    r".*The number of training batches .* is smaller than the logging interval.*",
    r".*does not have many workers which may be a bottleneck.*",
    r"The dirpath has changed from.*",  # a resumed run writes to a version of its own
    r".*Checkpoint directory .* exists and is not empty.*",
)


def silence_noise() -> None:
    """Hide library messages that call for no action of the user."""
    for message in NOISE:
        warnings.filterwarnings("ignore", message=message)
    told = logging.getLogger("pytorch_lightning.utilities.rank_zero")
    if not any(getattr(entry, "__name__", "") == "_wanted" for entry in told.filters):
        told.addFilter(_wanted)


def _wanted(record: logging.LogRecord) -> bool:
    return not any(words in record.getMessage() for words in ("litlogger", "TPU available", "was configured so"))


class RunProgressBar(TQDMProgressBar):
    """The bar of the epoch (rate and time left) with loss, step of the run and time left of the run beside it.

    Args:
        total_steps: optimizer steps of the run.
        every: refresh after this many batches where the output is a file.
    """

    def __init__(self, total_steps: int, every: int) -> None:
        super().__init__(refresh_rate=1 if sys.stderr.isatty() else max(every, 1))
        self.total_steps = total_steps
        self._loss: Tensor | None = None
        self._started, self._first_step = time.monotonic(), 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure the pace from here on."""
        super().on_train_start(trainer, pl_module)
        self._started, self._first_step = time.monotonic(), trainer.global_step

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Keep the latest loss for the next refresh."""
        self._loss = whole_loss(trainer, loss)

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """Loss, step of the run, and the time that is left of it."""
        shown = {key: value for key, value in super().get_metrics(trainer, pl_module).items() if key != "v_num"}
        done = trainer.global_step - self._first_step
        left = max(self.total_steps - trainer.global_step, 0)
        pace = (time.monotonic() - self._started) / done if done else 0.0
        loss = {"loss": f"{float(self._loss):.4f}"} if self._loss is not None else {}
        run = {"step": f"{trainer.global_step}/{self.total_steps}", "left": str(timedelta(seconds=round(left * pace)))}
        return {**loss, **run, **shown}
