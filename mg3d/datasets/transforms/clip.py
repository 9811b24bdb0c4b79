"""The published pre-training geometry: no augmentation (spec pretraining 4.1, 4.3)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mg3d.datasets.volume import crop_and_resize, resize_trilinear


class Clip:
    """Bring a stored volume to the pre-training crop: nothing when it was packed so, else crop and resize.

    Args:
        size_dhw: output size (D, H, W).
    """

    def __init__(self, size_dhw: Sequence[int]) -> None:
        self.size_dhw = tuple(size_dhw)

    def __call__(self, unit_DHW: np.ndarray, rng: np.random.Generator, *, native: bool = False) -> np.ndarray:
        """Return float32 ``[D, H, W]``.

        Args:
            unit_DHW: values in [0, 1].
            rng: not used.
            native: the row holds the whole resampled scan (``store=native``), so the crop is still to be taken.
        """
        if native:
            return crop_and_resize(unit_DHW, size=self.size_dhw)
        if unit_DHW.shape == self.size_dhw:
            return unit_DHW
        return resize_trilinear(unit_DHW, self.size_dhw)
