"""Read a label map of any format and hold it against the grid of another one; nothing is ever resampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from mg3d.errors import DataError
from mg3d.scans.itk_image import ras_affine, read_image
from mg3d.scans.label_maps import MAX_SHIFT_VOXELS, grid_affine, largest_shift_mm, on_axes_of, whole_labels
from mg3d.scans.raw_volume import RawVolume, shortest_decimals
from mg3d.scans.read import SCAN_SUFFIXES, read_scan

MEMORY_OF_OTHERS = 4 << 30
OTHER_SUFFIXES = (".mgz", ".mgh", ".img", ".hdr", ".gipl", ".vtk", ".tif", ".tiff")
RESAMPLE = "resample one onto the grid of the other first (nearest neighbour), knowing what that changes"


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
        DataError: unreadable, not three-dimensional, without voxel size, or further than 0.001 from whole numbers.
    """
    if not path.exists():
        raise DataError("no such file", "check the path", path=str(path))
    if not (path.is_file() or path.is_dir()):
        raise DataError("neither a file nor a folder", "give a label map", path=str(path))
    known = path.is_dir() or path.name.lower().endswith(SCAN_SUFFIXES)
    raw = read_scan(path) if known else _read_elsewhere(path)
    if raw.spacing_mm is None:
        raise DataError("it names no voxel size, so distances are unknown", "save it with spacing", path=str(path))
    return LabelMap(_labels(raw, path), grid_affine(raw), raw.spacing_mm, path)


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
    labels, affine = on_axes_of(pred.labels_xyz, pred.affine, truth.affine)
    first, second, third = np.linalg.norm(affine[:3, :3], axis=0)
    turned = LabelMap(labels, affine, (float(first), float(second), float(third)), pred.path)
    if turned.labels_xyz.shape != truth.labels_xyz.shape:
        shapes = f"shape {pred.labels_xyz.shape} does not fit {truth.labels_xyz.shape} of {truth.path}"
        raise DataError(shapes, RESAMPLE, path=str(pred.path))
    shift = largest_shift_mm(affine, truth.affine, labels.shape)
    if shift > MAX_SHIFT_VOXELS * min(truth.spacing_mm):
        grids = f"{_grid(pred)} against {_grid(truth)} of {truth.path}"
        raise DataError(f"the grids differ by up to {shift:.3g} mm: {grids}", RESAMPLE, path=str(pred.path))
    return turned


def _grid(label_map: LabelMap) -> str:
    spacing = " x ".join(f"{size:g}" for size in label_map.spacing_mm)
    origin = ", ".join(f"{value:.2f}" for value in label_map.affine[:3, 3])
    return f"{spacing} mm, axes {''.join(nib.aff2axcodes(label_map.affine))}, first voxel at ({origin})"


def _labels(raw: RawVolume, path: Path) -> np.ndarray:
    values = whole_labels(raw, path)
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
