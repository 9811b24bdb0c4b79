"""From the stored grid of an image to the one a network works on, and back: axis order, spacing, crop.

Both grids share their axes up to order and direction, whatever the obliquity, so every step is one linear map per axis
and nothing is lost beyond interpolation. Positions agree with MONAI's ``Orientation`` and ``Spacing`` (first voxels
coincide). Shape legend: C channels, X/Y/Z axes of the working grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

__all__ = ["WorkingGrid", "plan_grid"]

SAME_SPACING_MM = 1e-3
_BORDER = 0.5 + 1e-3  # a voxel reaches half its size beyond its centre
_SLAB = 24
_Triple = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class WorkingGrid:
    """Place of a working volume in the stored one.

    Working voxel i of axis k is stored position ``scale[k] * i + offset[k]`` along stored axis ``axes[k]``.

    Attributes:
        stored_shape: voxels of the stored array.
        stored_affine: its 4 x 4 voxel-to-world matrix, RAS millimetres.
        shape: voxels of the working array.
        axes: stored axis of each working axis.
        scale: stored voxels per working voxel, negative where the direction is turned round.
        offset: stored position of working voxel 0.
    """

    stored_shape: _Triple
    stored_affine: np.ndarray
    shape: _Triple
    axes: _Triple
    scale: tuple[float, float, float]
    offset: tuple[float, float, float]

    @property
    def affine(self) -> np.ndarray:
        """4 x 4 voxel-to-world matrix of the working array."""
        into_stored = np.zeros((4, 4))
        into_stored[3, 3] = 1.0
        for axis, stored in enumerate(self.axes):
            into_stored[stored, axis] = self.scale[axis]
            into_stored[stored, 3] = self.offset[axis]
        return self.stored_affine @ into_stored

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Voxel size of the working array along its axes."""
        return voxel_sizes(self.affine)

    @property
    def stored_spacing_mm(self) -> tuple[float, float, float]:
        """Voxel size of the stored array along its axes."""
        return voxel_sizes(self.stored_affine)

    def part(self, start: Sequence[int], shape: Sequence[int]) -> WorkingGrid:
        """The grid of a block of the working array that begins at ``start`` (may lie outside of it)."""
        offset = [o + s * first for o, s, first in zip(self.offset, self.scale, start, strict=True)]
        return replace(self, shape=_triple(shape), offset=(offset[0], offset[1], offset[2]))

    def resample(self, stored: np.ndarray, linear: bool) -> np.ndarray:
        """Bring a stored array onto the working grid; beyond the border its last voxel is repeated.

        Args:
            stored: array of ``stored_shape``.
            linear: interpolate (float arrays); else take the nearest voxel (labels).

        Returns:
            Array [X,Y,Z] of the same type, perhaps a view.
        """
        positions = [self.scale[k] * np.arange(self.shape[k]) + self.offset[k] for k in range(3)]
        return _resample(stored.transpose(self.axes), positions, linear)

    def labels_on_stored(self, values_CXYZ: np.ndarray) -> np.ndarray:
        """Label map on the stored grid: the class of the largest value, interpolated linearly class by class.

        The values, not their winners, are interpolated, which keeps borders smooth. A few planes at a time are in
        memory. What lies outside of the working grid is background, label 0.

        Args:
            values_CXYZ: probabilities of the classes on the working grid, background first.

        Returns:
            uint8 array of ``stored_shape``.
        """
        positions = [
            (np.arange(self.stored_shape[axis]) - self.offset[k]) / self.scale[k] for k, axis in enumerate(self.axes)
        ]
        inside = [(-_BORDER < at) & (at < size - 1 + _BORDER) for at, size in zip(positions, self.shape, strict=True)]
        labels = np.zeros([len(at) for at in positions], dtype=np.uint8)
        for first in range(0, labels.shape[2], _SLAB):
            slab = [*positions[:2], positions[2][first : first + _SLAB]]
            found = _resample(values_CXYZ, slab, linear=True).argmax(axis=0)
            labels[:, :, first : first + _SLAB] = found
        for axis, kept in enumerate(inside):
            if not kept.all():
                np.moveaxis(labels, axis, 0)[~kept] = 0
        return np.ascontiguousarray(labels.transpose(np.argsort(self.axes)))


