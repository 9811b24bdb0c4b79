"""A loader that knows where it is: position in the epoch goes into the checkpoint and back, without replaying data."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from mg3d.datamodules.sampler import EpochBatchSampler
from mg3d.datasets.volume_report import BadSample, SampleIndex
from mg3d.errors import DataError

_LOG = logging.getLogger(__name__)


class _EpochPlan:
    """Batch sampler of one pass, read by the torch loader in the main process."""

    def __init__(self, sampler: EpochBatchSampler, epoch: int, start: int) -> None:
        self._sampler, self._epoch, self._start = sampler, epoch, start

    def __iter__(self) -> Iterator[list[SampleIndex]]:
        return self._sampler.batches(self._epoch, self._start)

    def __len__(self) -> int:
        return max(len(self._sampler) - self._start, 0)


class StatefulLoader:
    """Iterable of batches with ``state_dict`` / ``load_state_dict``, for Lightning and for plain loops.

    The order comes from the sampler (seed, epoch), worker processes draw nothing, and the torch loader has a generator
    of its own, so that neither resuming nor a pass over the validation data moves the global random state. The position
    counts batches handed out; with ``progress`` it counts those the training loop has finished.

    Args:
        dataset: map-style dataset indexed by :class:`~mg3d.datasets.volume_report.SampleIndex`.
        sampler: the order.
        collate_fn: samples -> batch.
        num_workers: loader processes; 0 reads in the main process.
        pin_memory: page-locked batches for faster copies to an accelerator.
        max_bad_fraction: with skipped rows: largest tolerated part of the rows of an epoch.
        name: name in messages.
    """

    def __init__(
        self,
        dataset: Dataset,
        sampler: EpochBatchSampler,
        collate_fn: Callable[[list[Any]], Any],
        *,
        num_workers: int = 0,
        pin_memory: bool = False,
        max_bad_fraction: float = 0.01,
        name: str = "train",
    ) -> None:
        self.dataset = dataset
        self.batch_sampler = sampler
        self.collate_fn = collate_fn
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.max_bad_fraction = max_bad_fraction
        self.name = name
        self.progress: Callable[[], int | None] | None = None
        self.bad_rows: dict[int, str] = {}
        self._epoch = 0
        self._handed = 0
        self._resume_at: int | None = None
        self._epoch_told = False

    def __len__(self) -> int:
        return len(self.batch_sampler)

    @property
    def sampler(self) -> StatefulLoader:
        """The object Lightning tells the epoch to."""
        return self

    @property
    def epoch(self) -> int:
        """Epoch of the current or next pass."""
        return self._epoch

    @property
    def position(self) -> int:
        """Batches of this epoch that were handed out, or passed over on resuming."""
        return self._handed

    def set_epoch(self, epoch: int) -> None:
        """Make the next pass epoch ``epoch``; the position is kept when it is the epoch that was loaded."""
        if epoch != self._epoch:
            self._epoch, self._handed, self._resume_at = epoch, 0, None
        self._epoch_told = True

    def __iter__(self) -> Iterator[Any]:
        # a generator: nothing is read before the first batch is asked for, because the epoch may still be set
        start = self._start_of_pass()
        self._handed = start
        for batch in self._torch_loader(_EpochPlan(self.batch_sampler, self._epoch, start)):
            self._note_bad(batch)
            self._handed += 1
            yield batch
        if not self._epoch_told:
            self._epoch, self._handed = self._epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        """Return the position as plain numbers, equal on every process."""
        return {
            "epoch": self._epoch,
            "batches_done": self._batches_done(),
            "global_batch": self.batch_sampler.global_batch,
            "rows": len(self.batch_sampler.rows),
            "seed": self.batch_sampler.seed,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a saved position; with another global batch size, from the same number of studies.

        Other data or another seed give another order: then the epoch starts anew, with a warning.
        """
        self._epoch = int(state["epoch"])
        position = int(state["batches_done"])
        sampler = self.batch_sampler
        if (state["rows"], state["seed"]) != (len(sampler.rows), sampler.seed):
            _LOG.warning("%s data or seed changed since the checkpoint: epoch %d starts anew", self.name, self._epoch)
            position = 0
        elif state["global_batch"] != sampler.global_batch:
            position = position * int(state["global_batch"]) // sampler.global_batch
            _LOG.warning("%s global batch size changed: going on at batch %d", self.name, position)
        self._handed = position
        self._resume_at = position
        self._epoch_told = False

    def _start_of_pass(self) -> int:
        start, self._resume_at = self._resume_at or 0, None
        if start >= len(self) and not self._epoch_told:
            self._epoch += 1
            return 0
        return start

    def _batches_done(self) -> int:
        finished = self.progress() if self.progress is not None else None
        return self._handed if finished is None else min(self._handed, finished)

    def _torch_loader(self, plan: _EpochPlan) -> DataLoader:
        return DataLoader(
            self.dataset,
            batch_sampler=plan,  # type: ignore[arg-type]  # yields SampleIndex, which the dataset takes
            collate_fn=self.collate_fn,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            generator=torch.Generator().manual_seed(0),
            worker_init_fn=_start_worker if self.num_workers else None,
        )

    def _note_bad(self, batch: Any) -> None:
        entries: list[BadSample] = batch.pop("bad_samples", []) if isinstance(batch, dict) else []
        for entry in entries:
            if entry.row not in self.bad_rows:
                _LOG.warning("skipped a study (%s): %s", self.name, entry.reason)
            self.bad_rows[entry.row] = entry.reason
        allowed = int(self.max_bad_fraction * len(self.batch_sampler.rows))
        if entries and len(self.bad_rows) > allowed:
            raise DataError(
                f"{len(self.bad_rows)} of {len(self.batch_sampler.rows)} studies cannot be read, more than "
                f"max_bad_fraction {self.max_bad_fraction} allows; the last: {entries[-1].reason.splitlines()[0]}",
                "mend the data, or raise max_bad_fraction",
            )


def _start_worker(worker_id: int) -> None:
    torch.set_num_threads(1)  # several workers share few cores


def finished_batches(trainer: Any) -> Callable[[], int | None]:
    """Return a function that gives the batches of this epoch whose step is done, or None outside of training."""
    return functools.partial(_finished_batches, trainer)


def _finished_batches(trainer: Any) -> int | None:
    fit_loop = getattr(trainer, "fit_loop", None)
    if fit_loop is None or not (trainer.training or trainer.validating):
        return None
    return int(fit_loop.epoch_loop.batch_progress.current.processed)
