"""Read one NIfTI volume completely and suspiciously: checksum, size bound, affine and spacing checks.

Shape legend: X, Y, Z are the stored array axes, whatever direction they point to.
"""

from __future__ import annotations

import io
import math
import struct
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
from isal import igzip, isal_zlib
from isal.igzip_lib import IsalError
from nibabel.nifti1 import Nifti1Header
from nibabel.nifti2 import Nifti2Header
from nibabel.spatialimages import HeaderDataError

from mg3d.errors import DataError

GZIP_MAGIC = b"\x1f\x8b"
GZIP_TRAILER_BYTES = 8
GZIP_MAX_RATIO = 1032  # deflate cannot expand further
MAX_TRAILING_BYTES = 1024
CHUNK_BYTES = 1 << 22
MAX_VOXEL_OFFSET = 1 << 24
MIN_VOXELS_PER_AXIS = 4
SPACING_RANGE_MM = (0.05, 20.0)
MAX_ANISOTROPY = 50.0
DOWNLOAD_AGAIN = "download the file again"
GZIP_ERRORS: tuple[type[Exception], ...] = (EOFError, zlib.error, IsalError, igzip.BadGzipFile)  # type: ignore[assignment]


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
    """

    voxels_xyz: np.ndarray
    affine: np.ndarray
    spacing_mm: tuple[float, float, float] | None
    slope: float
    intercept: float
    oriented: bool
    warnings: tuple[str, ...] = ()


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
    try:
        try:
            return _read(_open_stream(path), path, max_volume_gib)
        except EOFError:
            completed = _with_trailer(path)
            if completed is None:
                raise
            raw = _read(completed, path, max_volume_gib)
            return replace(raw, warnings=("the gzip checksum is missing: the voxels could not be verified",))
    except GZIP_ERRORS as problem:
        raise DataError(f"damaged or truncated gzip data ({problem})", DOWNLOAD_AGAIN, path=str(path)) from problem
    except OSError as problem:
        raise DataError(f"cannot be read ({problem.strerror or problem})", DOWNLOAD_AGAIN, path=str(path)) from problem


def _read(stream: IO[bytes], path: Path, max_volume_gib: float) -> RawVolume:
    with stream:
        header = _read_header(stream, path)
        shape, dtype = _checked_layout(header, path, max_volume_gib)
        voxels = _read_voxels(stream, header, shape, dtype, path)
    slope, intercept = _header_scaling(header, path)
    affine = _checked_affine(header, path)
    oriented = bool(int(header["sform_code"]) > 0 or int(header["qform_code"]) > 0)
    return RawVolume(voxels, affine, _checked_spacing(header, affine, path), slope, intercept, oriented)


def _with_trailer(path: Path) -> IO[bytes] | None:
    """Complete a file whose compressed data is whole but whose eight-byte trailer was never written.

    Returns None when the data itself is cut short, or when the file is not one gzip member.
    """
    data = path.read_bytes()
    start = _gzip_header_length(data)
    decoder = isal_zlib.decompressobj(wbits=-15)
    checksum = size = 0
    pending = data[start:]
    while pending and not decoder.eof:
        piece = decoder.decompress(pending, CHUNK_BYTES)
        checksum, size = isal_zlib.crc32(piece, checksum), size + len(piece)
        pending = decoder.unconsumed_tail
    if not decoder.eof or len(decoder.unused_data) >= GZIP_TRAILER_BYTES:
        return None
    whole = data[: len(data) - len(decoder.unused_data)] + struct.pack("<2I", checksum, size & 0xFFFFFFFF)
    return igzip.IGzipFile(fileobj=io.BytesIO(whole), mode="rb")  # type: ignore[return-value]


def _gzip_header_length(data: bytes) -> int:
    flags = data[3] if len(data) > 3 else 0
    position = 10
    if flags & 4:
        position += 2 + int.from_bytes(data[position : position + 2], "little")
    for text_flag in (8, 16):
        if flags & text_flag:
            position = data.find(b"\0", position) + 1 or len(data)
    return position + (2 if flags & 2 else 0)


def _open_stream(path: Path) -> IO[bytes]:
    if not path.is_file():
        raise DataError("file not found", "check the path or download the file", path=str(path))
    with path.open("rb") as probe:
        start = probe.read(8)
    if not start:
        raise DataError("the file is empty", DOWNLOAD_AGAIN, path=str(path))
    if start.startswith(GZIP_MAGIC):
        return igzip.open(path, "rb")  # type: ignore[return-value]
    if path.name.endswith(".gz") or int.from_bytes(start[:4], "little") not in (348, 540, 0x5C010000, 0x1C020000):
        raise DataError(f"not a NIfTI file (it starts with {start!r})", DOWNLOAD_AGAIN, path=str(path))
    return path.open("rb")


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
        shape = tuple(int(size) for size in header.get_data_shape())
        dtype = np.dtype(header.get_data_dtype())
    except HeaderDataError as problem:
        raise DataError(f"unknown voxel type or shape ({problem})", "convert the volume", path=str(path)) from problem
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3:
        raise DataError(f"expected one 3-D volume, found shape {shape}", "keep one 3-D frame per file", path=str(path))
    if min(shape) < MIN_VOXELS_PER_AXIS:
        remedy = f"a volume needs {MIN_VOXELS_PER_AXIS} voxels along every axis"
        raise DataError(f"volume of shape {shape} is too thin", remedy, path=str(path))
    if dtype.kind not in "iuf":
        raise DataError(f"voxel type {dtype} is not a real number", "store one number per voxel", path=str(path))
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes > max_gib * 2**30:
        raise DataError(
            f"the header claims {nbytes / 2**30:.1f} GiB of voxels {shape}, the limit is {max_gib:g} GiB",
            "raise --max-volume-gib if the volume is really that large",
            path=str(path),
        )
    if nbytes > GZIP_MAX_RATIO * path.stat().st_size:
        size = path.stat().st_size
        raise DataError(f"{size} bytes cannot hold the {nbytes} the header claims", DOWNLOAD_AGAIN, path=str(path))
    return (shape[0], shape[1], shape[2]), dtype


def _read_voxels(
    stream: IO[bytes], header: Nifti1Header, shape: tuple[int, int, int], dtype: np.dtype[Any], path: Path
) -> np.ndarray:
    gap = int(header["vox_offset"]) - int(header["sizeof_hdr"])
    if not 0 <= gap <= MAX_VOXEL_OFFSET:
        raise DataError(f"impossible voxel offset {header['vox_offset']}", DOWNLOAD_AGAIN, path=str(path))
    stream.read(gap)
    buffer = np.empty(math.prod(shape) * dtype.itemsize, dtype=np.uint8)
    filled = _fill(stream, buffer.data)
    if filled < buffer.size:
        raise DataError(f"holds {filled} of {buffer.size} voxel bytes", DOWNLOAD_AGAIN, path=str(path))
    # reading on to the end of the stream is what makes the decompressor verify its checksum
    if len(stream.read(MAX_TRAILING_BYTES + 1)) > MAX_TRAILING_BYTES:
        raise DataError("more data than the header says", DOWNLOAD_AGAIN, path=str(path))
    voxels = buffer.view(dtype)
    if not dtype.isnative:
        voxels = voxels.byteswap(inplace=True).view(dtype.newbyteorder("="))
    return voxels.reshape(shape, order="F")


def _fill(stream: IO[bytes], view: memoryview) -> int:
    filled = 0
    reader: Any = stream
    while filled < len(view):
        count = reader.readinto(view[filled : filled + CHUNK_BYTES])
        if not count:
            break
        filled += count
    return filled


def _header_scaling(header: Nifti1Header, path: Path) -> tuple[float, float]:
    try:
        slope, intercept = header.get_slope_inter()
    except HeaderDataError as problem:
        raise DataError(f"unusable intensity scale ({problem})", "repair scl_slope", path=str(path)) from problem
    return (1.0 if slope is None else float(slope), 0.0 if intercept is None else float(intercept))


def _checked_affine(header: Nifti1Header, path: Path) -> np.ndarray:
    if not int(header["sform_code"]) > 0:
        if not int(header["qform_code"]) > 0:
            return np.diag([-1.0, -1.0, 1.0, 1.0])  # nothing said: stored order is left, posterior, superior
        header = header.copy()
        pixdim = header["pixdim"][1:4]
        header["pixdim"][1:4] = np.where(np.isfinite(pixdim) & (pixdim > 0), pixdim, 1.0)
    affine = np.asarray(header.get_best_affine(), dtype=np.float64)
    if not np.isfinite(affine).all():
        raise DataError("the affine holds NaN or infinity", "repair the header geometry", path=str(path))
    if abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise DataError("the affine is singular", "repair the header geometry", path=str(path))
    return affine


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
    # the shortest decimal of a single-precision size: 0.69999998 must not turn 560 voxels into 559
    values = [float(np.format_float_positional(np.float32(value))) for value in sizes]
    check_spacing(values, str(path))
    return (values[0], values[1], values[2])


def check_spacing(spacing_mm: list[float], path: str) -> None:
    """Refuse voxel sizes that no chest CT has.

    Args:
        spacing_mm: three voxel sizes.
        path: the file, for the message.

    Raises:
        DataError: outside 0.05 to 20 mm, or more than 50 times longer along one axis than along another.
    """
    low, high = SPACING_RANGE_MM
    if not all(low < value < high for value in spacing_mm) or max(spacing_mm) / min(spacing_mm) > MAX_ANISOTROPY:
        shown = ", ".join(f"{value:g}" for value in spacing_mm)
        raise DataError(f"voxel size {shown} mm is not that of a CT", "repair the header spacing", path=path)
