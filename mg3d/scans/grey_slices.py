"""Scans kept as one 8-bit image file a slice: in natural order, decoded when asked for, named when damaged."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from mg3d.errors import DataError
from mg3d.paths import visible_files
from mg3d.scans.byte_stream import digest_of_files

SLICE_SUFFIXES = (".jpg", ".jpeg", ".png")
MAX_SLICE_PIXELS = 4096 * 4096
MAX_SLICE_BYTES = 4 * MAX_SLICE_PIXELS


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
    return sort_slices(
        [file for file in visible_files(folder, "*") if file.suffix.lower() in SLICE_SUFFIXES], str(folder)
    )


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
            if len(content) > MAX_SLICE_BYTES:
                raise DataError(f"slice file of more than {MAX_SLICE_BYTES} bytes", "check the file", path=str(path))
            self._digests[path] = hashlib.sha256(content).hexdigest()
            with Image.open(io.BytesIO(content)) as image:
                if image.width * image.height > MAX_SLICE_PIXELS:
                    raise DataError(f"slice of {image.width} x {image.height} pixels", "check the file", path=str(path))
                pixels = np.asarray(image.convert("L"))
        except UnidentifiedImageError as problem:
            raise DataError("slice is no picture that can be decoded", "download it again", path=str(path)) from problem
        except (OSError, ValueError, SyntaxError) as problem:
            raise DataError(f"slice cannot be decoded ({problem})", "download it again", path=str(path)) from problem
        if pixels.shape != getattr(self, "shape", pixels.shape):
            raise DataError(f"slice of shape {pixels.shape} among {self.shape}", "check the folder", path=str(path))
        return pixels

    def sha256(self) -> str:
        """Digest over all files, those that were never decoded included."""
        for path in self.files:
            if path not in self._digests:
                self._digests[path] = hashlib.sha256(path.read_bytes()).hexdigest()
        return digest_of_files(self._digests.values())
