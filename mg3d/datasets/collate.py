"""Samples to a batch: padding, masks, whole-word masking, hidden cells.

B batch, D/H/W volume axes, L text tokens, S sentences, n tokens of one sentence, K false images.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mg3d.datasets.report_text import ReportEncoding
from mg3d.datasets.volume_report import VolumeReportSample
from mg3d.datasets.whole_word_mask import IGNORED, WholeWordMasker
from mg3d.mim_cells import cell_grid, random_cells


def pad_stack(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Stack tensors of one rank, zero padded at the end of each axis to the largest (spec pretraining 5).

    Raises:
        ValueError: nothing to stack, or different numbers of axes.
    """
    shapes = [tuple(tensor.shape) for tensor in tensors]
    if len({len(shape) for shape in shapes}) != 1:
        raise ValueError(f"tensors to stack need the same number of axes, got shapes {shapes}")
    if len(set(shapes)) == 1:
        return torch.stack(list(tensors))
    largest = [max(sizes) for sizes in zip(*shapes, strict=True)]
    out = tensors[0].new_zeros((len(tensors), *largest))
    for target, tensor in zip(out, tensors, strict=True):
        target[tuple(slice(size) for size in tensor.shape)] = tensor
    return out


def collate_reports(reports: Sequence[ReportEncoding]) -> dict[str, Any]:
    """Stack the token views of B reports.

    Returns ``text_ids``, ``text_masks``, ``text_labels`` (-100), ``sentence_index`` int64 ``[B, L]``, ``sen_txt_ids``,
    ``sen_txt_masks`` int64 ``[B, S, n]``, ``sentence_mask`` bool ``[B, S]``, ``has_text`` bool ``[B]`` and ``report``
    (list of B texts). S and n are at least 1, so that a batch of empty reports keeps its axes.
    """
    text_ids = torch.from_numpy(np.stack([report.input_ids for report in reports]))
    counts = [len(report.sentences) for report in reports]
    longest = max((len(sentence.input_ids) for report in reports for sentence in report.sentences), default=1)
    shape = (len(reports), max(max(counts), 1), longest)
    sentence_ids, sentence_masks = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    for b, report in enumerate(reports):
        for s, sentence in enumerate(report.sentences):
            sentence_ids[b, s, : len(sentence.input_ids)] = sentence.input_ids
            sentence_masks[b, s, : len(sentence.input_ids)] = 1
    return {
        "text_ids": text_ids,
        "text_masks": torch.from_numpy(np.stack([report.attention_mask for report in reports])),
        "text_labels": torch.full_like(text_ids, IGNORED),
        "sentence_index": torch.from_numpy(np.stack([report.sentence_index for report in reports])),
        "sen_txt_ids": torch.from_numpy(sentence_ids),
        "sen_txt_masks": torch.from_numpy(sentence_masks),
        "sentence_mask": torch.arange(shape[1])[None] < torch.tensor(counts)[:, None],
        "has_text": torch.tensor([report.has_text for report in reports]),
        "report": [report.text for report in reports],
    }


def mask_reference(
    masker: WholeWordMasker, text_ids_BL: torch.Tensor, python_seed: int, torch_seed: int
) -> dict[str, torch.Tensor]:
    """Return ``text_ids_mlm`` and ``text_labels_mlm`` ``[B, L]`` drawn for the whole batch as the published collator.

    Equals ``random.seed(python_seed); torch.manual_seed(torch_seed)`` followed by the published draws.
    """
    generator = torch.Generator().manual_seed(torch_seed)
    ids, labels = masker.mask(text_ids_BL, random.Random(python_seed), generator)
    return {"text_ids_mlm": ids, "text_labels_mlm": labels}


@dataclass(frozen=True)
class PretrainCollator:
    """Build a pre-training batch.

    Args:
        masker: whole-word masker; None leaves the text unmasked.
        mim_window: edge of a hidden cell in voxels; 0 leaves ``mim_mask`` out.
        mim_mask_ratio: part of the cells that is hidden in each sample.
    """

    masker: WholeWordMasker | None = None
    mim_window: int = 0
    mim_mask_ratio: float = 0.5

    def __call__(self, samples: Sequence[VolumeReportSample]) -> dict[str, Any]:
        """Return the batch; ``bad_samples`` is present when rows had to be replaced.

        ``image`` is float32 ``[B, D, 1, H, W]``, ``labels`` int8 ``[B, 18]``, ``index``, ``report_key`` int64 ``[B]``,
        ``mim_mask`` bool ``[B, d, h, w]`` (True = hidden), ``false_image`` float32 ``[B, K, D, 1, H, W]``; text keys
        of :func:`collate_reports` and ``text_ids_mlm`` and ``text_labels_mlm`` int64 ``[B, L]``.
        """
        batch: dict[str, Any] = {"image": pad_stack([sample.image for sample in samples])}
        batch.update(collate_reports([sample.report for sample in samples]))
        batch.update(self._masked_text(batch["text_ids"], samples))
        if self.mim_window:
            batch["mim_mask"] = self._hidden_cells(batch["image"].shape, samples)
        if samples[0].false_image is not None:
            batch["false_image"] = pad_stack([s.false_image for s in samples if s.false_image is not None])
        batch["labels"] = torch.stack([sample.labels for sample in samples])
        batch["index"] = torch.tensor([sample.index for sample in samples])
        batch["report_key"] = torch.tensor([sample.report_key for sample in samples])
        for key in ("image_id", "patient_id", "corpus"):
            batch[key] = [getattr(sample, key) for sample in samples]
        if bad := [entry for sample in samples for entry in sample.bad]:
            batch["bad_samples"] = bad
        return batch

    def _masked_text(self, text_ids_BL: torch.Tensor, samples: Sequence[VolumeReportSample]) -> dict[str, torch.Tensor]:
        if self.masker is None:
            return {"text_ids_mlm": text_ids_BL.clone(), "text_labels_mlm": torch.full_like(text_ids_BL, IGNORED)}
        pairs = [self.masker.mask_sample(ids, s.mlm_seed) for ids, s in zip(text_ids_BL, samples, strict=True)]
        ids, labels = zip(*pairs, strict=True)
        return {"text_ids_mlm": torch.stack(ids), "text_labels_mlm": torch.stack(labels)}

    def _hidden_cells(self, shape: Sequence[int], samples: Sequence[VolumeReportSample]) -> torch.Tensor:
        grid = cell_grid((shape[1], shape[3], shape[4]), self.mim_window)
        cells = [random_cells(sample.cell_seed, grid, self.mim_mask_ratio) for sample in samples]
        return torch.from_numpy(np.stack(cells))
