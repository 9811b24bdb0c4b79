"""Which cells of a volume the masked-image objective hides, drawn per sample."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def cell_grid(size_dhw: Sequence[int], window: int) -> tuple[int, int, int]:
    """Return the number of cells per axis (d, h, w) for cubic cells of ``window`` voxels; the last may be cut.

    Raises:
        ValueError: a size or the window is below 1.
    """
    if window < 1 or min(size_dhw) < 1:
        raise ValueError(f"expected positive sizes and a positive mim_window, got {tuple(size_dhw)} and {window}")
    depth, height, width = (-(-size // window) for size in size_dhw)
    return depth, height, width


def random_cells(seed: int, grid_dhw: Sequence[int], ratio: float) -> np.ndarray:
    """Return a bool grid ``[d, h, w]``, True = hidden, with ``round(cells * ratio)`` hidden cells.

    Args:
        seed: seed of this sample.
        grid_dhw: cells per axis.
        ratio: hidden part, in [0, 1].

    Raises:
        ValueError: the ratio is out of range.
    """
    if not 0.0 <= ratio <= 1.0:
        raise ValueError(f"mim_mask_ratio must be in [0, 1], got {ratio}")
    cells = int(np.prod(grid_dhw))
    hidden = np.zeros(cells, dtype=bool)
    hidden[np.random.default_rng(seed).permutation(cells)[: round(cells * ratio)]] = True
    return hidden.reshape(tuple(grid_dhw))
