"""Cell masks of masked image modelling: which cubes of a volume are set to zero.

Shape suffixes: B batch, D/H/W voxel axes, d/h/w cell axes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

DEFAULT_WINDOW = 16
"""Edge of a cell in voxels."""


def cell_grid(size_dhw: Sequence[int], window: int = DEFAULT_WINDOW) -> tuple[int, int, int]:
    """Number of cells along D, H and W; a remainder makes one more, cut cell.

    Raises:
        ValueError: a size or the window is below 1.
    """
    if len(size_dhw) != 3 or min(size_dhw) < 1 or window < 1:
        raise ValueError(f"expected three positive sizes and a positive window, got {tuple(size_dhw)} and {window}")
    d, h, w = (-(-size // window) for size in size_dhw)
    return d, h, w


def random_cell_mask(
    size_dhw: Sequence[int],
    window: int = DEFAULT_WINDOW,
    ratio: float = 0.5,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw the cells of one sample to be zeroed, all sets of that many cells being equally likely.

    Args:
        size_dhw: voxels along D, H and W.
        window: cell edge in voxels.
        ratio: share of the cells to zero, in [0, 1]; rounded to whole cells.
        generator: source of randomness on the CPU; one per sample makes masks independent of batch and worker.

    Returns:
        bool ``[d, h, w]``, True where the cell is zeroed.

    Raises:
        ValueError: ratio outside [0, 1].
    """
    grid = cell_grid(size_dhw, window)
    cells = grid[0] * grid[1] * grid[2]
    mask = torch.zeros(cells, dtype=torch.bool)
    mask[torch.randperm(cells, generator=generator)[: round(cells * _checked(ratio))]] = True
    return mask.view(grid)


def reference_cell_mask(
    size_dhw: Sequence[int],
    window: int = DEFAULT_WINDOW,
    ratio: float = 0.5,
    rng: np.random.RandomState | None = None,
) -> Tensor:
    """Published draw: ``round(cells * ratio)`` cells chosen without replacement are kept, the others zeroed.

    Args:
        size_dhw: voxels along D, H and W.
        window: cell edge in voxels.
        ratio: share of the cells to keep (as published, although the name says masked).
        rng: legacy numpy generator; None uses numpy's global one, as the published code does.

    Returns:
        bool ``[d, h, w]``, True where the cell is zeroed.

    Raises:
        ValueError: ratio outside [0, 1].
    """
    grid = cell_grid(size_dhw, window)
    cells = grid[0] * grid[1] * grid[2]
    choice = np.random.choice if rng is None else rng.choice
    mask = torch.ones(cells, dtype=torch.bool)
    mask[torch.from_numpy(choice(cells, round(cells * _checked(ratio)), replace=False))] = False
    return mask.view(grid)


def cells_to_voxels(cells: Tensor, size_dhw: Sequence[int], window: int = DEFAULT_WINDOW) -> Tensor:
    """Blow a cell mask up to voxels.

    Args:
        cells: ``[..., d, h, w]``.
        size_dhw: voxels along D, H and W.
        window: cell edge in voxels.

    Returns:
        ``[..., D, H, W]`` of the same dtype.

    Raises:
        ValueError: the cells do not cover the volume.
    """
    if tuple(cells.shape[-3:]) != cell_grid(size_dhw, window):
        raise ValueError(
            f"mask of {tuple(cells.shape[-3:])} cells does not fit {tuple(size_dhw)} voxels in cells of {window}"
        )
    voxels = cells
    for axis in (-3, -2, -1):
        voxels = voxels.repeat_interleave(window, dim=axis)
    return voxels[..., : size_dhw[0], : size_dhw[1], : size_dhw[2]]


def apply_mask(vol_B1DHW: Tensor, cells: Tensor, window: int = DEFAULT_WINDOW) -> Tensor:
    """Zero the masked cells of a batch of volumes.

    Args:
        vol_B1DHW: volumes.
        cells: mask ``[B, d, h, w]``, or ``[d, h, w]`` for the whole batch; non-zero means zeroed.
        window: cell edge in voxels.

    Returns:
        Masked copy ``[B, 1, D, H, W]``.
    """
    voxels = cells_to_voxels(cells.to(vol_B1DHW.device) != 0, tuple(vol_B1DHW.shape[2:]), window)
    per_sample = voxels[:, None] if voxels.dim() == 4 else voxels
    return vol_B1DHW.masked_fill(per_sample, 0.0)


def _checked(ratio: float) -> float:
    if not 0.0 <= ratio <= 1.0:
        raise ValueError(f"mask ratio must lie in [0, 1], got {ratio}")
    return ratio
