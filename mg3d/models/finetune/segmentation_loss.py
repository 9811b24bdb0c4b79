"""Losses of the segmentation benchmarks, MONAI's with the published settings (spec downstream 1 to 3).

| name | Dice | cross-entropy |
|---|---|---|
| dice_ce | without background, smoothing 1e-5 | yes |
| dice_squared_ce | squared denominator, smoothing 0 above and 1e-6 below, with background | yes |
| dice | with background, smoothing 1e-5 | no |

Means over crops and classes with equal weight; softmax inside.
"""

from __future__ import annotations

from typing import Any

from monai.losses import DiceCELoss, DiceLoss
from torch import Tensor, nn

from mg3d.errors import ConfigError

__all__ = ["LOSSES", "SegmentationLoss"]

LOSSES: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "dice_ce": (DiceCELoss, {"include_background": False}),
    "dice_squared_ce": (DiceCELoss, {"squared_pred": True, "smooth_nr": 0.0, "smooth_dr": 1e-6}),
    "dice": (DiceLoss, {}),
}


class SegmentationLoss(nn.Module):
    """One of `LOSSES`, in float32 whatever the precision of the network.

    Args:
        name: a key of `LOSSES`.

    Raises:
        ConfigError: unknown name.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        if name not in LOSSES:
            raise ConfigError(f"loss={name!r} is unknown", f"choose one of {', '.join(LOSSES)}")
        kind, options = LOSSES[name]
        self.loss = kind(to_onehot_y=True, softmax=True, **options)

    def forward(self, logits_BKXYZ: Tensor, label_B1XYZ: Tensor) -> Tensor:
        """Scalar loss.

        Args:
            logits_BKXYZ: one value a class, background first.
            label_B1XYZ: class indices, any integer type.
        """
        return self.loss(logits_BKXYZ.float(), label_B1XYZ.long())
