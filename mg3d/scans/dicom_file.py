"""One DICOM file up to its pixels: which of its tags matter, read with suspicion.

pydicom reads the tags, in this process; it is pure Python, so that nested sequences end in an error and not in a crash.
Files without the 128-byte preamble, without the file meta group or with implicit types are read like all others.
Nothing is unpacked here.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mg3d.errors import DataError
from mg3d.scans.byte_stream import HashingFile
from mg3d.scans.raw_volume import DOWNLOAD_AGAIN

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
PREAMBLE_BYTES = 128
MAGIC = b"DICM"
BUFFER_BYTES = 1 << 16
MAX_HEADER_BYTES = 1 << 24  # of tags that are looked at; longer ones are skipped unread
MAX_NAME = 80  # letters of a name in messages
BYTES_OF_A_READ = 32  # what the shortest read counts: parsing small items costs time and memory
MAX_TEXT = 1024  # bytes of a value that is text
UNDEFINED = 0xFFFFFFFF
IMPLICIT, EXPLICIT, BIG_ENDIAN = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"
GE_PRIVATE = "1.2.840.113619.5.2"  # implicit types, pixels big-endian
NATIVE = (IMPLICIT, EXPLICIT, BIG_ENDIAN, GE_PRIVATE)
DEFLATED = ("1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.4.95", "1.2.840.10008.1.2.4.205")
TRANSFER_SYNTAX, MEDIA_CLASS, SOP_CLASS = 0x00020010, 0x00020002, 0x00080016
FIRST_PIXEL_TAG, PIXEL_DATA = 0x7FE00008, 0x7FE00010


class Tags:
    """Tags of a file, or of one item of a sequence, as text and numbers.

    Args:
        elements: parsed by pydicom.
        path: the file, for messages.
    """

    def __init__(self, elements: Dataset, path: Path) -> None:
        self._elements, self._path = elements, path

    def __contains__(self, tag: int) -> bool:
        return tag in self._elements

    def text(self, tag: int) -> str:
        """Text of a tag without padding, "" when absent."""
        value = self._raw(tag)
        text = value[:MAX_TEXT].decode("utf-8", "replace") if isinstance(value, bytes) else ""
        return "".join(letter for letter in text if letter.isprintable()).strip()

    def numbers(self, tag: int, count: int) -> tuple[float, ...]:
        """The ``count`` numbers of a tag of decimal strings; () when absent, of another count, or not finite."""
        try:
            values = tuple(float(part) for part in self.text(tag).split("\\"))
        except ValueError:
            return ()
        return values if len(values) == count and all(map(math.isfinite, values)) else ()

    def whole(self, tag: int, default: int = 0) -> int:
        """A whole number written as text; ``default`` when absent or none."""
        try:
            return int(self.text(tag))
        except ValueError:
            return default

    def short(self, tag: int, default: int = 0) -> int:
        """A 16-bit number (type US); ``default`` when absent."""
        value = self._raw(tag)
        if not isinstance(value, bytes) or len(value) < 2:
            return default
        little = getattr(self._elements.get_item(tag), "is_little_endian", True)
        return int.from_bytes(value[:2], "little" if little else "big")

    def items(self, tag: int) -> list[Tags]:
        """Items of a sequence, [] when absent."""
        if tag not in self._elements:
            return []
        from pydicom.dataelem import RawDataElement
        from pydicom.filereader import read_sequence

        element = self._elements.get_item(tag)
        with reading(self._path):
            if isinstance(element, RawDataElement):
                data = element.value or b""
                implicit = element.is_implicit_VR or element.VR == "UN"
                stream = _Bounded(io.BytesIO(data))  # type: ignore[arg-type]
                found = read_sequence(stream, implicit, element.is_little_endian, len(data), "iso8859")
            else:
                found = element.value
            return [Tags(item, self._path) for item in found]

    def _raw(self, tag: int) -> Any:
        return self._elements.get_item(tag).value if tag in self._elements else None


@dataclass(frozen=True)
class DicomHeader:
    """What a file says before its pixels.

    Attributes:
        tags: of the data set.
        classes: every SOP class the file states.
        transfer_syntax: how it is stored.
        little_endian: byte order.
        pixels_at: place of the pixel bytes (or of their first item) in the file; 0 without pixels.
        pixel_bytes: their number; None for pixels in items of compressed data.
    """

    tags: Tags
    classes: frozenset[str]
    transfer_syntax: str
    little_endian: bool
    pixels_at: int
    pixel_bytes: int | None


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what pydicom raises on a damaged file into an error that names it; its warnings are repeated by the checks.

    Args:
        path: the file.

    Raises:
        DataError: in place of any other error.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except DataError:
        raise
    except RecursionError:
        raise DataError("sequences are nested too deeply", DOWNLOAD_AGAIN, path=str(path)) from None
    except Exception as problem:
        message = f"unreadable DICOM header ({str(problem)[:120] or type(problem).__name__})"
        raise DataError(message, DOWNLOAD_AGAIN, path=str(path)) from None


class _Bounded(io.BufferedReader):
    """A stream that gives no more than a header may hold; what is skipped does not count."""

    left = MAX_HEADER_BYTES

    def read(self, size: int | None = -1, /) -> bytes:
        """Read and count."""
        if size is None or not 0 <= size <= self.left:
            raise ValueError(f"more than {MAX_HEADER_BYTES >> 20} MiB of tags")
        self.left -= max(size, BYTES_OF_A_READ)
        return super().read(size)


def name_of_uid(uid: str) -> str:
    """What the standard calls a UID; a part of it where it is unknown."""
    from pydicom.config import IGNORE
    from pydicom.uid import UID

    return str(UID(uid, IGNORE).name)[:MAX_NAME]


def is_dicom(path: Path) -> bool:
    """Whether a file is a DICOM file, by its ending or, without a known one, by its first bytes."""
    if path.name.lower().endswith(DICOM_SUFFIXES):
        return path.is_file()
    if path.suffix and not path.suffix[1:].isdigit():
        return False
    try:
        if not path.is_file():
            return False
        with open(path, "rb") as stream:
            return data_set_start(stream.read(PREAMBLE_BYTES + len(MAGIC))) is not None
    except OSError:
        return False


def data_set_start(head: bytes) -> int | None:
    """Where the tags begin: after preamble and mark, or at once; None when the bytes are no DICOM file.

    Args:
        head: the first 132 bytes.
    """
    if head[PREAMBLE_BYTES:].startswith(MAGIC):
        return PREAMBLE_BYTES + len(MAGIC)
    for order in ("little", "big"):
        group, element = (int.from_bytes(head[at : at + 2], order) for at in (0, 2))  # type: ignore[arg-type]
        explicit = head[4:6].isalpha() and head[4:6].isupper()
        length = int.from_bytes(head[4:8], order)  # type: ignore[arg-type]
        if group in (2, 8) and element <= 0x1000 and len(head) > 8 and (explicit or length <= 1024):
            return 0
    return None


def read_header(file: HashingFile, path: Path, wanted: list[int]) -> DicomHeader | None:
    """Read the tags of one file.

    Args:
        file: the open file.
        path: its name, for messages.
        wanted: tags to keep.

    Returns:
        the header, of a deflated file without its tags; None when the file is no DICOM file.

    Raises:
        DataError: damaged tags.
    """
    from pydicom.dataset import Dataset
    from pydicom.filereader import read_dataset

    start = data_set_start(file.read(PREAMBLE_BYTES + len(MAGIC)) or b"")
    if start is None:
        return None
    file.seek(start)
    stream = _Bounded(file, BUFFER_BYTES)
    with reading(path):
        meta = Tags(read_dataset(stream, False, True, stop_when=lambda tag, *_: tag >> 16 != 2), path)
        syntax = meta.text(TRANSFER_SYNTAX)
        if syntax in DEFLATED:
            return DicomHeader(Tags(Dataset(), path), _classes(meta), syntax, True, 0, None)
        implicit, little = _encoding(stream, syntax)
        found = read_dataset(
            stream, implicit, little, stop_when=lambda tag, *_: tag >= FIRST_PIXEL_TAG, specific_tags=list(wanted)
        )
        implicit = bool(found.original_encoding[0])
        pixels_at, pixel_bytes = _pixel_place(stream, implicit, little)
    stream.detach()
    tags = Tags(found, path)
    syntax = syntax or (IMPLICIT if implicit else EXPLICIT if little else BIG_ENDIAN)
    return DicomHeader(tags, _classes(tags, meta), syntax, little and syntax != GE_PRIVATE, pixels_at, pixel_bytes)


def _classes(*parts: Tags) -> frozenset[str]:
    return frozenset(part.text(tag) for part in parts for tag in (SOP_CLASS, MEDIA_CLASS)) - {""}


def _encoding(stream: _Bounded, syntax: str) -> tuple[bool, bool]:
    """Whether types are implicit, and little-endian: as the first tag looks, whatever the file says."""
    place = stream.tell()
    first = stream.read(8)
    stream.seek(place)
    implicit = not (first[4:6].isalpha() and first[4:6].isupper())
    big = syntax == BIG_ENDIAN or (not syntax and first[:1] == b"\0" and first[1:2] != b"\0")
    return implicit, not big


def _pixel_place(stream: _Bounded, implicit: bool, little: bool) -> tuple[int, int | None]:
    head = stream.read(8)
    order: Any = "little" if little else "big"
    tag = int.from_bytes(head[:2], order) << 16 | int.from_bytes(head[2:4], order)
    if len(head) < 8 or tag != PIXEL_DATA:
        return 0, 0
    length = int.from_bytes(head[4:8] if implicit else stream.read(4), order)
    return stream.tell(), None if length == UNDEFINED else length
