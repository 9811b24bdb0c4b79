"""Cases of a segmentation benchmark as samples: cached preprocessing, seeded crops, whole volumes for evaluation.

Axes: B crops of a batch, X/Y/Z axes of the working grid (those of the task's orientation).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mg3d import __version__
from mg3d.datasets.array_cache import ArrayCache, digest_of, file_facts
from mg3d.datasets.classification import case_number
from mg3d.datasets.seeding import sample_generator
from mg3d.datasets.segmentation_case import PreparedCase, prepare_case, read_label_map
from mg3d.datasets.segmentation_crops import draw_crops
from mg3d.datasets.volume_report import BadSample, SampleIndex
from mg3d.errors import DataError
from mg3d.scans.working_grid import WorkingGrid

if TYPE_CHECKING:
    from mg3d.finetuning.benchmark import Case, SegmentationTask
    from mg3d.finetuning.config import FinetuneConfig

__all__ = ["CaseStore", "CropSample", "SegmentationDataset", "VolumeSample", "collate_crops", "collate_volume"]

MAX_REPLACEMENTS = 20


@dataclass(frozen=True, eq=False)
class CropSample:
    """Training crops of one case.

    Attributes:
        images: float32 [K, 1, X, Y, Z].
        labels: uint8 [K, 1, X, Y, Z].
        row: number of the case asked for.
        case: the case that came, another one when the one asked for cannot be read.
        bad: cases that were tried before.
    """

    images: Tensor
    labels: Tensor
    row: int
    case: Case
    bad: tuple[BadSample, ...] = ()


@dataclass(frozen=True, eq=False)
class VolumeSample:
    """One whole image for evaluation.

    Attributes:
        image: float32 [1, X, Y, Z] on the working grid.
        label: uint8 [X, Y, Z] on the working grid; None without labels.
        stored_label: uint8 class indices in the stored geometry; None without labels.
        grid: from the one to the other.
        row: number of the case.
        case: the case.
    """

    image: Tensor
    label: Tensor | None
    stored_label: Tensor | None
    grid: WorkingGrid
    row: int
    case: Case


class CaseStore:
    """Prepared cases, kept nowhere, in memory, or as ``.npy`` files.

    The key of a file holds the image's and the label's path, size and time, every setting of the preprocessing and the
    version of the program; training and evaluation have folders of their own.

    Args:
        task: the preprocessing.
        mode: ``none``, ``memory`` or ``disk``.
        folder: where files go with ``disk``.
        stage: sub-folder, ``train`` or ``eval``.
    """

    def __init__(
        self, task: SegmentationTask, mode: str = "none", folder: str | Path = "", stage: str = "eval"
    ) -> None:
        self.task, self.stage = task, stage
        self._memory: dict[str, PreparedCase] | None = {} if mode == "memory" else None
        self._disk = _MappedCache(Path(folder) / stage) if mode == "disk" else None

    def get(self, case: Case) -> PreparedCase:
        """Return a prepared case; its arrays may be shared or mapped from a file: do not write to them.

        Raises:
            DataError: naming the case.
        """
        if self._memory is not None:
            if case.id not in self._memory:
                self._memory[case.id] = prepare_case(case, self.task)
            return self._memory[case.id]
        return prepare_case(case, self.task) if self._disk is None else self._from_disk(self._disk, case)

    def key(self, case: Case) -> str:
        """Digest of everything a prepared case depends on."""
        task = self.task
        settings = {
            "orientation": task.orientation,
            "spacing_mm": task.spacing_mm,
            "window": task.window,
            "foreground_crop": task.foreground_crop,
            "roi": task.roi if task.foreground_crop == "reference_zscore" else None,
            "label_map": sorted((int(raw), int(index)) for raw, index in task.label_map.items()),
        }
        label = None if case.label is None else file_facts(case.label)
        return digest_of({"image": file_facts(case.image), "label": label, "mg3d": __version__, **settings})

    def _from_disk(self, disk: ArrayCache, case: Case) -> PreparedCase:
        key = self.key(case)
        made: list[PreparedCase] = []

        def prepared() -> PreparedCase:
            if not made:
                made.append(prepare_case(case, self.task))
            return made[0]

        image = disk.get(f"{key}-image", lambda: prepared().image)
        label = None if case.label is None else disk.get(f"{key}-label", lambda: _present(prepared().label))
        grid = _grid_from(disk.get(f"{key}-grid", lambda: _grid_to(prepared().grid)))
        return PreparedCase(image, label, grid)


class _MappedCache(ArrayCache):
    """Arrays are mapped into memory: a crop reads its own pages only."""

    def _read(self, key: str) -> np.ndarray | None:
        try:
            return np.load(self.path(key), mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError):  # absent, truncated or damaged
            return None


def _present(label: np.ndarray | None) -> np.ndarray:
    if label is None:
        raise ValueError("the case has no label map")
    return label


def _grid_to(grid: WorkingGrid) -> np.ndarray:
    """A grid as text in a byte array; numbers come back exactly."""
    fields = {name: getattr(grid, name) for name in ("stored_shape", "shape", "axes", "scale", "offset")}
    return np.frombuffer(json.dumps({**fields, "affine": grid.stored_affine.tolist()}).encode(), dtype=np.uint8)


def _grid_from(stored: np.ndarray) -> WorkingGrid:
    fields = json.loads(bytes(stored))
    affine = np.array(fields.pop("affine"), dtype=np.float64)
    return WorkingGrid(stored_affine=affine, **{name: tuple(values) for name, values in fields.items()})


class SegmentationDataset(torch.utils.data.Dataset):
    """Cases of one part of a split; every random choice depends on (seed, epoch, case id) alone.

    Args:
        cases: the cases.
        task: preprocessing, crops and augmentation.
        cfg: reads ``seed``, ``cache``, ``work_dir``, ``on_bad_sample``.
        train: samples are crops, and a case that cannot be read is replaced; else whole volumes.

    Raises:
        DataError: a training case without label map.
    """

    def __init__(self, cases: Sequence[Case], task: SegmentationTask, cfg: FinetuneConfig, *, train: bool) -> None:
        self.cases, self.task, self.cfg, self.train = tuple(cases), task, cfg, train
        stage = "train" if train else "eval"
        self.store = CaseStore(task, cfg.cache, Path(cfg.work_dir) / "cache" / "segmentation", stage)
        unlabelled = [case.id for case in self.cases if case.label is None]
        if train and unlabelled:
            raise DataError("a training case without label map", "leave it out of the split", case_id=unlabelled[0])

    def __len__(self) -> int:
        return len(self.cases)

    def __repr__(self) -> str:
        kind = f"{self.task.crops_per_volume} crops of {self.task.roi}" if self.train else "whole volumes"
        return f"SegmentationDataset({len(self)} cases, {kind}, cache {self.cfg.cache})"

    def __getitem__(self, index: int | SampleIndex) -> CropSample | VolumeSample | BadSample:
        """Return a sample; with ``on_bad_sample=skip`` a marker where an unreadable case is not replaced.

        Raises:
            DataError: the case cannot be read and ``on_bad_sample=raise``, or none of its replacements can.
        """
        row, epoch = index if isinstance(index, tuple) else (index, 0)
        bad: list[BadSample] = []
        for candidate in self._candidates(row):
            try:
                return self._crops(row, candidate, epoch, tuple(bad)) if self.train else self._volume(candidate)
            except DataError as error:
                if self.cfg.on_bad_sample == "raise":
                    raise
                bad.append(BadSample(candidate, str(error)))
        if self.train:
            message = f"{len(bad)} cases one after another cannot be read, the last: {bad[-1].reason}"
            raise DataError(message, "list everything that is wrong with --check-data")
        return bad[-1]

    def _candidates(self, row: int) -> list[int]:
        if not self.train or self.cfg.on_bad_sample == "raise":
            return [row]
        order = sample_generator(self.cfg.seed, 0, row, "replacement").permutation(len(self))
        return [row, *(int(other) for other in order if other != row)][: MAX_REPLACEMENTS + 1]

    def _crops(self, row: int, candidate: int, epoch: int, bad: tuple[BadSample, ...]) -> CropSample:
        case = self.cases[candidate]
        rng = sample_generator(self.cfg.seed, epoch, case_number(case.id), "transform")
        images, labels = draw_crops(self.store.get(case), self.task, rng)
        return CropSample(torch.from_numpy(images)[:, None], torch.from_numpy(labels)[:, None], row, case, bad)

    def _volume(self, row: int) -> VolumeSample:
        case = self.cases[row]
        prepared = self.store.get(case)
        stored_label = None
        if case.label is not None:
            grid = prepared.grid
            labels = read_label_map(case, self.task, grid.stored_shape, grid.stored_affine)
            stored_label = torch.from_numpy(np.ascontiguousarray(labels))
        label = None if prepared.label is None else torch.from_numpy(np.array(prepared.label))
        image = torch.from_numpy(np.array(prepared.image))[None]
        return VolumeSample(image, label, stored_label, prepared.grid, row, case)


def collate_crops(items: Sequence[CropSample | BadSample]) -> dict[str, Any]:
    """Samples -> ``{"image": [B,1,X,Y,Z], "label": [B,1,X,Y,Z], "image_id", "index"}``, B crops of all cases."""
    good = [item for item in items if isinstance(item, CropSample)]
    return {
        "image": torch.cat([item.images for item in good]),
        "label": torch.cat([item.labels for item in good]),
        "image_id": [item.case.id for item in good],
        "index": [item.row for item in good],
        "bad_samples": [entry for item in good for entry in item.bad],
    }


def collate_volume(items: Sequence[VolumeSample | BadSample]) -> dict[str, Any]:
    """At most one sample -> ``{"image": [1,1,X,Y,Z], "sample", "id", "index"}``; without any, only empty lists."""
    good = [item for item in items if isinstance(item, VolumeSample)]
    batch: dict[str, Any] = {
        "id": [item.case.id for item in good],
        "index": [item.row for item in good],
        "bad_samples": [item for item in items if isinstance(item, BadSample)],
    }
    return {**batch, "image": good[0].image[None], "sample": good[0]} if good else batch
