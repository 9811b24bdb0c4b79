"""One DICOM file as slices: the tags that place each image among its neighbours, and what they say about its values.

A classic CT file holds one slice, an enhanced or converted one many, placed by its functional groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mg3d.atomic import is_special
from mg3d.errors import DataError
from mg3d.scans.byte_stream import HashingFile, damage_named
from mg3d.scans.dicom_file import DEFLATED, MAX_NAME, DicomHeader, Tags, name_of_uid, read_header
from mg3d.scans.raw_volume import DOWNLOAD_AGAIN

CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"
CT_IMAGES = frozenset((CT_IMAGE, f"{CT_IMAGE}.1", f"{CT_IMAGE}.2"))  # classic, enhanced, converted to enhanced
IMAGE_TYPE, MODALITY, DESCRIPTION, KERNEL = 0x00080008, 0x00080060, 0x0008103E, 0x00181210
SERIES_UID, SERIES_NUMBER, ACQUISITION = 0x0020000E, 0x00200011, 0x00200012
POSITION, ORIENTATION, PIXEL_SPACING = 0x00200032, 0x00200037, 0x00280030
SAMPLES, COLOUR, FRAMES, ROWS, COLUMNS = 0x00280002, 0x00280004, 0x00280008, 0x00280010, 0x00280011
ALLOCATED, STORED, HIGH_BIT, SIGNED = 0x00280100, 0x00280101, 0x00280102, 0x00280103
INTERCEPT, SLOPE, RESCALE_TYPE = 0x00281052, 0x00281053, 0x00281054
SHARED_GROUPS, FRAME_GROUPS = 0x52009229, 0x52009230
PLACE_GROUP, DIRECTION_GROUP, MEASURE_GROUP, VALUE_GROUP = 0x00209113, 0x00209116, 0x00289110, 0x00289145
FRAME_TYPE_GROUP, FRAME_TYPE = 0x00189329, 0x00089007
KERNEL_GROUP = 0x00189314
WANTED = [
    *(0x00080016, IMAGE_TYPE, MODALITY, DESCRIPTION, KERNEL, SERIES_UID, SERIES_NUMBER, ACQUISITION),
    *(POSITION, ORIENTATION, PIXEL_SPACING, SAMPLES, COLOUR, FRAMES, ROWS, COLUMNS),
    *(ALLOCATED, STORED, HIGH_BIT, SIGNED, INTERCEPT, SLOPE, RESCALE_TYPE, SHARED_GROUPS, FRAME_GROUPS),
]
UNKNOWN_KIND = "DICOM file without a kind"
UNIT_TOLERANCE = 1e-2
MAX_PLACE_MM = 1e5
MAX_SLOPE, MAX_INTERCEPT = 1e4, 1e6
CONVERT = "convert the series to one NIfTI file with a DICOM converter"
UNPACK = "convert it to an uncompressed transfer syntax with a DICOM converter"
HOUNSFIELD_TYPES = ("", "HU", "US")  # US: unspecified, what ITK writes for every CT
Value = TypeVar("Value")


@dataclass(frozen=True)
class Pixels:
    """How the images of a file are stored.

    Attributes:
        transfer_syntax: UID.
        at: place of the pixel bytes in the file.
        nbytes: their number; None for compressed images.
        little_endian: byte order.
        allocated: bits taken by a pixel.
        stored: bits used of them.
        high_bit: highest used bit.
        signed: two's complement.
    """

    transfer_syntax: str
    at: int
    nbytes: int | None
    little_endian: bool
    allocated: int
    stored: int
    high_bit: int
    signed: bool


@dataclass(frozen=True)
class Slice:
    """What is known of one slice before its pixels are read.

    Attributes:
        path: the file.
        sha256: digest of its bytes.
        series: SeriesInstanceUID, empty when absent.
        number: SeriesNumber, 0 when absent.
        description: SeriesDescription, for messages.
        kernel: ConvolutionKernel, for messages.
        acquisition: AcquisitionNumber, "" when absent.
        localizer: the file calls it a localizer.
        size: columns and rows.
        frame: its place in the file, from 0.
        frames: images in the file.
        position: centre of the first pixel, LPS millimetres; empty when absent.
        directions: unit vectors along a row and along a column, six numbers; empty when absent or unusable.
        spacing_mm: distance between rows, and between columns; empty when absent.
        rescale: slope and intercept; None when the file states neither.
        pixels: how they are stored.
    """

    path: Path
    sha256: str
    series: str
    number: int
    description: str
    kernel: str
    acquisition: str
    localizer: bool
    size: tuple[int, int]
    frame: int
    frames: int
    position: tuple[float, ...]
    directions: tuple[float, ...]
    spacing_mm: tuple[float, ...]
    rescale: tuple[float, float] | None
    pixels: Pixels

    @property
    def name(self) -> str:
        """For messages."""
        return self.path.name if self.frames == 1 else f"frame {self.frame + 1} of {self.path.name}"

    @property
    def dtype(self) -> np.dtype[Any]:
        """Number type after rescaling: whole numbers where slope and intercept are."""
        slope, intercept = self.rescale or (1.0, 0.0)
        if not (slope.is_integer() and intercept.is_integer()):
            return np.dtype(np.float64)
        low = -(1 << self.pixels.stored - 1) if self.pixels.signed else 0
        high = (1 << self.pixels.stored - self.pixels.signed) - 1
        ends = sorted((slope * low + intercept, slope * high + intercept))
        fitting = (
            kind for kind in (np.int16, np.int32) if np.iinfo(kind).min <= ends[0] <= ends[1] <= np.iinfo(kind).max
        )
        return np.dtype(next(fitting, np.float64))


@dataclass(frozen=True)
class NoSlice:
    """A file that is no CT slice.

    Attributes:
        path: the file.
        kind: what it is, for messages; "" for a file that is no DICOM file.
        series: SeriesInstanceUID of an image of another kind, else "".
    """

    path: Path
    kind: str = ""
    series: str = ""


def read_slices(path: Path) -> list[Slice] | NoSlice:
    """Read the tags of one file.

    Args:
        path: any file; a pipe, socket or device is not opened.

    Returns:
        its slices, in the order of the file, or what it is instead.

    Raises:
        DataError: the file is damaged, its pixels are not one real number each, or its values are no Hounsfield units.
    """
    if is_special(path) or (path.is_file() and not path.stat().st_size):
        return NoSlice(path)
    with damage_named(path), HashingFile(path) as file:
        header = read_header(file, path, WANTED)
        if header is None:
            return NoSlice(path)
        modality = header.tags.text(MODALITY)
        if not header.classes <= CT_IMAGES or modality not in ("CT", "") or not (modality or header.classes):
            shows_pixels = header.tags.short(ROWS) > 0
            return NoSlice(path, _kind(header.classes, modality), header.tags.text(SERIES_UID) if shows_pixels else "")
        if header.transfer_syntax in DEFLATED:
            raise DataError("deflated DICOM file: its size is unknown before it is unpacked", UNPACK, path=str(path))
        return _slices(header, path, file.sha256())


def _kind(classes: frozenset[str], modality: str) -> str:
    names = [name_of_uid(uid).removesuffix(" Storage") for uid in sorted(classes)]
    return " and ".join(names) + (f" of modality {modality}" if modality else "") or UNKNOWN_KIND


def _slices(header: DicomHeader, path: Path, digest: str) -> list[Slice]:
    tags = header.tags
    pixels = _pixels(header, path)
    frames = tags.items(FRAME_GROUPS)
    count = tags.whole(FRAMES, 1)
    if len(frames) != count and (frames or count != 1):
        message = f"{count} frames, but the places of {len(frames)}"
        raise DataError(message, CONVERT, path=str(path))
    groups = _Groups(tags, next(iter(tags.items(SHARED_GROUPS)), None))
    found = []
    for number, frame in enumerate(frames or [None]):
        here = groups.of(frame)
        kind = here.get(FRAME_TYPE_GROUP, lambda part: part.text(FRAME_TYPE)) or tags.text(IMAGE_TYPE)
        found.append(
            Slice(
                path=path,
                sha256=digest,
                series=tags.text(SERIES_UID),
                number=tags.whole(SERIES_NUMBER),
                description=tags.text(DESCRIPTION)[:MAX_NAME],
                kernel=here.get(KERNEL_GROUP, lambda part: part.text(KERNEL))[:MAX_NAME],
                acquisition=tags.text(ACQUISITION),
                localizer="LOCALIZER" in kind.upper().split("\\"),
                size=(tags.short(COLUMNS), tags.short(ROWS)),
                frame=number,
                frames=count,
                position=here.get(PLACE_GROUP, _place),
                directions=_unit_vectors(here.get(DIRECTION_GROUP, lambda part: part.numbers(ORIENTATION, 6)) or ()),
                spacing_mm=here.get(MEASURE_GROUP, lambda part: part.numbers(PIXEL_SPACING, 2)) or (),
                rescale=_rescale(here.part(VALUE_GROUP), path),
                pixels=pixels,
            )
        )
    return found


@dataclass(frozen=True)
class _Groups:
    """Where a value may stand: in the frame's own groups, in those all frames share, or in the file itself."""

    tags: Tags
    shared: Tags | None
    frame: Tags | None = None

    def of(self, frame: Tags | None) -> _Groups:
        return _Groups(self.tags, self.shared, frame)

    def part(self, group: int) -> Tags:
        for holder in (self.frame, self.shared):
            items = holder.items(group) if holder is not None else []
            if items:
                return items[0]
        return self.tags

    def get(self, group: int, value: Callable[[Tags], Value]) -> Value:
        return value(self.part(group))


