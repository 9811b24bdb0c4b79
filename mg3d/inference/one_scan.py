"""The common questions about one scan, each in one call."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mg3d.inference.model import MG3DModel, Output, ZeroShot
from mg3d.inference.processor import Mode, Processor


def encode_image(
    model: MG3DModel,
    processor: Processor,
    scan: str | Path | Any,
    *,
    output: Output = "embedding",
    mode: Mode = "resize",
    spacing_mm: Sequence[float] | None = None,
) -> Tensor | list[Tensor]:
    """Encode one scan.

    Args:
        model: from :func:`mg3d.load_model`.
        processor: from :func:`mg3d.load_processor`.
        scan: file, DICOM series folder, or array [D, H, W] in HU.
        output: ``embedding`` [1, P], ``pooled`` [1, E], ``tokens`` [1, N, E] or ``stages``; see
            :meth:`MG3DModel.encode_image`.
        mode: ``resize`` as in training, or ``crops`` over the whole scan, averaged.
        spacing_mm: voxel size (z, y, x) of an array.

    Raises:
        MG3DError: see the model and the processor.
    """
    return model.encode_image(processor(scan, spacing_mm, mode), output)


def encode_text(model: MG3DModel, texts: Sequence[str]) -> Tensor:
    """Unit vectors [B, P] of B texts, see :meth:`MG3DModel.encode_text`."""
    return model.encode_text(texts)


def zero_shot(
    model: MG3DModel,
    processor: Processor,
    scan: str | Path | Any,
    prompts: Sequence[str],
    negatives: Sequence[str] | None = None,
    *,
    mode: Mode = "resize",
    spacing_mm: Sequence[float] | None = None,
) -> ZeroShot:
    """Compare one scan with K prompts: scores and probabilities [1, K], see :meth:`MG3DModel.zero_shot`.

    Args:
        model: from :func:`mg3d.load_model`.
        processor: from :func:`mg3d.load_processor`.
        scan: file, DICOM series folder, or array [D, H, W] in HU.
        prompts: K texts.
        negatives: K texts that say the opposite.
        mode: ``resize`` as in training, or ``crops`` over the whole scan, averaged.
        spacing_mm: voxel size (z, y, x) of an array.

    Raises:
        MG3DError: see the model and the processor.
    """
    return model.zero_shot(processor(scan, spacing_mm, mode), prompts, negatives)
