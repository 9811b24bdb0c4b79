"""Read one volume of the published CT-RATE preprocessing: ``.npz`` with ``arr_0`` [Z,X,Y] in [-1,1] (spec 4.2).

The file holds an array and nothing else: its voxel size is the published 1.5 x 0.75 x 0.75 mm, its values are
HU / 1000. The published script transposes the stored NIfTI axes (X,Y,Z) to (Z,X,Y) without looking at their
directions, and the published loader uses them so; stored order is therefore taken as left, posterior, superior, and
the volume counts as not oriented.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np

from mg3d.datasets.volume import TARGET_SPACING_MM, WINDOW_HU
from mg3d.errors import DataError
from mg3d.scans.byte_stream import HashingFile, damage_named, read_voxels
from mg3d.scans.raw_volume import DOWNLOAD_AGAIN, UNKNOWN_DIRECTIONS, RawVolume, check_layout

MEMBER = "arr_0.npy"
HU_PER_UNIT = 1000.0
TOLERANCE = 1e-3
ZIP_MAGIC = b"PK\x03\x04"
FORMAT_1 = (1, 0)


def read_npz(path: Path, max_volume_gib: float = 4.0) -> RawVolume:
    """Read a published ``.npz`` file without unpickling anything.

    Args:
        path: the file.
        max_volume_gib: refuse headers that claim more voxel data than this, before any of it is read.

    Returns:
        the stored voxels as [X,Y,Z]; slope 1000 leads to HU.

    Raises:
        DataError: damaged or foreign file, no plain three-axis ``arr_0``, values outside [-1, 1].
    """
    with damage_named(path), HashingFile(path) as file:
        if (file.read(len(ZIP_MAGIC)) or b"") != ZIP_MAGIC:
            raise DataError("not an .npz file", DOWNLOAD_AGAIN, path=str(path))
        with zipfile.ZipFile(file) as archive:
            voxels_zxy = _read_member(archive, path, max_volume_gib)
        digest = file.sha256()
    _check_values(voxels_zxy, path)
    spacing_xyz = (TARGET_SPACING_MM[2], TARGET_SPACING_MM[1], TARGET_SPACING_MM[0])
    voxels_xyz = voxels_zxy.transpose(1, 2, 0)
    return RawVolume(
        voxels_xyz,
        UNKNOWN_DIRECTIONS,
        spacing_xyz,
        HU_PER_UNIT,
        0.0,
        oriented=False,
        source_sha256=digest,
        path=str(path),
        hounsfield=True,
    )


def _read_member(archive: zipfile.ZipFile, path: Path, max_gib: float) -> np.ndarray:
    info = next((entry for entry in archive.infolist() if entry.filename == MEMBER), None)
    if info is None or info.flag_bits & 1:
        held = ", ".join(entry.filename for entry in archive.infolist()[:4]) or "nothing"
        raise DataError(f"no readable arr_0 inside (it holds {held})", "give the published .npz files", path=str(path))
    with archive.open(info) as stream:
        stored_shape, fortran, dtype = _array_header(stream, path)
        shape = check_layout(stored_shape, dtype, info.compress_size, max_gib, str(path))
        voxels = read_voxels(stream, shape if fortran else (shape[2], shape[1], shape[0]), dtype, str(path))
    return voxels if fortran else voxels.transpose(2, 1, 0)


def _array_header(stream: IO[bytes], path: Path) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == FORMAT_1 else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(stream)
    except (ValueError, UnicodeError, SyntaxError) as problem:
        raise DataError(f"arr_0 has no array header ({problem})", DOWNLOAD_AGAIN, path=str(path)) from None
    if dtype.hasobject:
        raise DataError("arr_0 holds Python objects", "never load such a file; download it again", path=str(path))
    return shape, fortran, dtype


def _check_values(voxels: np.ndarray, path: Path) -> None:
    # comparisons with NaN are false: what is not finite is counted later, with all other formats
    low, high = (float(reduce(voxels, axis=None)) for reduce in (np.fmin.reduce, np.fmax.reduce))
    limit = max(abs(bound) for bound in WINDOW_HU) / HU_PER_UNIT + TOLERANCE
    if low < -limit or high > limit:
        remedy = "only the published preprocessing is read from .npz; convert others to NIfTI"
        raise DataError(f"values {low:g} to {high:g} leave the published range -1 to 1", remedy, path=str(path))
