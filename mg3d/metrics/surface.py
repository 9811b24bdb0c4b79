"""Distances between the surfaces of two masks, after two definitions that tools in use do not share.

``deepmind`` (the surface-distance package of DeepMind, and the surface Dice of COVID-19-20 and MSD): a surface element
sits at each corner where eight voxels meet that are not all equal. Its area is that of the marching-cubes triangles
inside the cell of the eight voxel centres, with the voxel sizes applied. Everything is weighted by area.

``monai`` (MONAI 1.6 with its default ``use_subvoxels=False``): a surface element is a voxel of the mask with a face
neighbour outside it, or outside the image. Every element counts the same.

The two disagree clearly on small structures: say which one a figure was made with. That package itself cannot be used:
its only release needs NumPy 1. Distances are exact: nearest elements come from a k-d tree over surface elements alone,
so the cost grows with the surface and not with the volume (with very much surface, from a distance transform), and they
are then measured from whole voxel steps, so that 0.7 mm is 0.7 mm wherever it occurs and a tolerance of it includes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import permutations, product

import numpy as np
from scipy import ndimage
from scipy.spatial import KDTree

DEFINITIONS = ("deepmind", "monai")
DENSE_SHARE = 0.1  # of the box: with more surface than this (noise) a distance transform of the box is cheaper

# The patches inside a cell, one line per way of setting its corners that is not another one turned, mirrored or
# inverted. Corner (i, j, k) of the cell has bit 7 - 4i - 2j - k. A triangle is given by eight times the components of
# its area vector for unit voxels; area vectors are enough, since voxel sizes scale their components.
_PATCHES_TIMES_8: dict[int, tuple[tuple[int, int, int], ...]] = {
    0b00000001: ((1, 1, 1),),
    0b00000011: ((2, 2, 0), (2, 2, 0)),
    0b00000110: ((1, 1, 1), (1, 1, 1)),
    0b00000111: ((4, 0, 0), (1, 1, 1), (2, 2, 2)),
    0b00001111: ((4, 0, 0), (4, 0, 0)),
    0b00010110: ((1, 1, 1), (1, 1, 1), (1, 1, 1)),
    0b00010111: ((1, 1, 1), (1, 1, 1), (2, 2, 2), (2, 2, 2)),
    0b00011000: ((1, 1, 1), (1, 1, 1)),
    0b00011001: ((0, 2, 2), (0, 2, 2), (1, 1, 1)),
    0b00011011: ((0, 2, 2), (2, 0, 2), (1, 1, 1), (3, 3, 3)),
    0b00011110: ((4, 0, 0), (1, 1, 1), (1, 1, 1), (2, 2, 2)),
    0b00111100: ((2, 2, 0), (2, 2, 0), (2, 2, 0), (2, 2, 0)),
    0b01101001: ((1, 1, 1), (1, 1, 1), (1, 1, 1), (1, 1, 1)),
}


def _placements(code: int) -> Iterator[tuple[int, tuple[int, ...]]]:
    """The code in all 48 positions of the cube, each with the axis that every axis came from."""
    corners = [corner for corner in product((0, 1), repeat=3) if code >> (7 - _weight(corner)) & 1]
    for axes, flips in product(permutations(range(3)), product((0, 1), repeat=3)):
        moved = [tuple(corner[axis] ^ flip for axis, flip in zip(axes, flips, strict=True)) for corner in corners]
        yield sum(1 << (7 - _weight(corner)) for corner in moved), axes


def _weight(corner: Sequence[int]) -> int:
    return 4 * corner[0] + 2 * corner[1] + corner[2]


@cache
def _area_vectors() -> np.ndarray:
    """Area vectors [256, 4, 3] of the triangles of every code, for unit voxels, up to the signs of components."""
    table = np.zeros((256, 4, 3))
    for code, patches in _PATCHES_TIMES_8.items():
        for placed, axes in _placements(code):
            vectors = np.array(patches)[:, axes] / 8.0
            table[placed, : len(vectors)] = table[255 - placed, : len(vectors)] = vectors
    return table


def surface_element_areas(spacing_mm: Sequence[float]) -> np.ndarray:
    """Area of the surface inside a cell of eight voxel centres, for each of the 256 ways to set its corners.

    Args:
        spacing_mm: voxel size along the three array axes.

    Returns:
        float64 [256] in mm2; corner (i, j, k) has bit 7 - 4i - 2j - k of the index. 0 for 0 and 255.
    """
    first, second, third = (float(size) for size in spacing_mm)
    faces = np.array([second * third, first * third, first * second])
    return np.linalg.norm(_area_vectors() * faces, axis=-1).sum(axis=1)


@dataclass(frozen=True)
class SurfaceDistances:
    """Distances of all surface elements of two masks to the other mask's surface.

    Attributes:
        truth_mm: [n] distance of each element of the truth; infinite when the other mask is empty.
        truth_weight: [n] its area in mm2 (``deepmind``) or 1 (``monai``).
        pred_mm: [m] distance of each element of the prediction.
        pred_weight: [m] its weight.
        definition: ``deepmind`` or ``monai``.
    """

    truth_mm: np.ndarray
    truth_weight: np.ndarray
    pred_mm: np.ndarray
    pred_weight: np.ndarray
    definition: str = "deepmind"

    def hausdorff(self, percent: float = 95.0) -> float:
        """Larger of the two directed percentiles of the surface distances, in mm.

        ``deepmind``: smallest distance within which the given share of the area lies; infinite when a mask is empty.
        ``monai``: percentile of the elements with linear interpolation; NaN (100 %: infinite) when one mask is empty.

        Args:
            percent: 0 to 100; 100 is the Hausdorff distance.
        """
        directed = (self.truth_mm, self.truth_weight), (self.pred_mm, self.pred_weight)
        if self.definition == "deepmind":
            return max(_area_percentile(distances, weight, percent) for distances, weight in directed)
        values = [_element_percentile(distances, percent) for distances, _ in directed if len(distances)]
        return float(max(values, key=lambda value: (np.isnan(value), value))) if values else float("nan")

    def average(self) -> tuple[float, float]:
        """Weighted mean distance from the truth to the prediction and back, in mm; NaN for an empty surface."""
        return (
            _weighted_mean(self.truth_mm, self.truth_weight),
            _weighted_mean(self.pred_mm, self.pred_weight),
        )

    def assd(self) -> float:
        """Average symmetric surface distance in mm: the weighted mean over the elements of both surfaces together.

        NaN when both masks are empty, infinite when one of them is.
        """
        distances = np.concatenate([self.truth_mm, self.pred_mm])
        return _weighted_mean(distances, np.concatenate([self.truth_weight, self.pred_weight]))

    def surface_dice(self, tolerance_mm: float) -> float:
        """Normalised surface Dice: weight within the tolerance of the other surface, over all weight of both.

        Args:
            tolerance_mm: distances up to and including this one count as agreement.

        Returns:
            value in [0, 1]; NaN when both masks are empty, 0 when one of them is.
        """
        close = self.truth_weight[self.truth_mm <= tolerance_mm].sum()
        close += self.pred_weight[self.pred_mm <= tolerance_mm].sum()
        total = self.truth_weight.sum() + self.pred_weight.sum()
        return float(close / total) if total > 0 else float("nan")


def surface_distances(
    truth: np.ndarray, pred: np.ndarray, spacing_mm: Sequence[float], definition: str = "deepmind"
) -> SurfaceDistances:
    """Measure how far the surfaces of two masks are from each other.

    Args:
        truth: bool [X,Y,Z]; any axis order that ``spacing_mm`` shares.
        pred: bool of the same shape.
        spacing_mm: voxel size along the three array axes.
        definition: ``deepmind`` or ``monai``, see the head of this file.

    Returns:
        the distances of both surfaces.

    Raises:
        ValueError: unknown definition, shapes that differ or are not three-dimensional, or sizes that are no sizes.
    """
    if definition not in DEFINITIONS:
        raise ValueError(f"definition must be one of {', '.join(DEFINITIONS)}, got {definition!r}")
    if truth.shape != pred.shape or truth.ndim != 3:
        raise ValueError(f"two three-dimensional masks of one shape are needed, got {truth.shape} and {pred.shape}")
    if len(spacing_mm) != 3 or not all(np.isfinite(size) and size > 0 for size in spacing_mm):
        raise ValueError(f"spacing_mm needs three positive numbers, got {tuple(spacing_mm)}")
    areas = surface_element_areas(spacing_mm) if definition == "deepmind" else None
    masks = _cropped(truth, pred)
    (truth_at, truth_weight), (pred_at, pred_weight) = (_elements(mask, areas) for mask in masks)
    return SurfaceDistances(
        _nearest_mm(truth_at, pred_at, masks[0].shape, spacing_mm),
        truth_weight,
        _nearest_mm(pred_at, truth_at, masks[0].shape, spacing_mm),
        pred_weight,
        definition,
    )


def _cropped(truth: np.ndarray, pred: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both masks as bool inside the box that holds them, with one empty voxel around it."""
    box = ndimage.find_objects(np.logical_or(truth, pred).view(np.uint8), max_label=1)
    inside = box[0] or (slice(0, 0),) * 3
    return np.pad(truth[inside].astype(bool), 1), np.pad(pred[inside].astype(bool), 1)


