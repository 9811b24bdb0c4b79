"""Cases of a segmentation benchmark as a Lightning data module: shuffled crops, and every evaluated case once."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from mg3d.datamodules.case_sampler import CompleteBatchSampler
from mg3d.datamodules.sampler import EpochBatchSampler
from mg3d.datamodules.stateful_loader import StatefulLoader, finished_batches
from mg3d.datasets.segmentation import SegmentationDataset, collate_crops, collate_volume
from mg3d.errors import DataError

if TYPE_CHECKING:
    from mg3d.finetuning.benchmark import SegmentationTask, Splits
    from mg3d.finetuning.config import FinetuneConfig

_LOG = logging.getLogger(__name__)


class SegmentationDataModule(pl.LightningDataModule):
    """Loaders of a segmentation benchmark.

    A training batch holds ``batch_size`` cases with ``crops_per_volume`` crops each; evaluation takes one whole volume
    at a time. Use ``Trainer(use_distributed_sampler=False)``: the cases are already divided among the processes.

    Args:
        cfg: the run's config.
        task: preprocessing and crops.
        splits: the cases by use.
    """

    def __init__(self, cfg: FinetuneConfig, task: SegmentationTask, splits: Splits) -> None:
        super().__init__()
        self.cfg, self.task, self.splits = cfg, task, splits
        self._datasets: dict[str, SegmentationDataset] = {}

    def dataset(self, part: str) -> SegmentationDataset:
        """Return the cases of a part: ``train`` (crops), ``val`` or ``test`` (whole volumes).

        Raises:
            DataError: the part is empty.
        """
        if part not in self._datasets:
            cases = getattr(self.splits, part)
            if not cases:
                raise DataError(f"the {part} part of the split has no case", "check data_root, fold and data_fraction")
            self._datasets[part] = SegmentationDataset(cases, self.task, self.cfg, train=part == "train")
            _LOG.info("%s: %r", part, self._datasets[part])
        return self._datasets[part]

    def batches_per_epoch(self, world_size: int = 1) -> int:
        """Batches of one process in a training epoch of ``world_size`` processes; needs no trainer."""
        return len(self._train_sampler(rank=0, world_size=world_size))

    def train_dataloader(self) -> StatefulLoader:
        """Return the shuffled, resumable training loader of this process."""
        self._fill_memory("train")
        loader = self._loader("train", self._train_sampler(**self._processes()))
        if self.trainer is not None:
            loader.progress = finished_batches(self.trainer)
        return loader

    def val_dataloader(self) -> StatefulLoader:
        """Return the validation loader of this process: no case twice, none left out over all processes."""
        return self._whole("val")

    def test_dataloader(self) -> StatefulLoader:
        """Return the test loader of this process, as in validation."""
        return self._whole("test")

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Move the tensors of a batch; what belongs to a case (labels in stored geometry) stays where it is."""
        if not isinstance(batch, dict):
            return super().transfer_batch_to_device(batch, device, dataloader_idx)
        return {
            name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
            for name, value in batch.items()
        }

    def _whole(self, part: str) -> StatefulLoader:
        self._fill_memory(part)
        return self._loader(part, CompleteBatchSampler(len(self.dataset(part)), 1, **self._processes()))

    def _processes(self) -> dict[str, int]:
        if self.trainer is None:
            return {"rank": 0, "world_size": 1}
        return {"rank": self.trainer.global_rank, "world_size": self.trainer.world_size}

    def _train_sampler(self, *, rank: int, world_size: int) -> EpochBatchSampler:
        rows = np.arange(len(self.dataset("train")))
        return EpochBatchSampler(rows, self.cfg.batch_size, seed=self.cfg.seed, rank=rank, world_size=world_size)

    def _fill_memory(self, part: str) -> None:
        """With ``cache=memory`` read the cases before loader processes start, which then share them."""
        dataset = self.dataset(part)
        if self.cfg.cache != "memory" or not self.cfg.num_workers:
            return
        for case in dataset.cases:
            try:
                dataset.store.get(case)
            except DataError as error:  # told when the case is asked for
                _LOG.debug("%s", error)

    def _loader(self, part: str, sampler: EpochBatchSampler) -> StatefulLoader:
        return StatefulLoader(
            self.dataset(part),
            sampler,
            collate_crops if part == "train" else collate_volume,
            num_workers=self.cfg.num_workers,
            pin_memory=torch.cuda.is_available() and self.cfg.num_gpus != 0,
            max_bad_fraction=self.cfg.max_bad_fraction,
            name=part,
        )
