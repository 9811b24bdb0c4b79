"""Which cells of a volume the masked-image objective hides: the grid of cells and the two ways to draw them.

Shape suffixes: D/H/W voxel axes, d/h/w cell axes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np


def cell_grid(size_dhw: Sequence[int], window: int) -> tuple[int, int, int]:
    """Return the number of cells per axis (d, h, w) for cubic cells of ``window`` voxels; the last may be cut.

    Raises:
        ValueError: not three sizes, or a size or the window is below 1.
    """
    if len(size_dhw) != 3 or min(size_dhw) < 1 or window < 1:
        raise ValueError(f"expected three positive sizes and a positive mim_window, got {tuple(size_dhw)} and {window}")
    depth, height, width = (-(-size // window) for size in size_dhw)
    return depth, height, width


def random_cells(seed: int, grid_dhw: Sequence[int], ratio: float) -> np.ndarray:
    """Draw the hidden cells of one sample, all sets of that many cells being equally likely.

    Args:
        seed: seed of this sample, so that its mask depends neither on the batch nor on the worker.
        grid_dhw: cells per axis.
        ratio: hidden part, in [0, 1]; rounded to whole cells.

    Returns:
        bool ``[d, h, w]``, True = hidden.

    Raises:
        ValueError: the ratio is out of range.
    """
    return _chosen(grid_dhw, ratio, np.random.default_rng(seed).permutation)


def reference_cells(grid_dhw: Sequence[int], ratio: float, rng: np.random.RandomState | None = None) -> np.ndarray:
    """Published draw: ``round(cells * ratio)`` cells chosen without replacement stay, the others are hidden.

    Args:
        grid_dhw: cells per axis.
        ratio: part that stays, in [0, 1] (as published, although the name says masked).
        rng: legacy numpy generator; None uses numpy's global one, as the published code does.

    Returns:
        bool ``[d, h, w]``, True = hidden.

    Raises:
        ValueError: the ratio is out of range.
    """
    # The legacy generators' choice without replacement is the head of their permutation.
    return ~_chosen(grid_dhw, ratio, np.random.permutation if rng is None else rng.permutation)


def _chosen(grid_dhw: Sequence[int], ratio: float, permutation: Callable[[int], np.ndarray]) -> np.ndarray:
    if not 0.0 <= ratio <= 1.0:
        raise ValueError(f"mim_mask_ratio must be in [0, 1], got {ratio}")
    cells = int(np.prod(grid_dhw))
    chosen = np.zeros(cells, dtype=bool)
    chosen[permutation(cells)[: round(cells * ratio)]] = True
    return chosen.reshape(tuple(grid_dhw))
