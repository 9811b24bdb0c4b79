"""Cubes of a scan round places in world millimetres, at the scan's own voxel size, as 8-bit grey."""

from __future__ import annotations

import numpy as np

from mg3d.datasets.fitting import clamped_start, cut_block
from mg3d.errors import DataError
from mg3d.scans.geometry import RAS_TO_LPS, canonical_with_affine
from mg3d.scans.raw_volume import RawVolume

__all__ = ["cubes_at", "cut_cube", "to_grey"]


def cubes_at(
    raw: RawVolume, world_mm: np.ndarray, edge: int, window_hu: tuple[float, float], published: bool = False
) -> np.ndarray:
    """Cut a cube round every place.

    Args:
        raw: the scan, in HU.
        world_mm: [n, 3] places x, y, z in left-posterior-superior millimetres.
        edge: voxels along each side.
        window_hu: values that become 0 and 255.
        published: scale by the scan's own extremes inside the window, and ignore the header's directions, as the
            published code does.

    Returns:
        uint8 [n, edge, edge, edge], axes (z, y, x); canonical order unless ``published``.

    Raises:
        DataError: a place lies more than half a cube outside the scan: it belongs to another one.
    """
    voxels, places = (_as_stored if published else _canonical)(raw, np.asarray(world_mm, dtype=np.float64))
    outside = np.maximum(-places, places - np.asarray(voxels.shape) + 1).max(axis=1)
    if outside.max() > edge // 2:
        worst = int(outside.argmax())
        message = f"place {worst} at {np.asarray(world_mm)[worst].tolist()} mm lies {outside[worst]} voxels outside"
        raise DataError(message, "download the scan and the table of places again", path=raw.path)
    grey = to_grey(voxels, window_hu, extremes=published)
    return np.stack([cut_cube(grey, place, edge) for place in places])


def to_grey(hu: np.ndarray, window_hu: tuple[float, float], extremes: bool = False) -> np.ndarray:
    """HU to uint8.

    Args:
        hu: any shape.
        window_hu: values that become 0 and 255.
        extremes: scale by what occurs inside the window instead, so that equal HU differ between scans.
    """
    low, high = window_hu
    clipped = np.clip(hu.astype(np.float32), low, high)
    if extremes:
        low = float(clipped.min())
        high = max(float(clipped.max()), low + 1)
    return np.rint((clipped - low) * (255.0 / (high - low))).astype(np.uint8)


def cut_cube(grey: np.ndarray, centre: np.ndarray, edge: int) -> np.ndarray:
    """Cube round a voxel (z, y, x), moved inside the scan; a scan thinner than the cube is filled with 0."""
    starts = [clamped_start(int(place), length, edge) for place, length in zip(centre, grey.shape, strict=True)]
    return cut_block(grey, starts, (edge,) * 3, 0)


def _canonical(raw: RawVolume, world_mm: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Voxels [D,H,W] in canonical order, and the places as indices (z, y, x)."""
    voxels, affine = canonical_with_affine(raw.voxels_xyz, raw.affine)
    index = np.linalg.solve(affine[:3, :3], (world_mm - affine[:3, 3]).T).T
    return voxels, np.rint(index).astype(np.int64)[:, ::-1]


def _as_stored(raw: RawVolume, world_mm: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    origin = (RAS_TO_LPS @ raw.affine)[:3, 3]
    index = np.rint((world_mm - origin) / np.linalg.norm(raw.affine[:3, :3], axis=0))
    return raw.voxels_xyz.transpose(2, 1, 0), index.astype(np.int64)[:, ::-1]
