"""The corpora of pre-training as data for writing reports: only studies that have one, whole, none twice."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np

from mg3d.config_schema import MG3DConfig
from mg3d.datamodules.case_sampler import CompleteBatchSampler
from mg3d.datamodules.pretraining import MG3DDataModule
from mg3d.datamodules.sampler import EpochBatchSampler, seeded_subset
from mg3d.datamodules.stateful_loader import StatefulLoader
from mg3d.datasets.report_targets import ReportTargetCollator, rows_with_reports
from mg3d.errors import DataError

__all__ = ["ReportWritingDataModule"]

_LOG = logging.getLogger(__name__)


class ReportWritingDataModule(MG3DDataModule):
    """Loaders of a report-writing run; arguments as `MG3DDataModule`.

    Studies without a report are left out of every split. Validation and test see each of the others once, whatever the
    number of processes.
    """

    def __init__(self, cfg: MG3DConfig, tokenizer: Any) -> None:
        super().__init__(cfg, tokenizer)
        self._rows: dict[str, np.ndarray] = {}

    def rows(self, split: str) -> np.ndarray:
        """Rows of a split (in the concatenation of its corpora) that have a report.

        Raises:
            DataError: there is none.
        """
        if split not in self._rows:
            parts = self.dataset(split).datasets
            self._rows[split] = np.concatenate([part.first_row + rows_with_reports(part.table) for part in parts])
            found, every = len(self._rows[split]), len(self.dataset(split))
            if not found:
                raise DataError(
                    f"no study of the {split} split has a report ({every} studies)", "pack the corpus with its reports"
                )
            if found < every:
                _LOG.info("%s: %d of %d studies have no report and are left out", split, every - found, every)
        return self._rows[split]

    def training_volumes(self, count: int) -> StatefulLoader:
        """Return a loader of ``count`` training studies that lie evenly in the split (all, if there are fewer)."""
        rows = self.rows("train")
        chosen = rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int)]
        return self._undivided("train", chosen)

    def complete_reports(self, split: str) -> StatefulLoader:
        """Return a loader of every study of a split that has a report, not divided among processes."""
        return self._undivided(split, self.rows(split))

    def _undivided(self, split: str, rows: np.ndarray) -> StatefulLoader:
        sampler = EpochBatchSampler(rows, self.cfg.per_gpu_batchsize, shuffle=False, drop_last=False)
        return self._loader(split, sampler)

    def _sampler(self, split: str, *, shuffle: bool, rank: int, world_size: int) -> EpochBatchSampler:
        if not shuffle:
            sampler = CompleteBatchSampler(
                len(self.rows(split)), self.cfg.per_gpu_batchsize, rank=rank, world_size=world_size
            )
            sampler.rows = self.rows(split)
            return sampler
        rows = self.rows(split)
        rows = rows[seeded_subset(len(rows), self.cfg.data_frac, self.cfg.seed)]
        return EpochBatchSampler(rows, self.cfg.per_gpu_batchsize, seed=self.cfg.seed, rank=rank, world_size=world_size)

    def _collator(self) -> Any:
        return ReportTargetCollator(self.tokenizer, self.cfg.max_text_len, self.cfg.volume_size)
