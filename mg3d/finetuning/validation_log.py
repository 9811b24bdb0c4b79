"""What every validation found, one JSON line each, for the training curves of the report."""

from __future__ import annotations

from pathlib import Path

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Callback

from mg3d.training.logging_jsonl import JsonLines

__all__ = ["VALIDATION_LOG", "ValidationLog"]

VALIDATION_LOG = "validation.jsonl"


class ValidationLog(Callback):
    """Appends ``step``, ``epoch`` and all ``val/...`` figures to ``validation.jsonl`` after each validation.

    Args:
        run_dir: folder of the run.
    """

    def __init__(self, run_dir: Path) -> None:
        self._lines = JsonLines(run_dir / VALIDATION_LOG)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the line of a validation on rank 0; the check before training has none."""
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        figures = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("val/")}
        self._lines.write({"step": trainer.global_step, "epoch": trainer.current_epoch, **figures})
