"""Read one NIfTI volume completely and suspiciously: checksum, size bound, affine and spacing checks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np
from nibabel.nifti1 import Nifti1Header
from nibabel.nifti2 import Nifti2Header
from nibabel.spatialimages import HeaderDataError

from mg3d.errors import DataError
from mg3d.scans.byte_stream import GZIP_MAGIC, HashingFile, damage_named, gunzip, read_voxels, with_gzip_trailer
from mg3d.scans.raw_volume import (
    DOWNLOAD_AGAIN,
    UNKNOWN_DIRECTIONS,
    RawVolume,
    check_affine,
    check_layout,
    check_spacing,
    shortest_decimals,
)

MAX_VOXEL_OFFSET = 1 << 24
HEADER_SIZES = (348, 540)
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
            raw = replace(_read(completed, path, max_volume_gib), warnings=(NO_CHECKSUM,))
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


def _read(stream: Any, path: Path, max_volume_gib: float) -> RawVolume:
    header = _read_header(stream, path)
    shape, dtype = _checked_layout(header, path, max_volume_gib)
    _skip_to_voxels(stream, header, path)
    voxels = read_voxels(stream, shape, dtype, str(path))
    slope, intercept = _header_scaling(header, path)
    affine = _checked_affine(header, path)
    oriented = bool(int(header["sform_code"]) > 0 or int(header["qform_code"]) > 0)
    spacing_mm = _checked_spacing(header, affine, path)
    return RawVolume(voxels, affine, spacing_mm, slope, intercept, oriented, path=str(path))


def _read_header(stream: IO[bytes], path: Path) -> Nifti1Header:
    block = stream.read(348)
    if len(block) < 348:
        raise DataError(f"only {len(block)} bytes of header", DOWNLOAD_AGAIN, path=str(path))
    sizes = {int.from_bytes(block[:4], "little"), int.from_bytes(block[:4], "big")}
    if 540 in sizes:
        block += stream.read(540 - 348)
        header: Nifti1Header = Nifti2Header(binaryblock=block, check=False)
    elif 348 in sizes:
        header = Nifti1Header(binaryblock=block, check=False)
    else:
        raise DataError("not a NIfTI header", DOWNLOAD_AGAIN, path=str(path))
    magic = bytes(header["magic"].item())
    if not magic.startswith(b"n+"):
        raise DataError(f"not a single-file NIfTI (magic {magic!r})", "convert it to one .nii.gz file", path=str(path))
    return header


def _checked_layout(header: Nifti1Header, path: Path, max_gib: float) -> tuple[tuple[int, int, int], np.dtype[Any]]:
    try:
        shape, dtype = header.get_data_shape(), np.dtype(header.get_data_dtype())
    except HeaderDataError as problem:
        raise DataError(f"unknown voxel type or shape ({problem})", "convert the volume", path=str(path)) from problem
    return check_layout(shape, dtype, path.stat().st_size, max_gib, str(path)), dtype


def _skip_to_voxels(stream: IO[bytes], header: Nifti1Header, path: Path) -> None:
    offset = float(header["vox_offset"])
    gap = int(offset) - int(header["sizeof_hdr"]) if np.isfinite(offset) else -1
    if not 0 <= gap <= MAX_VOXEL_OFFSET:
        raise DataError(f"impossible voxel offset {offset}", DOWNLOAD_AGAIN, path=str(path))
    stream.read(gap)


def _header_scaling(header: Nifti1Header, path: Path) -> tuple[float, float]:
    try:
        slope, intercept = header.get_slope_inter()
    except HeaderDataError as problem:
        raise DataError(f"unusable intensity scale ({problem})", "repair scl_slope", path=str(path)) from problem
    return (1.0 if slope is None else float(slope), 0.0 if intercept is None else float(intercept))


def _checked_affine(header: Nifti1Header, path: Path) -> np.ndarray:
    if not int(header["sform_code"]) > 0:
        if not int(header["qform_code"]) > 0:
            return UNKNOWN_DIRECTIONS
        header = header.copy()
        pixdim = header["pixdim"][1:4]
        header["pixdim"][1:4] = np.where(np.isfinite(pixdim) & (pixdim > 0), pixdim, 1.0)
    return check_affine(header.get_best_affine(), str(path))


def _checked_spacing(header: Nifti1Header, affine: np.ndarray, path: Path) -> tuple[float, float, float] | None:
    pixdim = np.asarray(header["pixdim"][1:4], dtype=np.float64)
    usable = bool(np.isfinite(pixdim).all() and (pixdim > 0).all())
    if int(header["sform_code"]) > 0:
        norms = np.linalg.norm(affine[:3, :3], axis=0)
        sizes = pixdim if usable and np.allclose(norms, pixdim, rtol=1e-3) else norms
    elif usable:
        sizes = pixdim
    else:
        return None
    return check_spacing(shortest_decimals(sizes), str(path))
