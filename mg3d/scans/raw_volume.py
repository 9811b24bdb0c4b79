"""What every file format is read into, and the checks that all formats share.

Shape legend: X, Y, Z are the stored array axes, whatever direction they point to.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mg3d.errors import DataError

MIN_VOXELS_PER_AXIS = 4
SPACING_RANGE_MM = (0.05, 20.0)
MAX_ANISOTROPY = 50.0
MAX_DEFLATE_RATIO = 1032  # deflate cannot expand further
MAX_STRAIGHT_DEGREES = 1.0
MAX_SHEAR_DEGREES = 35.0  # the gantry of a CT tilts up to 30
UNIT_FACTORS = {"": 1.0, "metres": 1e3, "micrometres": 1e-3}
UNKNOWN_DIRECTIONS = np.diag([-1.0, -1.0, 1.0, 1.0])  # nothing said: stored order is left, posterior, superior
DOWNLOAD_AGAIN = "download the file again"


@dataclass(frozen=True)
class RawVolume:
    """One volume as stored, not yet oriented.

    Attributes:
        voxels_xyz: stored values [X,Y,Z] in the file's number type; no scaling applied.
        affine: 4 x 4 voxel to world millimetres, world axes right-anterior-superior; LPS directions with unit
            voxels where the header says nothing.
        spacing_mm: voxel size along X, Y, Z; None when the header holds none.
        slope: header scale, 1 when absent.
        intercept: header offset, 0 when absent.
        oriented: False when the header says nothing about directions.
        warnings: oddities a person should look at.
        source_sha256: digest of the file's bytes; of a series, :func:`digest_of_files` of its files.
        path: the file or folder, for messages.
        hounsfield: the format itself promises Hounsfield units after ``slope`` and ``intercept``, so that no
            metadata table applies any more (DICOM, published ``.npz``).
    """

    voxels_xyz: np.ndarray
    affine: np.ndarray
    spacing_mm: tuple[float, float, float] | None
    slope: float
    intercept: float
    oriented: bool
    warnings: tuple[str, ...] = ()
    source_sha256: str = ""
    path: str = ""
    hounsfield: bool = False


def check_layout(
    shape: Sequence[int], dtype: np.dtype[Any], stored_bytes: int | None, max_gib: float, path: str
) -> tuple[int, int, int]:
    """Refuse what is no volume or too large, from the header alone, before any voxel is read.

    Args:
        shape: stored axes; further axes of length one are dropped.
        dtype: number type of a voxel.
        stored_bytes: bytes that hold the voxels on disk, perhaps compressed; None when unknown.
        max_gib: largest volume to read.
        path: the file, for messages.

    Returns:
        the three axes (X, Y, Z).

    Raises:
        DataError: not three axes, thinner than four voxels, no real numbers, larger than the limit, or more than
            the stored bytes can hold.
    """
    axes = tuple(int(size) for size in shape)
    while len(axes) > 3 and axes[-1] == 1:
        axes = axes[:-1]
    if len(axes) != 3:
        raise DataError(f"expected one 3-D volume, found shape {axes}", "keep one 3-D frame per file", path=path)
    if min(axes) < MIN_VOXELS_PER_AXIS:
        remedy = f"a volume needs {MIN_VOXELS_PER_AXIS} voxels along every axis"
        raise DataError(f"volume of shape {axes} is too thin", remedy, path=path)
    if dtype.kind not in "iuf":
        raise DataError(f"voxel type {dtype} is not a real number", "store one number per voxel", path=path)
    nbytes = math.prod(axes) * dtype.itemsize
    if nbytes > max_gib * 2**30:
        raise DataError(
            f"the header claims {nbytes / 2**30:.1f} GiB of voxels {axes}, the limit is {max_gib:g} GiB",
            "raise --max-volume-gib if the volume is really that large",
            path=path,
        )
    if stored_bytes is not None and nbytes > MAX_DEFLATE_RATIO * stored_bytes:
        raise DataError(f"{stored_bytes} bytes cannot hold the {nbytes} the header claims", DOWNLOAD_AGAIN, path=path)
    return axes[0], axes[1], axes[2]


def check_spacing(spacing_mm: Sequence[float], path: str) -> tuple[float, float, float]:
    """Refuse voxel sizes that no chest CT has.

    Args:
        spacing_mm: three voxel sizes.
        path: the file, for the message.

    Returns:
        the three sizes, as floats.

    Raises:
        DataError: outside 0.05 to 20 mm, or more than 50 times longer along one axis than along another.
    """
    low, high = SPACING_RANGE_MM
    if not all(low < value < high for value in spacing_mm) or max(spacing_mm) / min(spacing_mm) > MAX_ANISOTROPY:
        shown = ", ".join(f"{value:g}" for value in spacing_mm)
        raise DataError(f"voxel size {shown} mm is not that of a CT", "repair the header spacing", path=path)
    first, second, third = (float(value) for value in spacing_mm)
    return first, second, third


def shortest_decimals(sizes: Iterable[float]) -> list[float]:
    """Read single-precision sizes as they were meant: 0.69999998 must not turn 560 voxels into 559.

    Args:
        sizes: voxel sizes in mm, stored with at least single precision.

    Returns:
        the shortest decimals of the same single-precision numbers.
    """
    return [float(np.format_float_positional(np.float32(value))) for value in sizes]


def unit_in_mm(unit: str, sizes: Sequence[float] | np.ndarray | None) -> tuple[float, list[str]]:
    """Decide what a header's unit of length is worth.

    Args:
        unit: a key of :data:`UNIT_FACTORS`.
        sizes: the voxel sizes as stored; None when there are none.

    Returns:
        millimetres per unit, and a warning where it is not one. A unit that gives no voxel size of a CT, while
        millimetres do, is not believed.
    """
    factor, (low, high) = UNIT_FACTORS[unit], SPACING_RANGE_MM
    if factor == 1.0 or sizes is None:
        return factor, []
    if all(low < size < high for size in sizes) and not all(low < size * factor < high for size in sizes):
        return 1.0, [f"the header says {unit}, but its voxel size is {by(sizes)}: taken as millimetres"]
    return factor, [f"voxel size converted from {unit}"]


def by(sizes: Iterable[float]) -> str:
    """Sizes as one reads them, for messages: 2 x 2.5 x 3."""
    return " x ".join(f"{float(size):g}" for size in sizes)


def shear_degrees(affine: np.ndarray) -> float:
    """Largest deviation from a right angle between two voxel axes, in degrees.

    Args:
        affine: invertible 4 x 4 matrix.
    """
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    cosines = np.abs(directions.T @ directions - np.diag(np.sum(directions**2, axis=0)))
    return float(np.degrees(np.arcsin(min(float(cosines.max()), 1.0))))


def shear_warnings(affine: np.ndarray) -> list[str]:
    """Return the warning about axes that are not at right angles, if they are not."""
    degrees = shear_degrees(affine)
    return [f"the axes are sheared by {degrees:.1f} degrees (gantry tilt)"] if degrees > MAX_STRAIGHT_DEGREES else []


def check_affine(affine: np.ndarray, path: str) -> np.ndarray:
    """Refuse a voxel-to-world matrix that cannot be that of a CT.

    Args:
        affine: 4 x 4 matrix.
        path: the file, for the message.

    Returns:
        the same matrix, float64.

    Raises:
        DataError: it holds NaN or infinity, is singular, or sheared by more than a gantry tilts.
    """
    matrix = np.asarray(affine, dtype=np.float64)
    if not np.isfinite(matrix).all():
        raise DataError("the affine holds NaN or infinity", "repair the header geometry", path=path)
    with np.errstate(over="ignore"):  # an infinite volume is refused for its voxel size
        singular = abs(np.linalg.det(matrix[:3, :3])) < 1e-9
    if singular or np.linalg.matrix_rank(matrix[:3, :3] / np.abs(matrix[:3, :3]).max()) < 3:
        raise DataError("the affine is singular", "repair the header geometry", path=path)
    if shear_degrees(matrix) > MAX_SHEAR_DEGREES:
        message = f"the axes are sheared by {shear_degrees(matrix):.0f} degrees, more than a gantry tilts"
        raise DataError(message, "repair the header geometry, or resample the scan", path=path)
    return matrix
