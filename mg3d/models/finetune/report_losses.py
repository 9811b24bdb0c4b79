"""Losses of the report generator (spec downstream 8.6): words, labels, and matching images with reports.

Shape suffixes: B reports, T positions, W = V + 1 ids, E model width, C labels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

LEAST_MARGIN = 0.5


def word_loss(logits_BTW: Tensor, targets_BT: Tensor, counts_BT: Tensor) -> Tensor:
    """Mean negative log-likelihood of the words and the end.

    Args:
        logits_BTW: next-word scores.
        targets_BT: ids, shifted by one against the input.
        counts_BT: which positions count (the end does, padding does not, though both are 0).

    Returns:
        scalar, 0 if nothing counts.
    """
    each_BT = functional.cross_entropy(logits_BTW.transpose(1, 2), targets_BT, reduction="none")
    counts = counts_BT.to(each_BT.dtype)
    return (each_BT * counts).sum() / counts.sum().clamp(min=1)


def label_loss(logits_BC: Tensor, labels_BC: Tensor) -> Tensor:
    """Binary cross-entropy over all labels, a scalar."""
    return functional.binary_cross_entropy_with_logits(logits_BC, labels_BC.to(logits_BC.dtype))


def ranking_loss(image_BE: Tensor, text_BE: Tensor, labels_BC: Tensor) -> Tensor:
    """Hinge that wants an image closer to its own report than to the next one's, and the other way round.

    The impostor is the next item of the batch, cyclic; the score is the dot product. The margin is 0 where both have
    the same labels, else the share of differing labels among those present in either, at least 0.5.

    Args:
        image_BE: z_img.
        text_BE: z_txt.
        labels_BC: 0 or 1.

    Returns:
        scalar: mean over the batch of the image part plus that of the text part.
    """
    present = labels_BC.bool()
    other = present.roll(-1, dims=0)
    differing = (present ^ other).sum(dim=1)
    either = (present | other).sum(dim=1).clamp(min=1)
    margin_B = (differing / either).clamp(min=LEAST_MARGIN) * (differing > 0)
    pair_B = (image_BE * text_BE).sum(dim=1)
    wrong_image_B = (image_BE.roll(-1, dims=0) * text_BE).sum(dim=1)
    wrong_text_B = (image_BE * text_BE.roll(-1, dims=0)).sum(dim=1)
    parts = [(wrong - pair_B + margin_B).clamp(min=0).mean() for wrong in (wrong_image_B, wrong_text_B)]
    return torch.stack(parts).sum()
