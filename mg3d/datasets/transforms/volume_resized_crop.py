"""Random resized crop of the whole volume: the three-dimensional mend of the published per-slice crop (defect 41)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from mg3d.datasets.transforms.clip import Clip
from mg3d.datasets.volume import resize_trilinear

SCALE_RANGE: Final = (0.9, 1.0)


class VolumeResizedCrop:
    """After :class:`Clip`, cut one box (90-100 % of each axis, same place in every slice) and resize it back.

    Args:
        size_dhw: output size (D, H, W).
    """

    def __init__(self, size_dhw: Sequence[int]) -> None:
        self.clip = Clip(size_dhw)

    def __call__(self, unit_DHW: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return float32 ``[D, H, W]``; arguments as in :class:`Clip`, ``rng`` draws the box."""
        clipped = self.clip(unit_DHW, rng)
        scale = rng.uniform(*SCALE_RANGE)
        box = [max(round(size * scale), 1) for size in clipped.shape]
        starts = [int(rng.integers(size - part + 1)) for size, part in zip(clipped.shape, box, strict=True)]
        cut = clipped[tuple(slice(start, start + part) for start, part in zip(starts, box, strict=True))]
        return resize_trilinear(cut, self.clip.size_dhw)
