"""MetaImage files as data sets publish them: ``.mhd`` with a raw file beside it, ``.mha`` in one compressed piece."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

__all__ = ["write_mha", "write_mhd"]

_TYPES = {"int16": "MET_SHORT", "uint8": "MET_UCHAR", "float32": "MET_FLOAT"}


def write_mhd(
    path: Path,
    voxels_DHW: np.ndarray,
    spacing_mm: Sequence[float],
    origin_mm: Sequence[float],
    signs: Sequence[int] = (1, 1, 1),
) -> None:
    """Write ``name.mhd`` and ``name.raw``.

    Args:
        path: the header file; its folder must exist.
        voxels_DHW: int16, uint8 or float32.
        spacing_mm: voxel size (z, y, x).
        origin_mm: world place (x, y, z) of the first voxel, axes left, posterior, superior.
        signs: direction of the stored x, y and z axis along the world's, 1 or -1.
    """
    raw = path.with_suffix(".raw")
    raw.write_bytes(np.ascontiguousarray(voxels_DHW).tobytes())
    path.write_text(_header(voxels_DHW, spacing_mm, origin_mm, signs, {}, "False", raw.name), encoding="ascii")


def write_mha(
    path: Path,
    voxels_DHW: np.ndarray,
    spacing_mm: Sequence[float],
    origin_mm: Sequence[float],
    tags: Mapping[str, str],
) -> None:
    """Write one file that holds header and compressed voxels.

    Args:
        path: the file; its folder must exist.
        voxels_DHW: int16, uint8 or float32.
        spacing_mm: voxel size (z, y, x).
        origin_mm: world place (x, y, z) of the first voxel, axes left, posterior, superior.
        tags: further header fields.
    """
    packed = zlib.compress(np.ascontiguousarray(voxels_DHW).tobytes(), 1)
    fields = {"CompressedDataSize": str(len(packed)), **tags}
    header = _header(voxels_DHW, spacing_mm, origin_mm, (1, 1, 1), fields, "True", "LOCAL")
    path.write_bytes(header.encode("ascii") + packed)


def _header(
    voxels_DHW: np.ndarray,
    spacing_mm: Sequence[float],
    origin_mm: Sequence[float],
    signs: Sequence[int],
    tags: Mapping[str, str],
    compressed: str,
    data_file: str,
) -> str:
    fields = {
        "ObjectType": "Image",
        "NDims": "3",
        "BinaryData": "True",
        "BinaryDataByteOrderMSB": "False",
        "CompressedData": compressed,
        "TransformMatrix": " ".join(str(value) for value in np.diag(signs).ravel()),
        "Offset": " ".join(f"{value:.6g}" for value in origin_mm),
        "CenterOfRotation": "0 0 0",
        "AnatomicalOrientation": "RAI",
        "ElementSpacing": " ".join(f"{value:.6g}" for value in reversed(spacing_mm)),
        "DimSize": " ".join(str(length) for length in reversed(voxels_DHW.shape)),
        **tags,
        "ElementType": _TYPES[str(voxels_DHW.dtype)],
        "ElementDataFile": data_file,
    }
    return "".join(f"{key} = {value}\n" for key, value in fields.items())
