"""The pre-training data as a Lightning data module: concatenated corpora, three splits, resumable order."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch

from mg3d.config_schema import MG3DConfig
from mg3d.datamodules.registry import dataset_class
from mg3d.datamodules.sampler import EpochBatchSampler, seeded_subset
from mg3d.datamodules.stateful_loader import StatefulLoader, finished_batches
from mg3d.datasets.arrow_files import find_arrow_files
from mg3d.datasets.arrow_table import ArrowTable
from mg3d.datasets.collate import PretrainCollator
from mg3d.datasets.volume_report import ConcatReports, VolumeReportDataset
from mg3d.datasets.whole_word_mask import WholeWordMasker
from mg3d.mim_cells import cell_grid, reference_cells

_LOG = logging.getLogger(__name__)


class MG3DDataModule(pl.LightningDataModule):
    """Builds the loaders of a run from its config.

    Use ``Trainer(use_distributed_sampler=False)``: the order is already divided among the processes.

    Args:
        cfg: the run's config.
        tokenizer: the text encoder's tokenizer.
    """

    def __init__(self, cfg: MG3DConfig, tokenizer: Any) -> None:
        super().__init__()
        self.cfg = cfg
        self.tokenizer = tokenizer
        self._datasets: dict[str, ConcatReports] = {}

    def setup(self, stage: str | None = None) -> None:
        """Open the files of the splits a stage needs, so that a missing or damaged one is known before the first step.

        Args:
            stage: ``fit`` (train and val), ``validate``, ``test``; None: all.
        """
        splits = {"fit": ("train", "val"), "validate": ("val",), "test": (self.cfg.eval_split,)}
        for split in splits.get(stage or "", ("train", "val", "test")):
            self.dataset(split)

    def dataset(self, split: str) -> ConcatReports:
        """Return the concatenated corpora of a split (train, val or test)."""
        if split not in self._datasets:
            self._datasets[split] = self._concatenate(split)
            _LOG.info("%s: %r", split, self._datasets[split])
        return self._datasets[split]

    def batches_per_epoch(self, world_size: int = 1) -> int:
        """Batches of one process in a training epoch of ``world_size`` processes; needs no trainer."""
        return len(self._sampler("train", shuffle=True, rank=0, world_size=world_size))

    def train_dataloader(self) -> StatefulLoader:
        """Return the shuffled, resumable training loader of this process."""
        loader = self._loader("train", self._sampler("train", shuffle=True, **self._processes()))
        if self.trainer is not None:
            loader.progress = finished_batches(self.trainer)
        return loader

    def val_dataloader(self) -> StatefulLoader:
        """Return the validation loader of this process: file order, no study twice."""
        return self._loader("val", self._sampler("val", shuffle=False, **self._processes()))

    def test_dataloader(self) -> StatefulLoader:
        """Return the loader of the evaluated split (``eval_split``) of this process: file order, no study twice."""
        split = self.cfg.eval_split
        return self._loader(split, self._sampler(split, shuffle=False, **self._processes()))

    def complete_dataloader(self, split: str) -> StatefulLoader:
        """Return a loader of every study of a split in file order, not divided among processes: for evaluation."""
        rows = np.arange(len(self.dataset(split)))
        sampler = EpochBatchSampler(rows, self.cfg.per_gpu_batchsize, shuffle=False, drop_last=False)
        return self._loader(split, sampler)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Add the one cell mask of the whole batch when ``mim_mask_mode`` is ``batch_reference``.

        Drawn here, in the training process, from numpy's global generator, as the published code does in its model.
        """
        cfg = self.cfg
        if cfg.mim_mask_mode == "batch_reference" and cfg.loss_names["swin_unetr_mim"] > 0 and "mim_mask" not in batch:
            count, depth, _, height, width = batch["image"].shape
            grid = cell_grid((depth, height, width), cfg.mim_window)
            cells = torch.from_numpy(reference_cells(grid, cfg.mim_mask_ratio))
            batch["mim_mask"] = cells.expand(count, *cells.shape)
        return batch

    def _processes(self) -> dict[str, int]:
        if self.trainer is None:
            return {"rank": 0, "world_size": 1}
        return {"rank": self.trainer.global_rank, "world_size": self.trainer.world_size}

    def _sampler(self, split: str, *, shuffle: bool, rank: int, world_size: int) -> EpochBatchSampler:
        num_rows = len(self.dataset(split))
        rows = seeded_subset(num_rows, self.cfg.data_frac, self.cfg.seed) if shuffle else np.arange(num_rows)
        return EpochBatchSampler(
            rows,
            self.cfg.per_gpu_batchsize,
            seed=self.cfg.seed,
            shuffle=shuffle,
            drop_last=shuffle,
            rank=rank,
            world_size=world_size,
        )

    def _loader(self, split: str, sampler: EpochBatchSampler) -> StatefulLoader:
        return StatefulLoader(
            self.dataset(split),
            sampler,
            self._collator(),
            num_workers=self.cfg.num_workers,
            pin_memory=torch.cuda.is_available() and self.cfg.num_gpus != 0,
            max_bad_fraction=self.cfg.max_bad_fraction,
            name=split,
        )

    def _collator(self) -> PretrainCollator:
        cfg = self.cfg
        masker = WholeWordMasker(self.tokenizer, cfg.mlm_prob, cfg.wwm_budget, whole_words=cfg.whole_word_masking)  # type: ignore[arg-type]
        draws_cells = cfg.loss_names["swin_unetr_mim"] > 0 and cfg.mim_mask_mode == "sample"
        return PretrainCollator(masker, cfg.mim_window if draws_cells else 0, cfg.mim_mask_ratio)

    def _concatenate(self, split: str) -> ConcatReports:
        parts: list[VolumeReportDataset] = []
        for key in self.cfg.datasets:
            parts.append(self._corpus(key, split, first_row=sum(len(part) for part in parts)))
        return ConcatReports(parts)

    def _corpus(self, key: str, split: str, first_row: int) -> VolumeReportDataset:
        cfg = self.cfg
        build = dataset_class(key)
        table = ArrowTable(find_arrow_files(cfg.data_root, key, split), verify_crc=cfg.verify_crc)
        return build(
            table,
            corpus=key,
            tokenizer=self.tokenizer,
            size_dhw=cfg.volume_size,
            max_text_len=cfg.max_text_len,
            seed=cfg.seed,
            sent_level=cfg.sent_level,
            fragment_separator=cfg.fragment_separator,
            transform_keys=cfg.train_transform_keys if split == "train" else cfg.val_transform_keys,
            draw_false_image=cfg.draw_false_image,
            image_only=cfg.image_only,
            image_root=cfg.image_root or Path(cfg.data_root),
            on_bad_sample=cfg.on_bad_sample,
            first_row=first_row,
            fixed_draws=cfg.fixed_draws,
        )
