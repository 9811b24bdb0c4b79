"""Callbacks of a run: step monitor with the non-finite guard, last checkpoint, pictures."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, Checkpoint
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor

from mg3d.training import collective, nan_guard
from mg3d.training.logging_jsonl import STEP_LOG, JsonLines
from mg3d.training.signals import RunStoppedError, StopSignals
from mg3d.training.step_window import StepWindow, batch_rows, whole_loss

log = logging.getLogger(__name__)


class StepMonitor(Callback):
    """Watches every optimizer step: non-finite guard before it, one JSON line after it.

    A line holds ``step`` (1-based, steps done), ``epoch``, ``loss`` (mean over micro-batches and ranks), every scalar
    that the training step returned, ``lr`` per parameter group, ``grad_norm``, ``samples_per_s``, ``seconds``, and
    ``skipped`` with a reason when the step was left out.

    Args:
        run_dir: folder of the run.
        max_bad_steps: non-finite steps that may be left out before the run ends.
        log_every_n_steps: interval at which gradient norm and throughput also go to the loggers.
        signals: stop signals, agreed on by all ranks once a step.
    """

    def __init__(
        self,
        run_dir: Path,
        max_bad_steps: int = 0,
        log_every_n_steps: int = 10,
        signals: StopSignals | None = None,
    ) -> None:
        self.run_dir = run_dir
        self.max_bad_steps = max_bad_steps
        self.log_every_n_steps = log_every_n_steps
        self.signals = signals or StopSignals()
        self.bad_steps = 0
        self.stop_signal = 0
        self.validated_step = -1
        self._lines = JsonLines(run_dir / STEP_LOG)
        self._window = StepWindow()
        self._steps_done = 0

    def state_dict(self) -> dict[str, Any]:
        """Number of steps left out so far, and the step of the latest validation."""
        return {"bad_steps": self.bad_steps, "validated_step": self.validated_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting the steps left out, from what was validated."""
        self.bad_steps = int(state_dict["bad_steps"])
        self.validated_step = int(state_dict.get("validated_step", -1))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take over the stop signals and begin an empty window."""
        self.signals.install()
        self._steps_done = trainer.global_step
        self._window = StepWindow()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give the signals back."""
        self.signals.remove()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember the batch until its step is done."""
        self._window.add_batch(batch, pl_module)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Remember the loss."""
        self._window.losses.append(whole_loss(trainer, loss))

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Look at loss and gradients (already unscaled and averaged over ranks); leave the step out or end the run."""
        window = self._window
        window.rates = [float(group["lr"]) for group in optimizer.param_groups]
        window.grad_norm = nan_guard.gradient_norm(
            parameter for group in optimizer.param_groups for parameter in group["params"]
        )
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        reason = nan_guard.diagnose(window.loss(), window.grad_norm, scaler)
        if not reason and not math.isfinite(window.grad_norm):
            window.skipped = "the loss scale was too high and is lowered"
        flags = collective.largest([float(bool(reason)), float(self.signals.received)], pl_module.device)
        self.stop_signal = int(flags[1])
        if flags[0]:
            self._refuse_step(trainer, pl_module, optimizer, reason or "another rank met a non-finite value")

    def _refuse_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer, reason: str
    ) -> None:
        step = trainer.global_step + 1
        self.bad_steps += 1
        path = nan_guard.capture_file(self.run_dir, step, trainer.global_rank)
        terms = getattr(pl_module, "last_step_terms", {})
        nan_guard.write_capture(path, pl_module, self._window, reason, terms, step)
        nan_guard.drop_gradients(optimizer)
        spoiled = nan_guard.spoiled_buffers(pl_module)
        beyond = collective.largest([float(self.bad_steps > self.max_bad_steps or bool(spoiled))], pl_module.device)
        if beyond[0]:
            detail = f"{reason}, and buffer {spoiled[0]} is spoiled" if spoiled else reason
            raise nan_guard.failure(step, detail, self._window.row_names(), path)
        self._window.skipped = reason
        log.warning("step %d left out (%d of at most %d): %s", step, self.bad_steps, self.max_bad_steps, reason)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Note which weights were validated, and keep the time of it out of the next step's rate."""
        self.validated_step = trainer.global_step
        self._window.started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the line of a finished optimizer step."""
        self._window.add_outputs(outputs)
        if trainer.global_step == self._steps_done:
            return
        self._steps_done = trainer.global_step
        record = self._record(trainer, pl_module)
        if trainer.is_global_zero:
            self._lines.write(record)
        if trainer.global_step % self.log_every_n_steps == 0:
            shown = {"train/grad_norm": record["grad_norm"], "train/samples_per_s": record["samples_per_s"]}
            for logger in trainer.loggers:
                logger.log_metrics(shown, step=trainer.global_step)
        self._window = StepWindow()

    def _record(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        window, terms = self._window, self._window.mean_terms()
        seconds = time.perf_counter() - window.started
        loss, *averaged = collective.mean([window.loss(), *terms.values()], pl_module.device)
        record: dict[str, Any] = {"step": trainer.global_step, "epoch": trainer.current_epoch, "loss": loss}
        record.update(zip(terms, averaged, strict=True))
        record["lr"] = window.rates
        record["grad_norm"] = window.grad_norm
        record["samples_per_s"] = window.rows() * trainer.world_size / max(seconds, 1e-9)
        record["seconds"] = seconds
        if window.skipped:
            record["skipped"] = window.skipped
        return record


class LastCheckpoint(Checkpoint):
    """``last.ckpt``: after every validation, epoch and ``every_n_steps`` steps, and when a signal ends the run.

    Args:
        folder: checkpoint folder of the run.
        monitor: the step monitor, which knows whether a signal came.
        every_n_steps: extra interval in optimizer steps, 0 for none.
        weights_only: leave optimizer, schedule and random state out (such a file cannot be resumed).
    """

    FILE = "last.ckpt"

    def __init__(self, folder: Path, monitor: StepMonitor, every_n_steps: int = 0, weights_only: bool = False) -> None:
        self.path = folder / self.FILE
        self.monitor = monitor
        self.every_n_steps = every_n_steps
        self.weights_only = weights_only
        self._saved_step = -1
        self._seen_step = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Count steps from the resumed one on."""
        self._seen_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save at the interval, or save and end when a signal came; only ever between two optimizer steps."""
        if trainer.global_step == self._seen_step:
            return
        self._seen_step = trainer.global_step
        if self.monitor.stop_signal:
            self._save_and_stop(trainer, self.monitor.stop_signal)
        due = self.every_n_steps and trainer.global_step % self.every_n_steps == 0
        cut = trainer.global_step == trainer.max_steps and not _epoch_is_over(trainer)
        if due or cut:
            self.save(trainer)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """A signal that comes during a validation is obeyed inside it."""
        received = collective.largest([float(self.monitor.signals.received)], pl_module.device)
        if received[0] and trainer.state.fn == "fit":
            self._save_and_stop(trainer, int(received[0]))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save after a validation inside an epoch; at the end of an epoch that is done once, below."""
        if trainer.state.fn == "fit" and not _epoch_is_over(trainer):
            self.save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save at the end of an epoch; one that a step limit cut short was saved in its middle, to be continued."""
        if _epoch_is_over(trainer):
            self.save(trainer)

    def save(self, trainer: pl.Trainer) -> None:
        """Write ``last.ckpt`` on rank 0 (all ranks take part)."""
        trainer.save_checkpoint(self.path, weights_only=self.weights_only)
        self._saved_step = trainer.global_step

    def _save_and_stop(self, trainer: pl.Trainer, signum: int) -> None:
        self.save(trainer)
        raise RunStoppedError(signum, f"step {trainer.global_step} is saved in {self.path}")


def _epoch_is_over(trainer: pl.Trainer) -> bool:
    return trainer.fit_loop.epoch_loop.batch_progress.is_last_batch


class ValidationImages(Callback):
    """Pictures of the first validation batch in TensorBoard, from ``module.visualise(batch)``.

    The module returns a dict of name to tensor ``[H, W]`` or ``[C, H, W]`` with values in [0, 1].
    """

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw on all ranks (features may be gathered), write on rank 0."""
        visualise = getattr(pl_module, "visualise", None)
        if batch_idx or dataloader_idx or visualise is None or not batch_rows(batch):
            return
        with torch.no_grad():
            pictures: Mapping[str, Tensor] = visualise(batch)
        writers = [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        for name, picture in pictures.items() if trainer.is_global_zero else ():
            shown = picture.detach().float().cpu().clamp(0, 1)
            shown = shown[None] if shown.ndim == 2 else shown
            for writer in writers:
                writer.add_image(name, shown, global_step=trainer.global_step)
