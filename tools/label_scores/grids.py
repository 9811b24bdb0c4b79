"""Read a label map of any format and hold it against the grid of another one; nothing is ever resampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.orientations import io_orientation, ornt_transform

from mg3d.errors import DataError
from mg3d.scans.itk_image import ras_affine, read_image
from mg3d.scans.raw_volume import RawVolume, shortest_decimals
from mg3d.scans.read import SCAN_SUFFIXES, read_scan

MAX_SHIFT_OF_VOXEL = 0.01
MEMORY_OF_OTHERS = 4 << 30
OTHER_SUFFIXES = (".mgz", ".mgh", ".img", ".hdr", ".gipl", ".vtk", ".tif", ".tiff")
RESAMPLE = "resample one onto the grid of the other first (nearest neighbour), knowing what that changes"
ROUND = "label maps hold whole numbers: threshold or round it first"


@dataclass(frozen=True)
class LabelMap:
    """Whole numbers on a grid.

    Attributes:
        labels_xyz: integer [X,Y,Z] as stored.
        affine: voxel to world millimetres, right-anterior-superior.
        spacing_mm: voxel size along X, Y, Z.
        path: the file.
    """

    labels_xyz: np.ndarray
    affine: np.ndarray
    spacing_mm: tuple[float, float, float]
    path: Path


def read_label_map(path: Path) -> LabelMap:
    """Read a label map as stored.

    Args:
        path: any scan format of the project, or what nibabel or SimpleITK open.

    Returns:
        the map with its grid.

    Raises:
        DataError: unreadable, not three-dimensional, without voxel size, or not whole numbers.
    """
    if not path.exists():
        raise DataError("no such file", "check the path", path=str(path))
    if not (path.is_file() or path.is_dir()):
        raise DataError("neither a file nor a folder", "give a label map", path=str(path))
    known = path.is_dir() or path.name.lower().endswith(SCAN_SUFFIXES)
    raw = read_scan(path) if known else _read_elsewhere(path)
    if raw.spacing_mm is None:
        raise DataError("it names no voxel size, so distances are unknown", "save it with spacing", path=str(path))
    affine = raw.affine
    if not raw.oriented:
        affine = affine @ np.diag([*raw.spacing_mm, 1.0])
    return LabelMap(_whole(raw, path), affine, raw.spacing_mm, path)


def on_grid_of(pred: LabelMap, truth: LabelMap) -> LabelMap:
    """Check that two maps lie on one grid; another order or direction of the axes is undone, which is exact.

    Args:
        pred: the map to bring into the other's axis order.
        truth: the map whose axes are kept.

    Returns:
        the prediction, voxel for voxel beside the truth.

    Raises:
        DataError: other shape, voxel size, place or direction.
    """
    turned = _with_axes_of(pred, truth)
    if turned.labels_xyz.shape != truth.labels_xyz.shape:
        shapes = f"shape {pred.labels_xyz.shape} does not fit {truth.labels_xyz.shape} of {truth.path}"
        raise DataError(shapes, RESAMPLE, path=str(pred.path))
    shift = _largest_shift_mm(turned, truth)
    if shift > MAX_SHIFT_OF_VOXEL * min(truth.spacing_mm):
        grids = f"{_grid(pred)} against {_grid(truth)} of {truth.path}"
        raise DataError(f"the grids differ by up to {shift:.3g} mm: {grids}", RESAMPLE, path=str(pred.path))
    return turned


def _with_axes_of(pred: LabelMap, truth: LabelMap) -> LabelMap:
    change = ornt_transform(io_orientation(pred.affine), io_orientation(truth.affine))
    if np.array_equal(change, [[0, 1], [1, 1], [2, 1]]):
        return pred
    affine = pred.affine @ nib.orientations.inv_ornt_aff(change, pred.labels_xyz.shape)
    spacing = [0.0, 0.0, 0.0]
    for axis, (target, _) in enumerate(change):
        spacing[int(target)] = pred.spacing_mm[axis]
    turned = nib.apply_orientation(pred.labels_xyz, change)
    return LabelMap(turned, affine, (spacing[0], spacing[1], spacing[2]), pred.path)


def _largest_shift_mm(first: LabelMap, second: LabelMap) -> float:
    """Largest distance between the places that both grids give to a corner voxel."""
    ends = [(0, size - 1) for size in first.labels_xyz.shape]
    corners = np.array(np.meshgrid(*ends, indexing="ij")).reshape(3, -1)
    places = [grid.affine[:3, :3] @ corners + grid.affine[:3, 3:] for grid in (first, second)]
    return float(np.linalg.norm(places[0] - places[1], axis=0).max())


def _grid(label_map: LabelMap) -> str:
    spacing = " x ".join(f"{size:g}" for size in label_map.spacing_mm)
    origin = ", ".join(f"{value:.2f}" for value in label_map.affine[:3, 3])
    return f"{spacing} mm, axes {''.join(nib.aff2axcodes(label_map.affine))}, first voxel at ({origin})"


def _whole(raw: RawVolume, path: Path) -> np.ndarray:
    values = np.asarray(raw.voxels_xyz)
    if (raw.slope, raw.intercept) != (1.0, 0.0):
        values = values * raw.slope + raw.intercept
    if values.dtype.kind == "f":
        if not np.isfinite(values).all() or (values != np.rint(values)).any():
            raise DataError("it holds numbers that are not whole", ROUND, path=str(path))
        values = values.astype(np.int32)
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > np.iinfo(np.int32).max:
        raise DataError(f"labels must be 0 or more, it holds {low} to {high}", "is it an image?", path=str(path))
    return values.astype(values.dtype.newbyteorder("="), copy=False)


def _read_elsewhere(path: Path) -> RawVolume:
    """Formats beyond those of scans: first nibabel, then SimpleITK."""
    try:
        image: Any = nib.load(path)
        return _raw(np.asanyarray(image.dataobj), image.affine, image.header.get_zooms()[:3])
    except (nib.filebasedimages.ImageFileError, nib.spatialimages.HeaderDataError, OSError, ValueError) as problem:
        reason = problem
    try:
        voxels, header = read_image(path, MEMORY_OF_OTHERS)
        affine = ras_affine(np.reshape(header.direction, (3, 3)), header.spacing, header.origin)
    except (DataError, ValueError) as second:
        raise DataError(f"neither nibabel nor SimpleITK reads it ({reason})", "convert it", path=str(path)) from second
    return _raw(voxels.transpose(2, 1, 0), affine, header.spacing)


def _raw(voxels: np.ndarray, affine: np.ndarray, sizes: Sequence[float]) -> RawVolume:
    first, second, third = shortest_decimals(sizes)
    return RawVolume(voxels, np.asarray(affine, dtype=np.float64), (first, second, third), 1.0, 0.0, True)
