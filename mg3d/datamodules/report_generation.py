"""Images and reports of a report-generation benchmark as a Lightning data module; no case twice in evaluation."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from mg3d.datamodules.case_sampler import CompleteBatchSampler
from mg3d.datamodules.sampler import EpochBatchSampler
from mg3d.datamodules.stateful_loader import StatefulLoader, finished_batches
from mg3d.datasets.report_cases import ReportCaseDataset, ReportCollator
from mg3d.errors import DataError

if TYPE_CHECKING:
    from mg3d.finetuning.benchmark import ReportTask, Splits
    from mg3d.finetuning.config import FinetuneConfig

_LOG = logging.getLogger(__name__)

PARTS = ("train", "val", "test")


class ReportDataModule(pl.LightningDataModule):
    """Loaders of a report-generation benchmark.

    Use ``Trainer(use_distributed_sampler=False)``: the cases are already divided among the processes.

    Args:
        cfg: the run's config.
        task: reports, vocabulary, and how images are read.
        splits: the cases by use.

    Attributes:
        features: case id -> patch features ``[P, F]`` of a frozen encoder. Once filled, images are not read any more.
    """

    def __init__(self, cfg: FinetuneConfig, task: ReportTask, splits: Splits) -> None:
        super().__init__()
        self.cfg = cfg
        self.task = task
        self.splits = splits
        self.features: dict[str, Tensor] = {}
        self._datasets: dict[str, ReportCaseDataset] = {}

    def dataset(self, part: str) -> ReportCaseDataset:
        """Return the cases of a part (train, val or test).

        Raises:
            DataError: the part is empty.
        """
        if part not in self._datasets:
            cases = getattr(self.splits, part)
            if not cases:
                raise DataError(f"the {part} part of the split has no case", "check data_root and data_fraction")
            self._datasets[part] = ReportCaseDataset(cases, self.task, self.cfg, self.features)
            _LOG.info("%s: %d images with reports", part, len(cases))
        return self._datasets[part]

    def batches_per_epoch(self, world_size: int = 1) -> int:
        """Batches of one process in a training epoch of ``world_size`` processes; needs no trainer."""
        return len(self._train_sampler(rank=0, world_size=world_size))

    def train_dataloader(self) -> StatefulLoader:
        """Return the shuffled, resumable training loader of this process."""
        loader = self._loader("train", self._train_sampler(**self._processes()))
        if self.trainer is not None:
            loader.progress = finished_batches(self.trainer)
        return loader

    def val_dataloader(self) -> StatefulLoader:
        """Return the validation loader of this process: no case twice, none left out over all processes."""
        return self._loader("val", self._complete_sampler("val"))

    def test_dataloader(self) -> StatefulLoader:
        """Return the test loader of this process, as in validation."""
        return self._loader("test", self._complete_sampler("test"))

    def image_loader(self, part: str) -> StatefulLoader:
        """Return a loader of every case of a part, not divided: a frozen encoder computes its features from it."""
        return self._loader(part, CompleteBatchSampler(len(self.dataset(part)), self.cfg.batch_size))

    def _processes(self) -> dict[str, int]:
        if self.trainer is None:
            return {"rank": 0, "world_size": 1}
        return {"rank": self.trainer.global_rank, "world_size": self.trainer.world_size}

    def _train_sampler(self, *, rank: int, world_size: int) -> EpochBatchSampler:
        rows = np.arange(len(self.dataset("train")))
        return EpochBatchSampler(rows, self.cfg.batch_size, seed=self.cfg.seed, rank=rank, world_size=world_size)

    def _complete_sampler(self, part: str) -> CompleteBatchSampler:
        return CompleteBatchSampler(len(self.dataset(part)), self.cfg.batch_size, **self._processes())

    def _loader(self, part: str, sampler: EpochBatchSampler) -> StatefulLoader:
        return StatefulLoader(
            self.dataset(part),
            sampler,
            ReportCollator(self.task.size_dhw, len(self.task.labels)),
            num_workers=0 if self.features else self.cfg.num_workers,
            pin_memory=torch.cuda.is_available() and self.cfg.num_gpus != 0,
            max_bad_fraction=self.cfg.max_bad_fraction,
            name=part,
        )
