"""Scans kept as one 8-bit image file a slice: in natural order, decoded when asked for, named when damaged.

:func:`grey_pixels` is the one way from an encoded picture to grey values, for every reader of slices. Its rule: one
picture a file, 8 bits a channel or fewer; grey is taken as it is, palette and colour by luminance. More bits are
REFUSED, not scaled: a file does not say whether its white is 255, 4095 or 65535, and guesses slice by slice would
differ inside a scan. Refused too are pictures of one bit, CMYK and the like, and transparent pixels, which have no grey
value.
"""

from __future__ import annotations

import hashlib
import io
import re
import struct
import warnings
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from mg3d.errors import DataError
from mg3d.scans.byte_stream import digest_of_files
from mg3d.scans.folders import files_in
from mg3d.scans.raw_volume import DOWNLOAD_AGAIN

SLICE_SUFFIXES = (".jpg", ".jpeg", ".png")
MAX_SLICE_PIXELS = 4096 * 4096
MAX_SLICE_BYTES = 4 * MAX_SLICE_PIXELS
GREY_MODES = ("L", "P", "RGB", "LA", "PA", "RGBA")
BITS = re.compile(r";(\d+)")  # of Pillow's raw modes: I;16B, RGB;16B, I;12, F;32F, L;4
DECODING_ERRORS = (
    *(OSError, ValueError, SyntaxError, TypeError, EOFError, LookupError, ArithmeticError, AttributeError),
    *(struct.error, zlib.error, Image.DecompressionBombError),
)
EIGHT_BITS = "save all slices of the scan as 8-bit grey, with one window for the whole scan"


def natural_key(name: str) -> list[tuple[int, int | str]]:
    """Sort key that puts ``slice_2`` before ``slice_10``.

    Args:
        name: a file or case name.

    Returns:
        digits as numbers, the rest as lower-case text.
    """
    parts = re.split(r"(\d+)", name)
    return [(1, int(part)) if part.isdecimal() else (0, part.lower()) for part in parts]


def sort_slices(files: Sequence[Path], shown: str) -> tuple[Path, ...]:
    """Slice files in natural order of their names.

    Args:
        files: the files, other kinds left out already.
        shown: the place, for the message.

    Raises:
        DataError: there is none.
    """
    if not files:
        raise DataError(f"no jpg or png slice in {shown!r}", "download the scan again")
    return tuple(sorted(files, key=lambda file: natural_key(file.name)))


def folder_slices(folder: Path) -> tuple[Path, ...]:
    """Slice files of a folder in natural order.

    Raises:
        DataError: there is none.
    """
    return sort_slices([file for file in files_in(folder) if file.suffix.lower() in SLICE_SUFFIXES], str(folder))


def grey_pixels(content: bytes, *, path: str = "", case_id: str = "", name: str = "slice") -> np.ndarray:
    """Decode one slice by the rule of this module.

    Args:
        content: the bytes of the picture.
        path: the file, for messages.
        case_id: the scan, for messages.
        name: what to call the slice in messages.

    Returns:
        uint8 [H, W].

    Raises:
        DataError: no picture, a damaged or too large one, or one without 8-bit grey values.
    """

    def refusal(what: str, remedy: str = DOWNLOAD_AGAIN) -> DataError:
        return DataError(f"{name} {what}", remedy, path=path, case_id=case_id)

    if len(content) > MAX_SLICE_BYTES:
        raise refusal(f"has more than {MAX_SLICE_BYTES} bytes", "check the file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow: the size is checked here, damage is refused
            with Image.open(io.BytesIO(content)) as image:
                if reason := _reason_against(image):
                    raise refusal(*reason)
                pixels = np.asarray(image.convert("L"))
                opaque = "A" not in image.mode or np.asarray(image.getchannel("A")).min() == 255
    except UnidentifiedImageError as problem:
        raise refusal("is no picture that can be decoded") from problem
    except DECODING_ERRORS as problem:
        raise refusal(f"cannot be decoded ({problem})") from problem
    if not opaque:
        raise refusal("has transparent pixels, which have no grey value", EIGHT_BITS)
    return pixels


def _reason_against(image: Image.Image) -> tuple[str, str] | None:
    """Why a picture has no 8-bit grey values and what to do, from its header; None if it has."""
    if image.width * image.height > MAX_SLICE_PIXELS:
        return f"of {image.width} x {image.height} pixels", "check the file"
    if getattr(image, "n_frames", 1) > 1:
        return f"holds {image.n_frames} pictures", "keep one slice per file"  # type: ignore[attr-defined]
    stored = " ".join([image.mode, *(str(tile[3]) for tile in image.tile)])  # type: ignore[attr-defined]
    bits = max([8, *map(int, BITS.findall(stored))])
    if image.mode in ("I", "F"):
        bits = max(bits, 32)
    if bits > 8:
        return f"has {bits} bits a pixel (mode {image.mode}): which value is white is unknown", EIGHT_BITS
    if image.mode not in GREY_MODES:
        return f"has {'1 bit a pixel' if image.mode == '1' else f'mode {image.mode}'}, no grey values", EIGHT_BITS
    return None


class SliceFiles(Sequence[np.ndarray]):
    """Slice files as a sequence of uint8 [H, W] arrays, decoded when they are asked for.

    Args:
        files: in the order of the slices.

    Raises:
        DataError: the first one cannot be decoded.
    """

    def __init__(self, files: tuple[Path, ...]) -> None:
        self.files = files
        self._digests: dict[Path, str] = {}
        self.shape: tuple[int, int] = self[0].shape

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[index] for index in range(len(self.files)))

    def __getitem__(self, index: Any) -> Any:
        path = self.files[index]
        try:
            with path.open("rb") as file:
                content = file.read(MAX_SLICE_BYTES + 1)
        except OSError as problem:
            message = f"slice cannot be read ({problem.strerror or problem})"
            raise DataError(message, DOWNLOAD_AGAIN, path=str(path)) from problem
        self._digests[path] = hashlib.sha256(content).hexdigest()
        pixels = grey_pixels(content, path=str(path))
        if pixels.shape != getattr(self, "shape", pixels.shape):
            raise DataError(f"slice of shape {pixels.shape} among {self.shape}", "check the folder", path=str(path))
        return pixels

    def sha256(self) -> str:
        """Digest over all files, those that were never decoded included."""
        for path in self.files:
            if path not in self._digests:
                self._digests[path] = hashlib.sha256(path.read_bytes()).hexdigest()
        return digest_of_files(self._digests.values())
