"""Cases of a classification benchmark as a Lightning data module: plain or balanced epochs, no case twice."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from mg3d.datamodules.case_sampler import BalancedBatchSampler, CompleteBatchSampler
from mg3d.datamodules.sampler import EpochBatchSampler
from mg3d.datamodules.stateful_loader import StatefulLoader, finished_batches
from mg3d.datasets.classification import ClassificationCollator, ClassificationDataset, refuse_unlabelled
from mg3d.errors import ConfigError, DataError

if TYPE_CHECKING:
    from mg3d.finetuning.benchmark import ClassificationTask, Splits
    from mg3d.finetuning.config import FinetuneConfig

_LOG = logging.getLogger(__name__)

PARTS = ("train", "val", "test")


class ClassificationDataModule(pl.LightningDataModule):
    """Loaders of a classification benchmark.

    Use ``Trainer(use_distributed_sampler=False)``: the cases are already divided among the processes.

    Args:
        cfg: the run's config.
        task: what is predicted and how images are read.
        splits: the cases by use.
    """

    def __init__(self, cfg: FinetuneConfig, task: ClassificationTask, splits: Splits) -> None:
        super().__init__()
        if task.balance not in ("none", "class"):
            raise ConfigError(f"balance={task.balance!r} is unknown", "choose none or class")
        self.cfg = cfg
        self.task = task
        self.splits = splits
        self._datasets: dict[str, ClassificationDataset] = {}

    def dataset(self, part: str) -> ClassificationDataset:
        """Return the cases of a part (train, val or test); training cases are augmented.

        Raises:
            DataError: the part is empty.
        """
        if part not in self._datasets:
            self._datasets[part] = self._build(part, train=part == "train")
            _LOG.info("%s: %r", part, self._datasets[part])
        return self._datasets[part]

    def batches_per_epoch(self, world_size: int = 1) -> int:
        """Batches of one process in a training epoch of ``world_size`` processes; needs no trainer."""
        return len(self._train_sampler(world_size=world_size))

    def train_dataloader(self) -> StatefulLoader:
        """Return the shuffled, resumable training loader of this process."""
        loader = self._loader("train", self.dataset("train"), self._train_sampler(**self._processes()))
        if self.trainer is not None:
            loader.progress = finished_batches(self.trainer)
        return loader

    def val_dataloader(self) -> StatefulLoader:
        """Return the validation loader of this process: no case twice, none left out over all processes."""
        return self.complete_dataloader("val")

    def test_dataloader(self) -> StatefulLoader:
        """Return the test loader of this process, as in validation."""
        return self.complete_dataloader("test")

    def complete_dataloader(self, part: str) -> StatefulLoader:
        """Return a loader of every case of a part, not augmented, divided among the processes."""
        dataset = self.dataset(part).as_evaluated()
        sampler = CompleteBatchSampler(len(dataset), self.cfg.batch_size, **self._processes())
        return self._loader(part, dataset, sampler)

    def _build(self, part: str, *, train: bool) -> ClassificationDataset:
        cases = getattr(self.splits, part)
        if not cases:
            raise DataError(f"the {part} part of the split has no case", "check data_root, fold and data_fraction")
        if train and self.task.kind == "binary":
            refuse_unlabelled(cases)
        dataset = ClassificationDataset(cases, self.task, self.cfg, train=train)
        if self.cfg.cache == "memory" and self.cfg.num_workers:
            fill_memory(dataset, self.cfg.num_workers, part)
        return dataset

    def _processes(self) -> dict[str, int]:
        if self.trainer is None:
            running = dist.is_available() and dist.is_initialized()
            return {"rank": dist.get_rank(), "world_size": dist.get_world_size()} if running else {}
        return {"rank": self.trainer.global_rank, "world_size": self.trainer.world_size}

    def _train_sampler(self, *, rank: int = 0, world_size: int = 1) -> EpochBatchSampler:
        cfg, dataset = self.cfg, self.dataset("train")
        if self.task.balance == "class":
            classes = dataset.targets
            return BalancedBatchSampler(classes, cfg.batch_size, seed=cfg.seed, rank=rank, world_size=world_size)
        rows = np.arange(len(dataset))
        return EpochBatchSampler(rows, cfg.batch_size, seed=cfg.seed, rank=rank, world_size=world_size)

    def _loader(self, part: str, dataset: ClassificationDataset, sampler: EpochBatchSampler) -> StatefulLoader:
        binary = self.task.kind != "multiclass"
        return StatefulLoader(
            dataset,
            sampler,
            ClassificationCollator(dataset.size_dhw, len(self.task.outputs) if binary else 0),
            num_workers=self.cfg.num_workers,
            pin_memory=torch.cuda.is_available() and self.cfg.num_gpus != 0,
            max_bad_fraction=self.cfg.max_bad_fraction,
            name=part,
        )


class _Arrays(Dataset):
    """(row, array) of every case; None where it cannot be read, which is told when the case is asked for."""

    def __init__(self, dataset: ClassificationDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> tuple[int, np.ndarray | None]:
        try:
            return row, self.dataset.array(row)
        except DataError:
            return row, None


def fill_memory(dataset: ClassificationDataset, num_workers: int, name: str) -> None:
    """Read all cases with loader processes into the memory of this one, which later loader processes share.

    Args:
        dataset: cases with ``cache=memory``.
        num_workers: loader processes, at least 1.
        name: name of the part, for the progress bar.
    """
    own = torch.Generator().manual_seed(0)  # a loader without one would move the global random state
    loader: Iterable[tuple[int, np.ndarray | None]] = DataLoader(
        _Arrays(dataset),
        batch_size=None,
        num_workers=num_workers,
        generator=own,
        collate_fn=_unchanged,  # type: ignore[arg-type]  # without batches it gets single items
    )
    for row, array in tqdm(loader, total=len(dataset), desc=f"read {name}", unit="case"):
        if array is not None:
            dataset.keep(row, array)


def _unchanged(item: tuple[int, np.ndarray | None]) -> tuple[int, np.ndarray | None]:
    return item
