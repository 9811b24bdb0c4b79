"""Going on exactly where a checkpoint was written: place in the epoch, random state, and a validation still to be done.

Lightning infers from several counters where a run was interrupted, and by other rules with ``max_steps`` than with
``max_epochs``: a step-limited run enters a finished epoch once more. Here the place is one record, kept by what was
really consumed; the counters are set from it when a run is resumed.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from mg3d.training import rng_state

__all__ = ["POSITION_KEY", "RNG_KEY", "CatchUp", "ExactResume", "Position"]

log = logging.getLogger(__name__)

RNG_KEY = "mg3d_rng"
"""Entry of a checkpoint: random state of every rank (see :mod:`mg3d.training.rng_state`)."""
POSITION_KEY = "mg3d_position"
"""Entry of a checkpoint: the fields of :class:`Position`."""
METRICS_KEY = "mg3d_metrics"
"""Entry of a checkpoint: latest value of every logged metric, which a run with nothing left to train reports."""
_COUNTERS = ("ready", "started", "processed", "completed")


@dataclasses.dataclass(frozen=True)
class Position:
    """Place of a run between two batches.

    Attributes:
        epoch: epoch that is under way, from 0.
        batches: batches of one process that are done in it. 0: nothing of it was read; ``length``: all were, but the
            end of the epoch is still to come.
        length: batches of one process in an epoch.
        step: optimizer steps done.
        validated: the weights of this place were validated.
    """

    epoch: int = 0
    batches: int = 0
    length: int = 0
    step: int = 0
    validated: bool = False

    @classmethod
    def of_checkpoint(cls, checkpoint: Mapping[str, Any]) -> Position:
        """The stored place; checkpoints that lack it are read by their counters."""
        if POSITION_KEY in checkpoint:
            known = {field.name for field in dataclasses.fields(cls)}
            return cls(**{key: value for key, value in checkpoint[POSITION_KEY].items() if key in known})
        loops = checkpoint["loops"]["fit_loop"]
        epochs, batches = loops["epoch_progress"]["current"], loops["epoch_loop.batch_progress"]
        step, done, last = checkpoint["global_step"], batches["current"]["processed"], batches["is_last_batch"]
        if epochs["processed"] > epochs["completed"] and last:  # written when the epoch had ended
            return cls(epochs["processed"], 0, done, step, True)
        epoch = min(epochs["processed"], epochs["ready"] - 1) if not last else epochs["processed"]
        validations = loops["epoch_loop.val_loop.batch_progress"]
        whole = validations["current"]["completed"] > 0 and validations["is_last_batch"]
        after = batches["current"]["completed"] == done
        return cls(max(epoch, 0), done, done if last else 0, step, after and whole)

    def set_counters(self, loops: dict[str, Any]) -> None:
        """Make the state of Lightning's loops say this place, and nothing of how it came about."""
        fit = loops["fit_loop"]
        begun, every = int(self.batches > 0), fit["epoch_loop.batch_progress"]["total"]["processed"]
        place = {"ready": self.epoch + begun, "started": self.epoch + begun}
        place |= {"processed": self.epoch, "completed": self.epoch}
        fit["epoch_progress"] = {"total": dict(place), "current": dict(place)}
        fit["epoch_loop.batch_progress"] = {
            "total": dict.fromkeys(_COUNTERS, every),
            "current": dict.fromkeys(_COUNTERS, self.batches),
            "is_last_batch": self.epoch_is_over,
        }
        idle = dict.fromkeys(_COUNTERS, 0)
        fit["epoch_loop.val_loop.batch_progress"] = {"total": idle, "current": dict(idle), "is_last_batch": False}
        fit["epoch_loop.state_dict"] = {**fit["epoch_loop.state_dict"], "_batches_that_stepped": self.step}
        for loader in fit["state_dict"].get("combined_loader", ()):
            loader |= {"epoch": self.epoch, "batches_done": self.batches}

    @property
    def epoch_is_over(self) -> bool:
        """Whether all batches of the epoch are done and its end is still to come."""
        return 0 < self.length <= self.batches


