"""What the readers built on SimpleITK share: a quiet import, number types, and its world turned to ours.

ITK's world axes are left-posterior-superior; a :class:`~mg3d.scans.raw_volume.RawVolume` uses right-anterior-superior.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from mg3d.errors import DataError
from mg3d.scans.raw_volume import DOWNLOAD_AGAIN

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
NUMBER_TYPES = {"Int8": "i1", "UInt8": "u1", "Int16": "i2", "UInt16": "u2", "Int32": "i4", "UInt32": "u4"} | {
    "Int64": "i8",
    "UInt64": "u8",
    "Float32": "f4",
    "Float64": "f8",
}


@cache
def simple_itk() -> ModuleType:
    """Return SimpleITK, imported when first needed; its warnings repeat what the checks here report."""
    import SimpleITK

    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    return SimpleITK


def read_information(path: Path, image_io: str) -> Any:
    """Read the header of a file, no pixels.

    Args:
        path: the file.
        image_io: name of the ITK reader that must accept it.

    Returns:
        SimpleITK's file reader, which answers size, spacing, direction, number type and tags.

    Raises:
        DataError: the reader refuses the header.
    """
    reader = simple_itk().ImageFileReader()
    reader.SetImageIO(image_io)
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as problem:
        raise DataError(f"unreadable header ({last_words(problem)})", DOWNLOAD_AGAIN, path=str(path)) from None
    return reader


def last_words(problem: Exception) -> str:
    """Return the telling last line of one of ITK's long messages, without the addresses in it."""
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    return lines[-1].rpartition("): ")[2][:200] if lines else type(problem).__name__


def number_type(reader: Any, path: Path) -> np.dtype[Any]:
    """Return the number type of one voxel.

    Args:
        reader: from :func:`read_information`.
        path: the file, for the message.

    Raises:
        DataError: a voxel holds several numbers (colour, vectors) or none that is real.
    """
    names = {getattr(simple_itk(), f"sitk{name}"): code for name, code in NUMBER_TYPES.items()}
    code = names.get(reader.GetPixelID())
    if reader.GetNumberOfComponents() != 1 or code is None:
        found = simple_itk().GetPixelIDValueAsString(reader.GetPixelID())
        raise DataError(f"voxel type {found} is not a real number", "store one number per voxel", path=str(path))
    return np.dtype(code)


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
