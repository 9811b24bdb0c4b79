"""Digest of a whole file, taken bit by bit while its rows are being checked."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Final

CHUNK_BYTES: Final = 1 << 20

Advance = Callable[[int], object]


def ignore_progress(_: int) -> None:
    """Take a progress report and do nothing."""


class FileDigest:
    """Reads a file from start to end on demand.

    Ordinary reads, a little ahead of the mapped rows: a bad disk block is an OSError here, where the map would end the
    process, and the pages are warm when the rows come.

    Args:
        path: the file.
        advance: told the number of bytes read since it was told last.

    Raises:
        OSError: the file cannot be opened; later, that it cannot be read.
    """

    def __init__(self, path: Path, advance: Advance = ignore_progress) -> None:
        self._handle = path.open("rb")
        self._size = path.stat().st_size
        self._advance = advance
        self._digest = hashlib.sha256()
        self.position = 0

    def __enter__(self) -> FileDigest:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, where: TracebackType | None
    ) -> None:
        self._handle.close()

    def read_to(self, share: float) -> None:
        """Read up to a share of the file, 0 to 1."""
        target = min(int(share * self._size) + CHUNK_BYTES, self._size)
        while self.position < target:
            data = self._handle.read(CHUNK_BYTES)
            if not data:
                return
            self._digest.update(data)
            self.position += len(data)
            self._advance(len(data))

    def finish(self) -> str:
        """Read the rest; return the sha256 of the file."""
        self.read_to(1.0)
        return self._digest.hexdigest()