def plan_grid(
    shape: Sequence[int], affine: np.ndarray, orientation: str, spacing_mm: Sequence[float] | None = None
) -> WorkingGrid:
    """Choose the working grid of an image: canonical axis order, then a spacing.

    Args:
        shape: stored voxels.
        affine: 4 x 4 voxel-to-world matrix, RAS millimetres.
        orientation: codes of the working axes, e.g. "RAS" or "LPS"; oblique axes count as the nearest ones.
        spacing_mm: voxel size of the working axes; None keeps the stored one, as does a difference below 0.001 mm.

    Returns:
        The grid; each axis has round((n - 1) * stored / wanted) + 1 voxels.
    """
    turn = ornt_transform(io_orientation(affine), axcodes2ornt(tuple(orientation)))
    axes = [int(np.flatnonzero(turn[:, 0] == axis)[0]) for axis in range(3)]
    stored = voxel_sizes(affine)
    new_shape, scale, offset = [], [], []
    for axis, source in enumerate(axes):
        size, sign = int(shape[source]), float(turn[source, 1])
        wanted = stored[source] if spacing_mm is None else float(spacing_mm[axis])
        step = 1.0 if abs(wanted - stored[source]) <= SAME_SPACING_MM else wanted / stored[source]
        new_shape.append(int(np.round((size - 1) / step + 1.0)))
        scale.append(sign * step)
        offset.append(0.0 if sign > 0 else size - 1.0)
    return WorkingGrid(
        _triple(shape),
        np.asarray(affine, dtype=np.float64),
        _triple(new_shape),
        _triple(axes),
        (scale[0], scale[1], scale[2]),
        (offset[0], offset[1], offset[2]),
    )


def voxel_sizes(affine: np.ndarray) -> tuple[float, float, float]:
    """Lengths in mm of the three columns of a voxel-to-world matrix."""
    x, y, z = np.linalg.norm(np.asarray(affine, dtype=np.float64)[:3, :3], axis=0)
    return float(x), float(y), float(z)


def _triple(values: Sequence[int]) -> _Triple:
    x, y, z = (int(value) for value in values)
    return x, y, z


def _resample(array: np.ndarray, positions: Sequence[np.ndarray], linear: bool) -> np.ndarray:
    """Read the last three axes of an array at the given positions; the axis that shrinks most goes first."""
    lead = array.ndim - 3
    for k in sorted(range(3), key=lambda axis: len(positions[axis]) / array.shape[lead + axis]):
        array = _along(array, lead + k, positions[k], linear)
    return array


def _along(array: np.ndarray, axis: int, positions: np.ndarray, linear: bool) -> np.ndarray:
    last = array.shape[axis] - 1
    inside = np.clip(positions, 0, last)
    nearest = np.rint(inside).astype(np.int64)
    if not linear or np.abs(inside - nearest).max() < 1e-6:
        return _pick(array, axis, nearest)
    lower = np.clip(np.floor(inside).astype(np.int64), 0, max(last - 1, 0))
    share = (inside - lower).astype(np.float32).reshape([-1 if k == axis else 1 for k in range(array.ndim)])
    near = np.take(array, lower, axis)
    far = np.take(array, np.minimum(lower + 1, last), axis)
    far -= near
    far *= share
    near += far
    return near


def _pick(array: np.ndarray, axis: int, index: np.ndarray) -> np.ndarray:
    """Take voxels along an axis; a view where they follow each other."""
    steps = set(np.diff(index).tolist())
    if steps <= {1} or steps == {-1}:
        first, last, step = int(index[0]), int(index[-1]), -1 if steps == {-1} else 1
        stop: int | None = last + step
        window = slice(first, None if stop is not None and stop < 0 else stop, step)
        return array[(slice(None),) * axis + (window,)]
    return np.take(array, index, axis)
