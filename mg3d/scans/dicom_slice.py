"""Read one DICOM file: the tags that place it among its neighbours, and its pixels in Hounsfield units."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mg3d.errors import DataError
from mg3d.scans.byte_stream import HashingFile
from mg3d.scans.itk_image import last_words, number_type, read_information, simple_itk
from mg3d.scans.raw_volume import DOWNLOAD_AGAIN

IMAGE_IO = "GDCMImageIO"
PREAMBLE_BYTES = 128
MAGIC = b"DICM"
FILE_META_BYTES = 2048
SOP_CLASS_TAG = b"\x02\x00\x02\x00UI"
CT_IMAGES = b"1.2.840.10008.5.1.4.1.1.2"  # plain, enhanced and converted CT share this start
SERIES_UID, DESCRIPTION = "0020|000e", "0008|103e"
POSITION, ORIENTATION, PIXEL_SPACING = "0020|0032", "0020|0037", "0028|0030"
RESCALE = ("0028|1053", "0028|1052")
UNIT_TOLERANCE = 1e-2


@dataclass(frozen=True)
class Slice:
    """What is known of one slice before its pixels are read.

    Attributes:
        path: the file.
        sha256: digest of its bytes.
        series: SeriesInstanceUID, empty when absent.
        description: SeriesDescription, for messages.
        size: columns and rows.
        frames: 1, more in a multi-frame file.
        dtype: number type after rescaling.
        position: centre of the first pixel, LPS millimetres; empty when absent.
        directions: unit vectors along a row and along a column, six numbers; empty when absent or unusable.
        spacing_mm: distance between rows, and between columns; empty when absent.
        has_rescale: the slice states its slope and intercept.
    """

    path: Path
    sha256: str
    series: str
    description: str
    size: tuple[int, int]
    frames: int
    dtype: np.dtype[Any]
    position: tuple[float, ...]
    directions: tuple[float, ...]
    spacing_mm: tuple[float, ...]
    has_rescale: bool


def read_slice(path: Path) -> Slice | None:
    """Read the tags of one file.

    Args:
        path: any file.

    Returns:
        the slice; None when the file is no DICOM file or no CT image.

    Raises:
        DataError: the file is damaged, or its pixels are not one real number each.
    """
    if not path.stat().st_size:
        return None
    with HashingFile(path) as file:
        start = file.read(FILE_META_BYTES) or b""
        if start[PREAMBLE_BYTES:].startswith(MAGIC) and _may_be_ct(start):
            digest = file.sha256()
        else:
            return None
    header = read_information(path, IMAGE_IO)
    columns, rows, *further = header.GetSize()
    return Slice(
        path=path,
        sha256=digest,
        series=_text(header, SERIES_UID),
        description=_text(header, DESCRIPTION),
        size=(columns, rows),
        frames=further[0] if further else 1,
        dtype=number_type(header, path),
        position=_numbers(header, POSITION, 3),
        directions=_unit_vectors(_numbers(header, ORIENTATION, 6)),
        spacing_mm=_numbers(header, PIXEL_SPACING, 2),
        has_rescale=all(_numbers(header, tag, 1) for tag in RESCALE),
    )


def _may_be_ct(start: bytes) -> bool:
    """Read the kind of object from the file meta group, which is always little-endian with explicit types."""
    place = start.find(SOP_CLASS_TAG)
    if place < 0:
        return True
    place += len(SOP_CLASS_TAG)
    length = int.from_bytes(start[place : place + 2], "little")
    return start[place + 2 : place + 2 + length].startswith(CT_IMAGES)


def read_pixels(item: Slice) -> np.ndarray:
    """Read the pixels of one slice with its own rescale slope and intercept applied.

    Args:
        item: from :func:`read_slice`.

    Returns:
        [rows, columns] in Hounsfield units.

    Raises:
        DataError: the pixels are damaged or cut short.
    """
    reader = simple_itk().ImageFileReader()
    reader.SetImageIO(IMAGE_IO)
    reader.SetFileName(str(item.path))
    try:
        image = reader.Execute()
    except RuntimeError as problem:
        message = f"pixels cannot be read ({last_words(problem)})"
        raise DataError(message, DOWNLOAD_AGAIN, path=str(item.path)) from None
    return np.reshape(simple_itk().GetArrayFromImage(image), item.size[::-1])


def _text(header: Any, tag: str) -> str:
    return header.GetMetaData(tag).strip(" \0") if header.HasMetaDataKey(tag) else ""


def _numbers(header: Any, tag: str, count: int) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in _text(header, tag).split("\\"))
    except ValueError:
        return ()
    return values if len(values) == count and np.isfinite(values).all() else ()


def _unit_vectors(values: tuple[float, ...]) -> tuple[float, ...]:
    if not values:
        return ()
    row, column = np.reshape(values, (2, 3))
    products = np.array([row @ row - 1, column @ column - 1, row @ column])
    return values if np.abs(products).max() < UNIT_TOLERANCE else ()
