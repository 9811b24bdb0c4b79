"""Bytes of a scan file: digested while they are read, decompressed with their checksum, never more than expected."""

from __future__ import annotations

import hashlib
import io
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from isal import igzip, isal_zlib
from isal.igzip_lib import IsalError

from mg3d.errors import DataError
from mg3d.scans.raw_volume import DOWNLOAD_AGAIN

GZIP_MAGIC = b"\x1f\x8b"
GZIP_TRAILER_BYTES = 8
MAX_TRAILING_BYTES = 1024
CHUNK_BYTES = 1 << 22
DAMAGE: tuple[type[Exception], ...] = (  # type: ignore[assignment]
    EOFError,
    zlib.error,
    IsalError,
    igzip.BadGzipFile,
    zipfile.BadZipFile,
)


class HashingFile(io.RawIOBase):
    """A file that digests its bytes in the order of the file, whatever order they are asked for.

    Args:
        path: the file.

    Raises:
        DataError: the file is missing or empty.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise DataError("file not found", "check the path or download the file", path=str(path))
        self.size = path.stat().st_size
        if not self.size:
            raise DataError("the file is empty", DOWNLOAD_AGAIN, path=str(path))
        self._file = path.open("rb", buffering=0)
        self._sha256 = hashlib.sha256()
        self._digested = 0

    def readable(self) -> bool:
        """Tell that bytes can be read."""
        return True

    def seekable(self) -> bool:
        """Tell that the position can be moved."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer from the current position; digest what was not seen before and is next in order."""
        view, position = memoryview(buffer).cast("B"), self._file.tell()
        count = _fill(self._file, view)
        if position <= self._digested < position + count:
            self._sha256.update(view[self._digested - position : count])
            self._digested = position + count
        return count

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move the position."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """Return the position."""
        return self._file.tell()

    def sha256(self) -> str:
        """Read what is left and return the digest of the whole file."""
        self._file.seek(self._digested)
        while block := self._file.read(CHUNK_BYTES):
            self._sha256.update(block)
            self._digested += len(block)
        return self._sha256.hexdigest()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()


def digest_of_files(digests: Iterable[str]) -> str:
    """Return one digest for a scan of several files, independent of their names and order.

    Args:
        digests: SHA-256 of every file, hexadecimal.
    """
    return hashlib.sha256("\n".join(sorted(digests)).encode("ascii")).hexdigest()


@contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Turn the errors of decompressors and of the system into one that names the file.

    Args:
        path: the file that is read inside.

    Raises:
        DataError: in place of any of those errors.
    """
    try:
        yield
    except DAMAGE as problem:
        raise DataError(f"damaged or truncated compressed data ({problem})", DOWNLOAD_AGAIN, path=str(path)) from None
    except OSError as problem:
        raise DataError(f"cannot be read ({problem.strerror or problem})", DOWNLOAD_AGAIN, path=str(path)) from problem


def gunzip(stream: IO[bytes] | io.RawIOBase) -> IO[bytes]:
    """Decompress a gzip stream from its current position; reading to its end verifies the checksum.

    Args:
        stream: compressed bytes.
    """
    return igzip.IGzipFile(fileobj=stream, mode="rb")  # type: ignore[return-value]


class InflatedStream(io.RawIOBase):
    """A zlib stream, decompressed piece by piece; its end marker and checksum are verified.

    Args:
        stream: compressed bytes, from the current position.
    """

    def __init__(self, stream: IO[bytes] | io.RawIOBase) -> None:
        self._stream = stream
        self._decoder = isal_zlib.decompressobj(wbits=15)
        self._pending = b""

    def readable(self) -> bool:
        """Tell that bytes can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer, perhaps partly; 0 at the verified end.

        Raises:
            EOFError: the compressed bytes end before the stream does.
        """
        while not self._decoder.eof:
            data = self._pending or self._stream.read(CHUNK_BYTES) or b""
            piece = self._decoder.decompress(data, len(buffer))
            self._pending = self._decoder.unconsumed_tail
            if piece:
                buffer[: len(piece)] = piece
                return len(piece)
            if not data and not self._decoder.eof:
                raise EOFError("the compressed data stop before their end marker")
        return 0


def read_voxels(stream: Any, shape: tuple[int, int, int], dtype: np.dtype[Any], path: str) -> np.ndarray:
    """Read exactly the voxels that the header promises, then make sure that (nearly) nothing follows.

    Reading on to the end is what makes a decompressor verify its checksum.

    Args:
        stream: uncompressed voxel bytes, X fastest.
        shape: (X, Y, Z).
        dtype: stored number type, either byte order.
        path: the file, for messages.

    Returns:
        writable array [X,Y,Z] in native byte order.

    Raises:
        DataError: too few or far too many bytes.
    """
    buffer = np.empty(int(np.prod(shape, dtype=np.int64)) * dtype.itemsize, dtype=np.uint8)
    filled = _fill(stream, buffer.data)
    if filled < buffer.size:
        raise DataError(f"holds {filled} of {buffer.size} voxel bytes", DOWNLOAD_AGAIN, path=path)
    if _fill(stream, memoryview(bytearray(MAX_TRAILING_BYTES + 1))) > MAX_TRAILING_BYTES:
        raise DataError("more data than the header says", DOWNLOAD_AGAIN, path=path)
    voxels = buffer.view(dtype)
    if not dtype.isnative:
        voxels = voxels.byteswap(inplace=True).view(dtype.newbyteorder("="))
    return voxels.reshape(shape, order="F")


def _fill(stream: Any, view: memoryview) -> int:
    filled = 0
    while filled < len(view):
        count = stream.readinto(view[filled : filled + CHUNK_BYTES])
        if not count:
            break
        filled += count
    return filled


def with_gzip_trailer(path: Path) -> IO[bytes] | None:
    """Complete a file whose compressed data is whole but whose eight-byte trailer was never written.

    Args:
        path: a gzip file that ended too early.

    Returns:
        the file with the trailer it should have; None when the data itself is cut short, or when the file is not
        one gzip member.
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
    return gunzip(io.BytesIO(whole))


def _gzip_header_length(data: bytes) -> int:
    flags = data[3] if len(data) > 3 else 0
    position = 10
    if flags & 4:
        position += 2 + int.from_bytes(data[position : position + 2], "little")
    for text_flag in (8, 16):
        if flags & text_flag:
            position = data.find(b"\0", position) + 1 or len(data)
    return position + (2 if flags & 2 else 0)
