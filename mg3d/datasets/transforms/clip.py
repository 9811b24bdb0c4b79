"""The published pre-training geometry: no augmentation (spec pretraining 4.1, 4.3)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mg3d.datasets.volume import resize_trilinear


class Clip:
    """Bring the pre-training crop to the size the model takes: nothing when it was packed so, else a resize.

    Args:
        size_dhw: output size (D, H, W).
    """

    def __init__(self, size_dhw: Sequence[int]) -> None:
        self.size_dhw = tuple(size_dhw)

    def __call__(self, unit_DHW: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return float32 ``[D, H, W]``.

        Args:
            unit_DHW: values in [0, 1].
            rng: not used.
        """
        if unit_DHW.shape == self.size_dhw:
            return unit_DHW
        return resize_trilinear(unit_DHW, self.size_dhw)
