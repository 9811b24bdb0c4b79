"""Read one NIfTI volume completely and suspiciously: checksum, size bound, affine and spacing checks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.nifti1 import Nifti1Header
from nibabel.nifti2 import Nifti2Header
from nibabel.orientations import OrientationError
from nibabel.spatialimages import HeaderDataError, HeaderTypeError, ImageDataError
from nibabel.wrapstruct import WrapStructError

from mg3d.errors import DataError
from mg3d.scans.byte_stream import GZIP_MAGIC, HashingFile, damage_named, gunzip, read_voxels, with_gzip_trailer
from mg3d.scans.nifti_geometry import nifti_geometry
from mg3d.scans.raw_volume import DOWNLOAD_AGAIN, RawVolume, check_layout

MAX_EXTENSION_BYTES = 1 << 24
HEADER_SIZES = (348, 540)
BYTE_ORDERS: tuple[tuple[str, Literal["little", "big"]], ...] = (("<", "little"), (">", "big"))
CONVERT = "convert it again to one .nii.gz file"
NIBABEL_ERRORS = (
    *(HeaderDataError, HeaderTypeError, ImageDataError, ImageFileError, OrientationError, WrapStructError),
    *(ValueError, TypeError, LookupError, ArithmeticError),
)
NO_CHECKSUM = "the gzip checksum is missing: the voxels could not be verified"


def read_nifti(path: Path, max_volume_gib: float = 4.0) -> RawVolume:
    """Read a ``.nii`` or ``.nii.gz`` file to its last byte, so that the gzip checksum is verified.

    Args:
        path: the file.
        max_volume_gib: refuse headers that claim more voxel data than this, before any of it is read.

    Returns:
        the stored voxels with their geometry.

    Raises:
        DataError: empty, damaged, truncated or foreign file, impossible header, unsupported voxel type.
    """
    with damage_named(path), HashingFile(path) as file:
        try:
            raw = _read(_open_stream(file, path), path, max_volume_gib)
        except EOFError:
            completed = with_gzip_trailer(path)
            if completed is None:
                raise
            raw = _read(completed, path, max_volume_gib)
            raw = replace(raw, warnings=(*raw.warnings, NO_CHECKSUM))
        return replace(raw, source_sha256=file.sha256())


def _open_stream(file: HashingFile, path: Path) -> Any:
    start = file.read(4) or b""
    file.seek(0)
    if start.startswith(GZIP_MAGIC):
        return gunzip(file)
    orders = {int.from_bytes(start, "little"), int.from_bytes(start, "big")}
    if path.name.endswith(".gz") or orders.isdisjoint(HEADER_SIZES):
        raise DataError(f"not a NIfTI file (it starts with {start!r})", DOWNLOAD_AGAIN, path=str(path))
    return file


@contextmanager
def header_problems_named(path: Path) -> Iterator[None]:
    """Turn everything nibabel raises over a header into one error that names the file.

    Args:
        path: the file whose header is interpreted inside.

    Raises:
        DataError: in place of any of :data:`NIBABEL_ERRORS`.
    """
    try:
        yield
    except NIBABEL_ERRORS as problem:
        raise DataError(f"unusable header ({problem})", CONVERT, path=str(path)) from problem


def _read(stream: Any, path: Path, max_volume_gib: float) -> RawVolume:
    with header_problems_named(path):
        header = _read_header(stream, path)
        shape, dtype = _checked_layout(header, path, max_volume_gib)
        gap = _bytes_before_voxels(header, path)
        slope, intercept = _header_scaling(header, path)
        geometry = nifti_geometry(header, path)
    stream.read(gap)
    voxels = read_voxels(stream, shape, dtype, str(path))
    found = geometry.affine, geometry.spacing_mm, slope, intercept, geometry.oriented, geometry.warnings
    return RawVolume(voxels, *found, path=str(path))


def _read_header(stream: IO[bytes], path: Path) -> Nifti1Header:
    block = stream.read(348)
    if len(block) < 348:
        raise DataError(f"only {len(block)} bytes of header", DOWNLOAD_AGAIN, path=str(path))
    order = next((sign for sign, name in BYTE_ORDERS if int.from_bytes(block[:4], name) in HEADER_SIZES), None)
    if order is None:
        size = int.from_bytes(block[:4], "little", signed=True)
        raise DataError(f"not a NIfTI header (sizeof_hdr is {size}, not 348 or 540)", DOWNLOAD_AGAIN, path=str(path))
    kind: type[Nifti1Header] = Nifti1Header
    if 540 in (int.from_bytes(block[:4], name) for _, name in BYTE_ORDERS):
        kind, block = Nifti2Header, block + stream.read(540 - 348)
    header: Nifti1Header = kind(binaryblock=block, endianness=order, check=False)
    magic = bytes(header["magic"].item())
    if magic.rstrip(b"\0")[:3] != kind.single_magic:
        raise DataError(f"not a single-file NIfTI (magic {magic!r})", CONVERT, path=str(path))
    return header


def _checked_layout(header: Nifti1Header, path: Path, max_gib: float) -> tuple[tuple[int, int, int], np.dtype[Any]]:
    count, *sizes = (int(value) for value in header["dim"])
    if not 1 <= count <= len(sizes):
        raise DataError(f"dim[0] is {count}, not a number of axes", DOWNLOAD_AGAIN, path=str(path))
    try:
        dtype = np.dtype(header.get_data_dtype())
    except NIBABEL_ERRORS as problem:
        raise DataError(f"unknown voxel type ({problem})", "convert the volume", path=str(path)) from problem
    return check_layout(sizes[:count], dtype, path.stat().st_size, max_gib, str(path)), dtype


def _bytes_before_voxels(header: Nifti1Header, path: Path) -> int:
    """Bytes between header and voxels: the extensions, which are left out unread."""
    offset = float(header["vox_offset"])
    first = header.single_vox_offset
    if not (first <= offset <= first + MAX_EXTENSION_BYTES and offset.is_integer()):
        raise DataError(f"impossible voxel offset {offset:g}", DOWNLOAD_AGAIN, path=str(path))
    return int(offset) - int(header.sizeof_hdr)


def _header_scaling(header: Nifti1Header, path: Path) -> tuple[float, float]:
    """Slope and intercept; a slope of 0 or NaN means none, as the standard and nibabel write it."""
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or np.isnan(slope):
        return 1.0, 0.0
    if not (np.isfinite(slope) and np.isfinite(intercept)):
        raise DataError(
            f"unusable intensity scale (scl_slope {slope:g}, scl_inter {intercept:g})", "repair them", path=str(path)
        )
    return slope, intercept
