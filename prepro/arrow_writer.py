"""An Arrow file that grows row by row and can be taken up again after its writer was killed.

Until it is finished the file has no footer, but its rows can be read as a stream up to the last complete one. Taking
it up again means handing the same rows to a new Arrow writer whose bytes are compared with those on the disk instead
of being written: the file is neither copied nor in danger, and its digest is complete at the end.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from mg3d.datasets.arrow_schema import row_checksum

MAGIC_BYTES = 8
"""The file format puts its magic and padding before the stream of schema and rows."""


class GrowingArrow:
    """An Arrow IPC file under construction, one row per record batch.

    Args:
        path: the file; an existing one is compared with the rows that are added, until they differ or
            :meth:`end_replay` cuts off what is left.
        schema: of every row.
        compression: of the buffers: ``zstd`` or None.
    """

    def __init__(self, path: Path, schema: pa.Schema, compression: str | None = None) -> None:
        self._sink = _Sink(path)
        options = pa.ipc.IpcWriteOptions(compression=compression, use_threads=False)
        self._writer = pa.ipc.new_file(pa.PythonFile(self._sink, mode="w"), schema, options=options)

    @property
    def replaying(self) -> bool:
        """Whether everything added so far was on the disk already."""
        return self._sink.replaying

    def add(self, batch: pa.RecordBatch) -> None:
        """Append one row and hand it to the operating system.

        Args:
            batch: one-row batch of the schema.
        """
        self._writer.write_batch(batch)
        self._sink.flush()

    def end_replay(self) -> None:
        """Cut off what the disk holds beyond the rows added so far."""
        self._sink.end_replay()

    def finish(self) -> tuple[str, int]:
        """Write the footer and sync.

        Returns:
            sha256 and size in bytes of the whole file.
        """
        self._writer.close()
        return self._sink.finish()

    def close(self) -> None:
        """Let go of the file, finished or not."""
        self._sink.release()


class _Sink:
    """What Arrow writes into: compares with the file as long as it agrees, then writes; hashes all of it."""

    closed = False

    def __init__(self, path: Path) -> None:
        self._file = path.open("r+b" if path.exists() else "w+b")
        self._digest = hashlib.sha256()
        self._position = 0
        self.replaying = True

    def write(self, data: Any) -> int:
        """Take bytes from Arrow."""
        view = memoryview(data).cast("B")
        self._digest.update(view)
        if self.replaying and self._file.read(view.nbytes) != view:
            self.end_replay()
        if not self.replaying:
            self._file.write(view)
        self._position += view.nbytes
        return view.nbytes

    def end_replay(self) -> None:
        """From here on write."""
        if self.replaying:
            self._file.seek(self._position)
            self._file.truncate()
            self.replaying = False

    def flush(self) -> None:
        """Push buffered bytes to the operating system."""
        self._file.flush()

    def close(self) -> None:
        """Arrow closes its sink through this name; :meth:`release` closes the file."""

    def finish(self) -> tuple[str, int]:
        """Sync the file; returns its sha256 and size."""
        self.end_replay()
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._digest.hexdigest(), self._position

    def release(self) -> None:
        """Close the file."""
        self._file.close()


def stored_rows(path: Path, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """Read the rows of an unfinished file, as long as they are complete and undamaged.

    Args:
        path: a file of :class:`GrowingArrow`.
        schema: the schema it must have.

    Yields:
        one-row batches whose checksum fits.
    """
    try:
        with pa.OSFile(str(path)) as source:
            source.seek(MAGIC_BYTES)
            with pa.ipc.open_stream(source, options=pa.ipc.IpcReadOptions(use_threads=False)) as rows:
                if not rows.schema.equals(schema, check_metadata=True):
                    return
                for batch in rows:
                    if not is_sound(batch):
                        return
                    yield batch
    except (pa.ArrowException, OSError, ValueError):
        return  # cut off inside a row, as a kill leaves it


def is_sound(batch: pa.RecordBatch) -> bool:
    """Whether a one-row batch is complete and fits its checksum."""
    batch.validate(full=True)
    row = {name: batch.column(name)[0].as_py() for name in batch.schema.names if name != "image"}
    return row_checksum(memoryview(batch.column("image")[0].as_buffer()), row) == row["row_crc32"]
