"""Overlapping crops that cover a whole grid.

D, H, W volume axes; V crops.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from mg3d.errors import DataError

MIN_OVERLAP = 0.25
"""Least part of its length that a crop shares with the next one."""

MAX_CROPS = 512

Triple = tuple[int, int, int]


def crop_starts(shape: Sequence[int], size: Sequence[int], overlap: float = MIN_OVERLAP) -> list[Triple]:
    """First voxels of evenly spread crops of one size that cover a grid.

    Args:
        shape: voxels of the grid (D, H, W), at least ``size``.
        size: voxels of a crop (D, H, W).
        overlap: least part of its length that a crop shares with its neighbour, in [0, 1).

    Returns:
        V starts (D, H, W), the last axis fastest; the first crop begins at 0, the last ends at the border.

    Raises:
        DataError: more than 512 crops would be needed.
        ValueError: a grid smaller than the crop, or an overlap out of range.
    """
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap must be in [0, 1), got {overlap}")
    if any(have < want for have, want in zip(shape, size, strict=True)):
        raise ValueError(f"a grid of {tuple(shape)} holds no crop of {tuple(size)}")
    axes = []
    for have, want in zip(shape, size, strict=True):
        step = max(want * (1 - overlap), 1)
        count = math.ceil((have - want) / step) + 1
        axes.append([int(start) for start in np.rint(np.linspace(0, have - want, count))])
    total = math.prod(len(starts) for starts in axes)
    if total > MAX_CROPS:
        raise DataError(
            f"{total} crops of {tuple(size)} would be needed for a grid of {tuple(shape)}",
            f"choose a coarser crop spacing or less overlap (at most {MAX_CROPS} crops)",
        )
    return [(d, h, w) for d, h, w in itertools.product(*axes)]


def pad_to(grid_DHW: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Add zeros (air) evenly on both sides of every axis that is shorter than ``size``."""
    lacking = [max(want - have, 0) for have, want in zip(grid_DHW.shape, size, strict=True)]
    if not any(lacking):
        return grid_DHW
    return np.pad(grid_DHW, [(lack // 2, lack - lack // 2) for lack in lacking])
