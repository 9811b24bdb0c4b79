"""What ITK says about an image file, its world turned to ours; ITK itself runs in :mod:`mg3d.scans.itk_process`.

ITK's world axes are left-posterior-superior; a :class:`~mg3d.scans.raw_volume.RawVolume` uses right-anterior-superior.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mg3d.errors import DataError
from mg3d.scans import itk_process

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True)
class ImageInformation:
    """Header of an image file.

    Attributes:
        size: voxels along the stored axes, X first.
        spacing: voxel size along them.
        origin: place of the first voxel, LPS.
        direction: matrix of the axes in the LPS world, row by row.
        dtype: number type of a voxel, native byte order.
    """

    size: tuple[int, ...]
    spacing: tuple[float, ...]
    origin: tuple[float, ...]
    direction: tuple[float, ...]
    dtype: np.dtype[Any]


def read_information(path: Path, image_io: str) -> ImageInformation:
    """Read the header of a file, no pixels.

    Args:
        path: the file.
        image_io: name of the ITK reader that must accept it.

    Raises:
        DataError: the reader refuses the header, or a voxel holds several numbers (colour, vectors) or none that is
            real.
    """
    about, _ = itk_process.ask("information", str(path), image_io=image_io)
    return _information(about, path)


def read_image(path: Path, memory_bytes: int) -> tuple[np.ndarray, ImageInformation]:
    """Read an image in any format of ITK.

    Args:
        path: the file.
        memory_bytes: memory that reading it may take.

    Returns:
        the voxels [z, y, x] and the header.

    Raises:
        DataError: as :func:`read_information`.
    """
    about, voxels = itk_process.ask("image", str(path), memory_bytes=memory_bytes)
    header = _information(about, path)
    return np.empty((0,), header.dtype) if voxels is None else voxels, header


def _information(about: dict[str, Any], path: Path) -> ImageInformation:
    if about["components"] != 1 or about["dtype"] is None:
        raise DataError(
            f"voxel type {about['kind']} is not a real number", "store one number per voxel", path=str(path)
        )
    size, spacing, origin, direction = (tuple(about[name]) for name in ("size", "spacing", "origin", "direction"))
    return ImageInformation(size, spacing, origin, direction, np.dtype(about["dtype"]))


def ras_affine(direction: np.ndarray, spacing_mm: Sequence[float], origin_mm: Sequence[float]) -> np.ndarray:
    """Build the voxel-to-world matrix from ITK's parts.

    Args:
        direction: 3 x 3, one column per stored axis, in the LPS world.
        spacing_mm: voxel size along X, Y, Z.
        origin_mm: place of the first voxel, LPS.

    Returns:
        4 x 4 affine in the RAS world.
    """
    affine = np.eye(4)
    affine[:3, :3] = np.asarray(direction, dtype=np.float64) * np.asarray(spacing_mm, dtype=np.float64)
    affine[:3, 3] = origin_mm
    return LPS_TO_RAS @ affine
