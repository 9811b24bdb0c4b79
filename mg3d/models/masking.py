"""Cell masks of masked image modelling applied to volumes: cells to voxels, voxels to zero.

Shape suffixes: B batch, D/H/W voxel axes, d/h/w cell axes.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mg3d.mim_cells import cell_grid

DEFAULT_WINDOW = 16
"""Edge of a cell in voxels."""


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