class ExactResume(Callback):
    """Place and random state of every rank in each checkpoint, taken up again before the first batch after a resume.

    Validation draws from the same generators as training; the state is set aside while it runs, so that training goes
    on the same whether or not a resume repeats a validation.

    Args:
        record: entries that every checkpoint also holds.
    """

    def __init__(self, record: Mapping[str, Any] | None = None) -> None:
        self._record = dict(record or {})
        self.position = Position()
        self._resumed: Position | None = None
        self._step_limit: int | None = None
        self._metrics: dict[str, float] = {}
        self._pending: dict[str, Any] | None = None
        self._before_validation: dict[str, Any] | None = None

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        """Store place, metrics and random states."""
        checkpoint.update(self._record)
        checkpoint[POSITION_KEY] = dataclasses.asdict(self.position)
        checkpoint[METRICS_KEY] = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if self._before_validation is not None:
            with rng_state.preserved():
                rng_state.restore(self._before_validation)
                checkpoint[RNG_KEY] = rng_state.gather()
            return
        checkpoint[RNG_KEY] = rng_state.gather()

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        """Take the place and this rank's random state, to be applied once training starts."""
        self.position = self._resumed = Position.of_checkpoint(checkpoint)
        self.position.set_counters(checkpoint["loops"])
        self._metrics = checkpoint.get(METRICS_KEY, {})
        if self.position.batches and self.position.step == trainer.max_steps:
            # all steps are done, but not what follows them in the epoch: enter it, which the loop would not do
            self._step_limit = trainer.max_steps
            trainer.fit_loop.epoch_loop.max_steps += 1
        states = checkpoint.get(RNG_KEY, [])
        if len(states) != trainer.world_size:
            log.warning(
                "the checkpoint holds the random state of %d processes, this run has %d: resuming is not exact",
                len(states),
                trainer.world_size,
            )
            return
        self._pending = states[trainer.global_rank]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the metrics of the interrupted run back."""
        found = {name: torch.tensor(value, device=pl_module.device) for name, value in self._metrics.items()}
        trainer.callback_metrics.update(found)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Apply the random state of the checkpoint before the first batch is drawn."""
        self._apply_random_state()

    def _apply_random_state(self) -> None:
        if self._pending is not None:
            rng_state.restore(self._pending)
            self._pending = None

    def catch_up(self, trainer: pl.Trainer) -> None:
        """Set the loops to the resumed place, and validate where the interrupted run still had to.

        Called at the start of training, when the other callbacks have begun.
        """
        place, self._resumed = self._resumed, None
        if place is None:
            return
        loop: Any = trainer.fit_loop.epoch_loop
        if not place.batches:  # a new epoch: nothing is restarted
            loop.restarting = False
            return
        loader = trainer.fit_loop._combined_loader.flattened[0]  # type: ignore[union-attr]
        moved = getattr(loader, "position", place.batches)  # counts other batches with another number of processes
        loop.batch_progress.current.load_state_dict(dict.fromkeys(_COUNTERS, moved))
        due = loop._should_check_val_fx(trainer.fit_loop._data_fetcher)
        loop._batches_that_stepped -= due  # counted where the loop goes on from a validation, as it will here
        if due and not place.validated:
            loop.val_loop.restarting = False
            trainer.validating = True
            loop.val_loop.run()
            trainer.training = True
        loop.val_loop._has_run = self._step_limit is not None and not due  # True: no batch is left, the epoch ends here
        if self._step_limit is not None:
            _lower_step_limit_inside(loop, self._step_limit)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move one batch on."""
        length = int(trainer.num_training_batches)
        self.position = Position(trainer.current_epoch, batch_idx + 1, length, trainer.global_step)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Move on to the next epoch, unless a step limit ended the run inside this one."""
        place = self.position
        if place.epoch_is_over:
            self.position = Position(place.epoch + 1, 0, place.length, place.step, place.validated)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Set the training state aside."""
        self._apply_random_state()  # where nothing was left to train
        self._before_validation = rng_state.capture()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the training state back (checkpoint callbacks run after this one)."""
        self.position = dataclasses.replace(self.position, validated=True)
        if self._before_validation is not None:
            rng_state.restore(self._before_validation)
            self._before_validation = None


def _lower_step_limit_inside(loop: Any, limit: int) -> None:
    """Put the step limit back as soon as the loop over the batches of the epoch is entered."""
    run = loop.run

    def run_once(data_fetcher: Any) -> None:
        del loop.run
        loop.max_steps = limit
        run(data_fetcher)

    loop.run = run_once


class CatchUp(Callback):
    """Lets a run catch up with its checkpoint; behind the callbacks that watch a validation.

    Args:
        exact: the one of this run.
    """

    def __init__(self, exact: ExactResume) -> None:
        self._exact = exact

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Catch up before the first batch."""
        self._exact.catch_up(trainer)
