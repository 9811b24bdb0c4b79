"""Images with reports of a report-generation benchmark as samples, and their batches.

Shape suffixes: B batch, L ids of the longest report, C labels, D/H/W volume axes, P patch features of width F.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mg3d.datasets.classification import fit_centre, read_case, resolve_loader
from mg3d.datasets.volume_report import BadSample, SampleIndex
from mg3d.errors import DataError

if TYPE_CHECKING:
    from mg3d.finetuning.benchmark import Case, ReportTask
    from mg3d.finetuning.config import FinetuneConfig


@dataclass(frozen=True)
class ReportSample:
    """One image with its report.

    Attributes:
        image: float32 ``[1, D, H, W]`` in [0, 1]; None where features stand for it.
        features: float32 ``[P, F]`` of the frozen encoder; None where the image is given.
        ids: int64 ``[L]``: start, words, end.
        labels: float32 ``[C]`` of 0 and 1.
        row: number of the case.
        case: the case.
    """

    image: Tensor | None
    features: Tensor | None
    ids: Tensor
    labels: Tensor
    row: int
    case: Case


class ReportCaseDataset(torch.utils.data.Dataset):
    """Cases with reports; an image is read only while there are no features of it.

    Args:
        cases: the cases.
        task: reports, vocabulary, and how images are read.
        cfg: the run's config: protocol and ``on_bad_sample``.
        features: case id -> patch features ``[P, F]``; may be filled later.

    Raises:
        DataError: a case has no report, or another number of labels than the task.
    """

    def __init__(
        self, cases: Sequence[Case], task: ReportTask, cfg: FinetuneConfig, features: Mapping[str, Tensor]
    ) -> None:
        self.cases = tuple(cases)
        self.task = task
        self.cfg = cfg
        self.features = features
        self.load = resolve_loader(task.load)
        self.ids = [self._encode(case) for case in self.cases]

    def _encode(self, case: Case) -> Tensor:
        if self.task.vocabulary is None:
            raise ValueError("the task has no vocabulary: build one from the training reports")
        if not self.task.reports.get(case.id, "").strip():
            raise DataError("the report is missing or empty", "leave the case out of the split", case_id=case.id)
        if len(case.targets) != len(self.task.labels):
            raise DataError(
                f"{len(case.targets)} labels, expected {len(self.task.labels)}",
                "mend the label table, or train without: label_loss=0 ranking_loss=0",
                case_id=case.id,
            )
        keep_end = self.cfg.protocol == "clean"
        ids = self.task.vocabulary.encode(self.task.reports[case.id], self.task.max_tokens, keep_end=keep_end)
        return torch.tensor(ids)

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, index: int | SampleIndex) -> ReportSample | BadSample:
        """Return a sample, or with ``on_bad_sample=skip`` a marker where the image cannot be read.

        Raises:
            DataError: the image cannot be read and ``on_bad_sample=raise``.
        """
        row = index[0] if isinstance(index, tuple) else index
        case = self.cases[row]
        features, image = self.features.get(case.id), None
        if features is None:
            try:
                image = self._image(case)
            except DataError as error:
                if self.cfg.on_bad_sample == "raise":
                    raise
                return BadSample(row, str(error))
        return ReportSample(image, features, self.ids[row], torch.tensor(case.targets).float(), row, case)

    def _image(self, case: Case) -> Tensor:
        array = fit_centre(read_case(self.load, case, self.cfg), self.task.size_dhw)
        return torch.from_numpy(np.array(array, dtype=np.float32, order="C"))[None]


class ReportCollator:
    """Samples -> ``{"image" or "features", "ids" [B, L], "counts" [B, L], "labels" [B, C], "id", "patient", "tags"}``.

    ``counts`` marks ids that are part of the report, start and end included; the rest is padding. Unreadable cases are
    listed under ``bad_samples``; a batch may be empty (B = 0).

    Args:
        size_dhw: voxels of an image, for batches without any.
        labels: C.
    """

    def __init__(self, size_dhw: Sequence[int], labels: int) -> None:
        self.size_dhw = tuple(size_dhw)
        self.labels = labels

    def __call__(self, items: Sequence[ReportSample | BadSample]) -> dict[str, Any]:
        """Stack what could be read."""
        good = [item for item in items if isinstance(item, ReportSample)]
        longest = max((len(item.ids) for item in good), default=2)
        ids, counts = torch.zeros(len(good), longest, dtype=torch.long), torch.zeros(len(good), longest)
        for place, item in enumerate(good):
            ids[place, : len(item.ids)], counts[place, : len(item.ids)] = item.ids, 1.0
        return {
            **self._seen(good),
            "ids": ids,
            "counts": counts,
            "labels": torch.stack([item.labels for item in good]) if good else torch.zeros(0, self.labels),
            "index": [item.row for item in good],
            "id": [item.case.id for item in good],
            "patient": [item.case.patient for item in good],
            "tags": [dict(item.case.tags) for item in good],
            "bad_samples": [item for item in items if isinstance(item, BadSample)],
        }

    def _seen(self, good: Sequence[ReportSample]) -> dict[str, Tensor]:
        features = [item.features for item in good if item.features is not None]
        if features and len(features) == len(good):
            return {"features": torch.stack(features)}
        images = [item.image for item in good if item.image is not None]
        return {"image": torch.stack(images) if images else torch.zeros(0, 1, *self.size_dhw)}
