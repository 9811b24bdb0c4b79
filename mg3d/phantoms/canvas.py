"""A volume to paint on, in patient millimetres, with soft edges so that thin things survive coarse voxels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Axes = tuple[np.ndarray, np.ndarray, np.ndarray]
Point = tuple[float, float, float]


@dataclass(frozen=True)
class Grid:
    """Sampling grid of a volume.

    Attributes:
        shape: voxels (D, H, W): z towards the head, y towards the back, x towards the patient's left.
        spacing_mm: voxel size (z, y, x) in mm.
    """

    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]

    def __post_init__(self) -> None:
        if min(self.shape) < 32:
            raise ValueError(f"a phantom needs at least 32 voxels an axis, got {self.shape}")
        if min(self.spacing_mm) <= 0:
            raise ValueError(f"voxel sizes must be positive, got {self.spacing_mm}")


@dataclass(frozen=True)
class Placement:
    """Where and how large the patient is.

    Attributes:
        shift_mm: centre of the chest relative to the centre of the grid, (z, y, x) in mm.
        scale: size relative to the standard patient, per axis (z, y, x).
    """

    shift_mm: Point
    scale: Point


class Canvas:
    """Hounsfield values being painted, with organ codes and one bit per finding.

    Args:
        grid: sampling grid.
        placement: position and size of the patient; all coordinates passed to the methods are those of the standard
            patient, (z, y, x) in mm from the centre of the chest.
        background: value of the empty canvas, HU.
    """

    def __init__(self, grid: Grid, placement: Placement, background: float = -1000.0) -> None:
        self.grid = grid
        self.hu = np.full(grid.shape, background, dtype=np.float32)
        self.organs = np.zeros(grid.shape, dtype=np.uint8)
        self.finding_bits = np.zeros(grid.shape, dtype=np.uint32)
        self.regions: dict[str, np.ndarray] = {}
        self.axes = tuple(
            ((np.arange(n, dtype=np.float32) - (n - 1) / 2) * step - shift) / scale
            for n, step, shift, scale in zip(
                grid.shape, grid.spacing_mm, placement.shift_mm, placement.scale, strict=True
            )
        )
        self.voxel_mm = float(np.mean(np.asarray(grid.spacing_mm) / np.asarray(placement.scale)))

    def window(self, low: Point, high: Point) -> tuple[tuple[slice, slice, slice], Axes]:
        """Slices and broadcastable coordinates z [d,1,1], y [1,h,1], x [1,1,w] of a box, with a margin of one voxel."""
        bounds = []
        for axis, start, stop in zip(self.axes, low, high, strict=True):
            first = int(np.searchsorted(axis, start - self.voxel_mm))
            last = int(np.searchsorted(axis, stop + self.voxel_mm))
            bounds.append(slice(first, max(last, first)))
        z, y, x = (axis[part] for axis, part in zip(self.axes, bounds, strict=True))
        return (bounds[0], bounds[1], bounds[2]), (z[:, None, None], y[None, :, None], x[None, None, :])

    def everywhere(self) -> Axes:
        """Broadcastable coordinates of the whole grid."""
        z, y, x = self.axes
        return z[:, None, None], y[None, :, None], x[None, None, :]

    def occupancy(self, distance_mm: np.ndarray) -> np.ndarray:
        """Share of each voxel that lies inside a surface, from the signed distance (negative inside)."""
        return np.clip(0.5 - distance_mm / self.voxel_mm, 0.0, 1.0)

    def blend(
        self, where: tuple[slice, slice, slice], share: np.ndarray, value: float | np.ndarray, organ: int = 0
    ) -> None:
        """Replace a share of each voxel by a value in HU; voxels at least half filled take the organ code."""
        part = self.hu[where]
        part += share * (value - part)
        if organ:
            self.organs[where][share >= 0.5] = organ

    def mark(self, where: tuple[slice, slice, slice], share: np.ndarray, bit: int) -> None:
        """Set the bit of a finding where it fills half a voxel or, if nowhere, where it fills most."""
        if share.size == 0 or float(share.max()) <= 0:
            return
        self.finding_bits[where][share >= min(0.5, float(share.max()))] |= np.uint32(1 << bit)

    def ellipsoid(self, centre: Point, radii: Point, value: float, organ: int = 0, bit: int | None = None) -> None:
        """Paint an ellipsoid with semi-axes in mm."""
        low, high = _box(centre, radii)
        where, axes = self.window(low, high)
        self._paint(where, self.occupancy(ellipsoid_distance(axes, centre, radii)), value, organ, bit)

    def capsule(
        self, start: Point, stop: Point, radius: float, value: float, organ: int = 0, bit: int | None = None
    ) -> None:
        """Paint a straight tube with round ends."""
        low = tuple(min(a, b) - radius for a, b in zip(start, stop, strict=True))
        high = tuple(max(a, b) + radius for a, b in zip(start, stop, strict=True))
        where, axes = self.window((low[0], low[1], low[2]), (high[0], high[1], high[2]))
        self._paint(where, self.occupancy(capsule_distance(axes, start, stop, radius)), value, organ, bit)

    def box(self, centre: Point, half: Point, value: float, organ: int = 0, bit: int | None = None) -> None:
        """Paint an axis-parallel box with half edge lengths in mm."""
        low, high = _box(centre, half)
        where, axes = self.window(low, high)
        sides = [np.abs(axis - c) - h for axis, c, h in zip(axes, centre, half, strict=True)]
        self._paint(where, self.occupancy(np.maximum(np.maximum(sides[0], sides[1]), sides[2])), value, organ, bit)

    def _paint(
        self, where: tuple[slice, slice, slice], share: np.ndarray, value: float, organ: int, bit: int | None
    ) -> None:
        self.blend(where, share, value, organ)
        if bit is not None:
            self.mark(where, share, bit)


def ellipsoid_distance(axes: Axes, centre: Point, radii: Point) -> np.ndarray:
    """Approximate signed distance in mm to an ellipsoid, exact for a sphere."""
    offsets = [axis - c for axis, c in zip(axes, centre, strict=True)]
    unit = np.sqrt(sum((offset / r) ** 2 for offset, r in zip(offsets, radii, strict=True)))
    slope = np.sqrt(sum((offset / r**2) ** 2 for offset, r in zip(offsets, radii, strict=True)))
    return unit * (unit - 1.0) / np.maximum(slope, 1e-6)


def capsule_distance(axes: Axes, start: Point, stop: Point, radius: float) -> np.ndarray:
    """Signed distance in mm to a tube with round ends."""
    direction = np.asarray(stop, dtype=np.float32) - np.asarray(start, dtype=np.float32)
    offsets = [axis - s for axis, s in zip(axes, start, strict=True)]
    along = sum(offset * d for offset, d in zip(offsets, direction, strict=True))
    along = np.clip(along / max(float(direction @ direction), 1e-6), 0.0, 1.0)
    squares: np.ndarray = sum((o - along * d) ** 2 for o, d in zip(offsets, direction, strict=True))
    return np.sqrt(squares) - radius


def smooth_noise(rng: np.random.Generator, shape: tuple[int, int, int], cells: int) -> np.ndarray:
    """Random field of unit variance at its nodes, linear between `cells` + 1 nodes per axis.

    Returns:
        float32 array of the given shape.
    """
    field = rng.standard_normal((cells + 1,) * 3).astype(np.float32)
    for axis, length in enumerate(shape):
        position = np.linspace(0, cells, length, dtype=np.float32)
        lower = np.minimum(position.astype(int), cells - 1)
        weight = (position - lower).reshape([-1 if a == axis else 1 for a in range(3)])
        field = np.take(field, lower, axis) * (1 - weight) + np.take(field, lower + 1, axis) * weight
    return field


def _box(centre: Point, half: Point) -> tuple[Point, Point]:
    low = (centre[0] - half[0], centre[1] - half[1], centre[2] - half[2])
    high = (centre[0] + half[0], centre[1] + half[1], centre[2] + half[2])
    return low, high
