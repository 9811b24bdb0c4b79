"""Batches for writing reports: volumes beside the whole report as the ids that a decoder learns to write.

B studies, D/H/W volume axes, L ids of the longest report.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mg3d.datasets.arrow_table import ArrowTable
from mg3d.datasets.collate import pad_stack
from mg3d.datasets.report_text import clean_text
from mg3d.datasets.volume_report import VolumeReportSample

__all__ = ["ReportTargetCollator", "encode_targets", "rows_with_reports"]


def encode_targets(tokenizer: Any, texts: Sequence[str], max_text_len: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Reports as ids: start, words, end.

    A report that is too long is cut and has no end: the decoder shall not learn to stop in the middle.

    Args:
        tokenizer: a transformers tokenizer with ``cls``, ``sep`` and ``pad`` token.
        texts: B reports.
        max_text_len: most ids of one, start and end included.

    Returns:
        ids int64 [B, L], padded to the longest, and the mask int64 [B, L], 1 on ids of the report.
    """
    encoded = tokenizer(list(texts), add_special_tokens=False, truncation=False, verbose=False)["input_ids"]
    whole = [[tokenizer.cls_token_id, *ids, tokenizer.sep_token_id][:max_text_len] for ids in encoded]
    longest = max(map(len, whole))
    ids = torch.full((len(whole), longest), int(tokenizer.pad_token_id))
    mask = torch.zeros((len(whole), longest), dtype=torch.long)
    for row, report in enumerate(whole):
        ids[row, : len(report)], mask[row, : len(report)] = torch.tensor(report), 1
    return ids, mask


def rows_with_reports(table: ArrowTable) -> np.ndarray:
    """Row numbers of a corpus whose findings or impression hold text; no pixels are touched."""
    sections = [table.column(name) for name in ("findings", "impression")]
    held = [any(clean_text(text) for texts in row for text in texts or ()) for row in zip(*sections, strict=True)]
    return np.flatnonzero(held)


@dataclass(frozen=True)
class ReportTargetCollator:
    """Samples -> batch.

    Args:
        tokenizer: that of the text encoder.
        max_text_len: see `encode_targets`.
        size_dhw: voxels of a volume, for batches without any.
    """

    tokenizer: Any
    max_text_len: int
    size_dhw: tuple[int, int, int]

    def __call__(self, samples: Sequence[VolumeReportSample]) -> dict[str, Any]:
        """Return ``image`` float32 ``[B, D, 1, H, W]``, ``text_ids`` and ``text_masks`` ``[B, L]``.

        Further ``labels`` ``[B, 18]``, ``index`` int64 ``[B]`` and lists of B: ``report`` (whole text), ``image_id``,
        ``patient_id``, ``corpus``. B may be 0. ``bad_samples`` is present when rows had to be replaced.
        """
        batch: dict[str, Any] = {"index": torch.tensor([sample.index for sample in samples], dtype=torch.long)}
        batch["report"] = [sample.report.text for sample in samples]
        batch |= {key: [getattr(sample, key) for sample in samples] for key in ("image_id", "patient_id", "corpus")}
        if bad := [entry for sample in samples for entry in sample.bad]:
            batch["bad_samples"] = bad
        if not samples:
            depth, height, width = self.size_dhw
            return {**batch, "image": torch.zeros(0, depth, 1, height, width)}
        ids, mask = encode_targets(self.tokenizer, batch["report"], self.max_text_len)
        image = pad_stack([sample.image for sample in samples])
        labels = torch.stack([sample.labels for sample in samples])
        return {**batch, "image": image, "text_ids": ids, "text_masks": mask, "labels": labels}
