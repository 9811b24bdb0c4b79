"""Volumes with findings and reports; features of frozen encoders take the place of volumes once they are computed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from mg3d.datamodules.case_sampler import CompleteBatchSampler
from mg3d.datamodules.classification import ClassificationDataModule
from mg3d.datamodules.sampler import EpochBatchSampler
from mg3d.datamodules.stateful_loader import StatefulLoader
from mg3d.datasets.classification import ClassificationDataset, refuse_unlabelled
from mg3d.datasets.volume_report import SampleIndex
from mg3d.errors import DataError

if TYPE_CHECKING:
    from mg3d.finetuning.benchmark import Splits, VocabularyTask
    from mg3d.finetuning.config import FinetuneConfig

__all__ = ["GroupBatchSampler", "VocabularyDataModule"]


class GroupBatchSampler(EpochBatchSampler):
    """Every batch several times in a row: one optimizer step for each group of findings, as published.

    Args:
        groups: times.
        rows: as in `EpochBatchSampler`, like everything that follows.
        batch_size: studies of one process.
        seed: seed of the run.
        rank: this process.
        world_size: number of processes.
    """

    def __init__(
        self, groups: int, rows: np.ndarray, batch_size: int, *, seed: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        super().__init__(rows, batch_size, seed=seed, rank=rank, world_size=world_size)
        self.groups = groups

    def __len__(self) -> int:
        return super().__len__() * self.groups

    def batches(self, epoch: int, start: int = 0) -> Iterator[list[SampleIndex]]:
        """Yield this process' batches of an epoch from batch ``start`` on."""
        whole = EpochBatchSampler(
            self.rows, self.batch_size, seed=self.seed, rank=self.rank, world_size=self.world_size
        )
        first, done = divmod(start, self.groups)
        for batch in whole.batches(epoch, first):
            for _ in range(done, self.groups):
                yield batch
            done = 0


class FeatureDataset(ClassificationDataset):
    """Cases whose image is a feature ``[I, E]`` where one is known.

    Attributes:
        features: case id -> feature; may be filled later.
    """

    features: Mapping[str, Tensor] = {}

    def _image(self, row: int, epoch: int) -> Tensor:
        found = self.features.get(self.cases[row].id)
        return super()._image(row, epoch) if found is None else found


class VocabularyDataModule(ClassificationDataModule):
    """Loaders of a vocabulary benchmark.

    Args:
        cfg: the run's config.
        task: findings, reports, and how volumes are read.
        splits: the cases by use.

    Attributes:
        features: case id -> image features ``[I, E]``. What is known is not read any more, and ``"image"`` in batches
            is ``[B, I, E]``.

    Raises:
        DataError: a case has no report.
    """

    def __init__(self, cfg: FinetuneConfig, task: VocabularyTask, splits: Splits) -> None:
        super().__init__(cfg, task, splits)
        self.features: dict[str, Tensor] = {}
        for part in ("val", "test", "train"):
            for case in getattr(splits, part):
                if not task.reports.get(case.id, "").strip():
                    raise DataError("the report is missing or empty", "leave the case out", case_id=case.id)

    def dataset(self, part: str) -> ClassificationDataset:
        """Return the cases of a part (train, val or test)."""
        found = super().dataset(part)
        if isinstance(found, FeatureDataset):
            found.features = self.features
        return found

    def image_loader(self, part: str) -> StatefulLoader:
        """Return a loader of every case of a part, not divided: a frozen encoder computes its features from it."""
        dataset = self.dataset(part).as_evaluated()
        return self._loader(part, dataset, CompleteBatchSampler(len(dataset), self.cfg.batch_size))

    def _build(self, part: str, *, train: bool) -> ClassificationDataset:
        cases = getattr(self.splits, part)
        if not cases:
            raise DataError(f"the {part} part of the split has no case", "check data_root and data_fraction")
        if train and not self.task.report_loss:  # type: ignore[attr-defined]  # a VocabularyTask
            refuse_unlabelled(cases)
        return FeatureDataset(cases, self.task, self.cfg, train=train)

    def _train_sampler(self, *, rank: int = 0, world_size: int = 1) -> EpochBatchSampler:
        if self.cfg.protocol != "reference":
            return super()._train_sampler(rank=rank, world_size=world_size)
        groups = -(-len(self.task.outputs) // self.task.group)  # type: ignore[attr-defined]  # a VocabularyTask
        rows = np.arange(len(self.dataset("train")))
        return GroupBatchSampler(
            groups, rows, self.cfg.batch_size, seed=self.cfg.seed, rank=rank, world_size=world_size
        )
