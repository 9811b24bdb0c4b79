"""One rule for label maps, for checks, training and scoring: whole numbers on the grid of their image.

Another order or direction of the stored axes is undone, which is exact; trailing axes of length one are dropped when a
file is read; decimals within 0.001 of a whole number are rounded. Everything else is refused, nothing is resampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation, ornt_transform

from mg3d.errors import DataError
from mg3d.scans.raw_volume import RawVolume

__all__ = ["MAX_SHIFT_VOXELS", "grid_affine", "largest_shift_mm", "on_axes_of", "turned_grid", "whole_labels"]

MAX_SHIFT_VOXELS = 0.1
ROUNDING = 1e-3
_SAME = np.array([[0, 1], [1, 1], [2, 1]])


def whole_labels(raw: RawVolume, path: Path, case_id: str = "") -> np.ndarray:
    """The labels of a stored volume, scaled as its header says.

    Args:
        raw: as read.
        path: the file, for messages.
        case_id: the sample, for messages.

    Returns:
        integers [X,Y,Z] as stored.

    Raises:
        DataError: values that are not finite, or further than 0.001 from a whole number; names their count and one.
    """
    values = raw.voxels_xyz
    if (raw.slope, raw.intercept) != (1.0, 0.0):
        values = values * raw.slope + raw.intercept
    if values.dtype.kind != "f":
        return values
    rounded = np.rint(values)
    wrong = ~(np.abs(values - rounded) <= ROUNDING) | (np.abs(rounded) > np.iinfo(np.int32).max)
    if wrong.any():
        what = f"{np.count_nonzero(wrong)} voxels hold no whole number, such as {values[wrong][0]:g}"
        remedy = "is it a label map? threshold or round it first"
        raise DataError(what, remedy, case_id=case_id, path=str(path))
    return rounded.astype(np.int32)


def grid_affine(raw: RawVolume) -> np.ndarray:
    """Voxel-to-world matrix [4,4] in millimetres, also where the header says nothing about directions."""
    if raw.oriented or raw.spacing_mm is None:
        return raw.affine
    return np.asarray(raw.affine @ np.diag([*raw.spacing_mm, 1.0]))  # it has unit voxels then


def turned_grid(
    shape: Sequence[int], affine: np.ndarray, other: np.ndarray
) -> tuple[tuple[int, ...], np.ndarray, np.ndarray]:
    """A grid with its axes in the order and direction of another one.

    Args:
        shape: voxels along the three axes.
        affine: its voxel-to-world matrix.
        other: matrix of the grid whose axes are wanted.

    Returns:
        shape and matrix afterwards, and the change as nibabel writes it.
    """
    change = ornt_transform(io_orientation(affine), io_orientation(other))
    if np.array_equal(change, _SAME):
        return tuple(shape), affine, change
    order = np.argsort(change[:, 0])
    return tuple(int(shape[axis]) for axis in order), affine @ inv_ornt_aff(change, tuple(shape)), change


def on_axes_of(labels_xyz: np.ndarray, affine: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Labels and matrix with the axes in the order and direction of another grid; see :func:`turned_grid`."""
    _, turned, change = turned_grid(labels_xyz.shape, affine, other)
    return labels_xyz if np.array_equal(change, _SAME) else apply_orientation(labels_xyz, change), turned


def largest_shift_mm(affine: np.ndarray, other: np.ndarray, shape: Sequence[int]) -> float:
    """Largest distance between the places that two grids of one shape give to a corner voxel."""
    corners = np.array(np.meshgrid(*[(0, size - 1) for size in shape], indexing="ij")).reshape(3, -1)
    one, two = (matrix[:3, :3] @ corners + matrix[:3, 3:] for matrix in (affine, other))
    return float(np.linalg.norm(one - two, axis=0).max())
