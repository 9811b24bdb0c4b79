"""``best.ckpt`` of a fine-tuning run, and which checkpoints of a run are scored."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint

from mg3d.errors import CheckpointError
from mg3d.training import collective
from mg3d.training.best_checkpoints import copy_checkpoint
from mg3d.training.callbacks import StepMonitor
from mg3d.training.run_folder import CHECKPOINTS

log = logging.getLogger(__name__)

__all__ = ["BEST", "LAST", "BestCheckpoint", "checkpoint_of", "scored_checkpoints"]

BEST, LAST = "best.ckpt", "last.ckpt"
MONITORED = "val/the_metric"


class BestCheckpoint(Checkpoint):
    """``best.ckpt``: the state after the epoch with the highest validation metric, the first of equal ones.

    It is saved once the epoch is over, like ``last.ckpt``, so that both resume alike.

    Args:
        folder: checkpoint folder of the run.
        monitor: the step monitor, which knows what was validated.
        earlier: checkpoint folder of the run that is resumed, whose best state is taken over.
    """

    def __init__(self, folder: Path, monitor: StepMonitor, earlier: Path | None = None) -> None:
        self.path = folder / BEST
        self.monitor = monitor
        self.earlier = earlier
        self.score = -math.inf
        self.step = -1

    def state_dict(self) -> dict[str, Any]:
        """Best metric so far and its step."""
        return {"score": self.score, "step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from the best metric so far."""
        self.score, self.step = float(state_dict["score"]), int(state_dict["step"])

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the best checkpoint of the resumed run over, also where nothing is left to train."""
        if self.earlier is not None and trainer.is_global_zero:
            copy_checkpoint(self.earlier / BEST, self.path)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save if this epoch was validated and is the best one."""
        if self.monitor.validated_step == trainer.global_step:
            self.consider(trainer)

    def consider(self, trainer: pl.Trainer) -> None:
        """Save if the latest validation is the best one (all ranks take part)."""
        value = trainer.callback_metrics.get(MONITORED)
        if value is None or not math.isfinite(float(value)) or float(value) <= self.score:
            return
        self.score, self.step = float(value), trainer.global_step
        trainer.save_checkpoint(self.path, False)  # with the state of the optimizer


def checkpoint_of(place: str | Path) -> Path:
    """The checkpoint that a run folder or a file stands for: the best one of a folder, else the last.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(place).expanduser()
    if path.is_file():
        return path
    candidates = [folder / name for folder in (path / CHECKPOINTS, path) for name in (BEST, LAST)]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise CheckpointError(f"{place} holds no checkpoint", "give a run folder of fine-tuning, or a .ckpt file")


def scored_checkpoints(folder: Path, given: Path | None = None) -> dict[str, Path]:
    """Checkpoints to score: ``best`` and ``last`` of a folder, ``last`` alone where there is no best one.

    Args:
        folder: checkpoint folder.
        given: a single file that the user named instead.
    """
    if given is not None:
        return {"given": given}
    named = {"best": folder / BEST, "last": folder / LAST}
    return {name: path for name, path in named.items() if path.is_file()}


def wait_for_all(device: Any) -> None:
    """All processes meet here, so that none reads a file that another one is writing."""
    collective.largest([0.0], device)