def _elements(mask: np.ndarray, areas: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Whole-numbered places [n, 3] of the surface elements and their weights [n]."""
    if areas is None:
        places = np.argwhere(mask & ~ndimage.binary_erosion(mask))
        return places, np.ones(len(places))
    codes = _corner_codes(mask)
    flat = np.flatnonzero((codes != 0) & (codes != 255))
    return np.stack(np.unravel_index(flat, codes.shape), axis=1), areas[codes.ravel()[flat]]


def _corner_codes(mask: np.ndarray) -> np.ndarray:
    """Codes [X-1,Y-1,Z-1] of the cells between voxel centres; each pass doubles the bits along one axis."""
    bits: np.ndarray = mask.astype(np.uint8)
    bits = bits[:, :, :-1] << 1 | bits[:, :, 1:]
    bits = bits[:, :-1] << 2 | bits[:, 1:]
    return np.asarray(bits[:-1] << 4 | bits[1:])


def _nearest_mm(
    source: np.ndarray, target: np.ndarray, shape: tuple[int, ...], spacing_mm: Sequence[float]
) -> np.ndarray:
    """Distance [n] of each source place to the nearest of the target places, all inside the shape."""
    if not len(source) or not len(target):
        return np.full(len(source), np.inf)
    occupied = np.zeros(shape, dtype=bool)
    occupied[tuple(target.T)] = True
    away = np.flatnonzero(~occupied[tuple(source.T)])
    sizes, moved = np.asarray(spacing_mm, dtype=np.float64), source[away]
    if len(moved) + len(target) > DENSE_SHARE * occupied.size:
        nearest_all = ndimage.distance_transform_edt(~occupied, sizes, return_distances=False, return_indices=True)
        nearest = nearest_all[(slice(None), *moved.T)].T
    else:
        nearest = target[KDTree(target * sizes, leafsize=32).query(moved * sizes)[1]]
    distances = np.zeros(len(source))
    distances[away] = np.sqrt((((moved - nearest) * sizes) ** 2).sum(axis=1))
    return distances


def _area_percentile(distances: np.ndarray, area: np.ndarray, percent: float) -> float:
    if not len(distances):
        return float("inf")
    order = np.argsort(distances)
    reached = np.cumsum(area[order]) / area.sum()
    place = int(np.searchsorted(reached, percent / 100.0))
    return float(distances[order][min(place, len(distances) - 1)])


def _element_percentile(distances: np.ndarray, percent: float) -> float:
    if not np.isfinite(distances).all():
        return float("inf") if percent >= 100.0 else float("nan")
    return float(np.percentile(distances, percent))


def _weighted_mean(distances: np.ndarray, weight: np.ndarray) -> float:
    return float((distances * weight).sum() / weight.sum()) if len(distances) else float("nan")