def _pixels(header: DicomHeader, path: Path) -> Pixels:
    tags = header.tags
    allocated = tags.short(ALLOCATED)
    stored = tags.short(STORED, allocated)
    high_bit, samples = tags.short(HIGH_BIT, stored - 1), tags.short(SAMPLES, 1)
    if not header.pixels_at or not tags.short(ROWS) or not tags.short(COLUMNS):
        raise DataError("a CT file without an image", DOWNLOAD_AGAIN, path=str(path))
    grey = tags.text(COLOUR) in ("", "MONOCHROME1", "MONOCHROME2")  # how they are shown does not change their values
    if not grey or samples != 1 or allocated not in (8, 16, 32) or not 0 < stored <= high_bit + 1 <= allocated:
        message = f"pixels of {samples} x {allocated} bits ({stored} stored) are not one real number each"
        raise DataError(message, CONVERT, path=str(path))
    signed = bool(tags.short(SIGNED))
    return Pixels(
        header.transfer_syntax,
        header.pixels_at,
        header.pixel_bytes,
        header.little_endian,
        allocated,
        stored,
        high_bit,
        signed,
    )


def _rescale(part: Tags, path: Path) -> tuple[float, float] | None:
    """Slope and intercept that lead to Hounsfield units."""
    unit = part.text(RESCALE_TYPE)[:MAX_NAME]
    if unit.upper() not in HOUNSFIELD_TYPES:
        message = f"its values are {unit} (RescaleType), not Hounsfield units"
        raise DataError(message, "give the reconstruction in HU", path=str(path))
    if SLOPE not in part and INTERCEPT not in part:
        return None
    slope, intercept = part.numbers(SLOPE, 1), part.numbers(INTERCEPT, 1)
    if not slope or not intercept or not 0 < abs(slope[0]) <= MAX_SLOPE or abs(intercept[0]) > MAX_INTERCEPT:
        stated = f"rescale slope {part.text(SLOPE)[:MAX_NAME]!r} and intercept {part.text(INTERCEPT)[:MAX_NAME]!r}"
        message = f"{stated} give no Hounsfield units"
        raise DataError(message, DOWNLOAD_AGAIN, path=str(path))
    return slope[0], intercept[0]


def _place(part: Tags) -> tuple[float, ...]:
    place = part.numbers(POSITION, 3)
    return place if place and max(map(abs, place)) <= MAX_PLACE_MM else ()


def _unit_vectors(values: tuple[float, ...]) -> tuple[float, ...]:
    if not values:
        return ()
    row, column = np.clip(np.reshape(values, (2, 3)), -2, 2)
    products = np.array([row @ row - 1, column @ column - 1, row @ column])
    return values if np.abs(products).max() < UNIT_TOLERANCE else ()
