"""Rows of packed Arrow files through memory maps: opened lazily in each process, checked, never copied.

Files with compressed buffers (``store=native``) are read alike: Arrow decompresses a row when it is asked for.
"""

from __future__ import annotations

import bisect
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa

from mg3d.datasets.arrow_schema import IMAGE_DTYPES, Layout, check_schema, row_checksum
from mg3d.errors import DataError

MAX_OPEN_FILES: Final = 16
_REPACK: Final = "pack the file again with prepro, or copy it again from its source"


class ArrowTable:
    """Rows of one or more Arrow IPC files, in the order of the files.

    A file is mapped on first use in the process that reads it (also after fork or unpickling); at most 16 stay open.
    Only offsets are kept in memory, so worker processes do not grow over an epoch.

    Args:
        paths: the files; all of one layout.
        verify_crc: compare the checksum of every row that is read.

    Raises:
        DataError: a file is missing, damaged, empty, or lacks a column.
    """

    def __init__(self, paths: Sequence[str | Path], *, verify_crc: bool = True) -> None:
        if not paths:
            raise DataError("no Arrow file given", "give at least one path")
        self.paths = [str(Path(path).expanduser()) for path in paths]
        self.verify_crc = verify_crc
        self._readers: OrderedDict[int, pa.ipc.RecordBatchFileReader] = OrderedDict()
        self._owner = os.getpid()
        self.schema, self.layout, counts = self._inspect()
        self._batch_ends = [np.cumsum(count) for count in counts]
        self._file_ends = np.cumsum([int(ends[-1]) for ends in self._batch_ends])

    def __len__(self) -> int:
        return int(self._file_ends[-1])

    def __repr__(self) -> str:
        return f"ArrowTable({len(self)} rows, {len(self.paths)} file(s), layout {self.layout})"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_readers": OrderedDict()}

    @property
    def metadata(self) -> dict[str, str]:
        """Schema metadata of the first file as text."""
        return {key.decode(): value.decode() for key, value in (self.schema.metadata or {}).items()}

    def row(self, index: int) -> dict[str, Any]:
        """Return one row: ``image`` as a read-only array ``[D, H, W]`` over the mapped file, other columns as values.

        Where the file is compressed, ``image`` is an array of its own. In the published layout it is a list of
        encoded slices, or None where the file holds no pixels.

        Raises:
            IndexError: no such row.
            DataError: the row is damaged; the message names file and row.
        """
        file, batch_number, offset = self._locate(index)
        place = f"{self.paths[file]} row {index - self._first_row(file)}"
        try:
            batch = self._reader(file).get_batch(batch_number)
            batch.validate(full=True)
            if self.layout == "published":
                return _published_row(batch, offset)
            return self._packed_row(batch, place)
        except (pa.ArrowException, OSError, ValueError, OverflowError, IndexError) as error:
            raise DataError(f"the row cannot be read ({_short(error)})", _REPACK, path=place) from error

    def column(self, name: str) -> list[Any]:
        """Return one column of all rows as Python values (no pixels are touched).

        Raises:
            DataError: there is no such column, or it holds pixels.
        """
        if name == "image" or name not in self.schema.names:
            raise DataError(f"no readable column {name!r}", f"columns: {', '.join(self.schema.names)}")
        return list(self._values(name))

    def release(self) -> None:
        """Close the maps of this process, which returns their pages; the next row opens its file again."""
        self._readers.clear()

    def _values(self, name: str) -> Iterator[Any]:
        for file, ends in enumerate(self._batch_ends):
            # a reader of this column alone: no other one is decompressed
            reader = _open(self.paths[file], [self._reader(file).schema.get_field_index(name)])
            for number in range(len(ends)):
                yield from reader.get_batch(number).column(name).to_pylist()

    def _inspect(self) -> tuple[pa.Schema, Layout, list[np.ndarray]]:
        schemas, layouts, counts = [], [], []
        for file, path in enumerate(self.paths):
            try:
                reader = self._reader(file)
                schemas.append(reader.schema)
                layouts.append(check_schema(reader.schema, path=path))
                counts.append(_rows_per_batch(reader, layouts[-1], path))
            except (pa.ArrowException, ValueError, OSError, KeyError) as error:
                raise DataError(f"the header is damaged ({_short(error)})", _REPACK, path=path) from error
        if len(set(layouts)) > 1:
            raise DataError(
                f"files of different layouts: {dict(zip(self.paths, layouts, strict=True))}", "load them apart"
            )
        for path, schema in zip(self.paths[1:], schemas[1:], strict=True):
            if schema.metadata != schemas[0].metadata and layouts[0] == "mg3d":
                raise DataError(f"other metadata than {self.paths[0]}", "shards must come from one packing", path=path)
        return schemas[0], layouts[0], counts

    def _reader(self, file: int) -> pa.ipc.RecordBatchFileReader:
        if self._owner != os.getpid():
            self._readers, self._owner = OrderedDict(), os.getpid()
        if file not in self._readers:
            self._readers[file] = _open(self.paths[file])
            if len(self._readers) > MAX_OPEN_FILES:
                self._readers.popitem(last=False)
        self._readers.move_to_end(file)
        return self._readers[file]

    def _first_row(self, file: int) -> int:
        return int(self._file_ends[file - 1]) if file else 0

    def _locate(self, index: int) -> tuple[int, int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        file = bisect.bisect_right(self._file_ends, index)
        inside = index - self._first_row(file)
        batch = bisect.bisect_right(self._batch_ends[file], inside)
        return file, batch, inside - (int(self._batch_ends[file][batch - 1]) if batch else 0)

    def _packed_row(self, batch: pa.RecordBatch, place: str) -> dict[str, Any]:
        if batch.num_rows != 1:
            raise DataError(f"the record batch holds {batch.num_rows} rows instead of one", _REPACK, path=place)
        row = {name: batch.column(name)[0].as_py() for name in batch.schema.names if name != "image"}
        place = f"{place} ({row['image_id']})"
        empty = [name for name, value in row.items() if value is None]
        pixels = batch.column("image")
        if empty or pixels.null_count:
            raise DataError(f"column {', '.join(empty or ['image'])} is null", _REPACK, path=place)
        data = _mapped_bytes(pixels)
        row["image"] = _as_volume(data, row["image_shape"], row["image_dtype"], place)
        if self.verify_crc and row_checksum(memoryview(data), row) != row["row_crc32"]:
            raise DataError("the checksum does not fit: the row was damaged after packing", _REPACK, path=place)
        return row


def _open(path: str, columns: list[int] | None = None) -> pa.ipc.RecordBatchFileReader:
    if not os.path.isfile(path):
        folder = os.path.dirname(path) or "."
        near = sorted(name for name in os.listdir(folder) if name.endswith(".arrow")) if os.path.isdir(folder) else []
        found = ", ".join(near[:6]) if near else "no .arrow file"
        raise DataError(f"no such file (its folder holds {found})", "pack the data, or mend the path", path=path)
    size = os.path.getsize(path)
    if size == 0:
        raise DataError("the file is empty (0 bytes)", _REPACK, path=path)
    try:
        return pa.ipc.open_file(
            pa.memory_map(path), options=pa.ipc.IpcReadOptions(use_threads=False, included_fields=columns)
        )
    except (pa.ArrowException, OSError) as error:
        with open(path, "rb") as handle:
            head = handle.read(6)
        reason = "it is cut off or damaged" if head == b"ARROW1" else "it is no Arrow file (perhaps an Arrow stream)"
        raise DataError(f"cannot be opened, {reason}; {size} bytes, {_short(error)}", _REPACK, path=path) from error


def _rows_per_batch(reader: pa.ipc.RecordBatchFileReader, layout: Layout, path: str) -> np.ndarray:
    """Rows of each batch; packed files promise one, so that nothing but the footer is read."""
    batches = reader.num_record_batches
    counts = [1] * batches if layout == "mg3d" else [reader.get_batch(n).num_rows for n in range(batches)]
    if sum(counts) == 0:
        raise DataError("the file holds no rows", "pack the split again, or leave the corpus out", path=path)
    return np.asarray(counts)


def _published_row(batch: pa.RecordBatch, offset: int) -> dict[str, Any]:
    row = {name: batch.column(name)[offset].as_py() for name in batch.schema.names}
    row.setdefault("image", None)
    return row


def _mapped_bytes(pixels: pa.LargeBinaryArray) -> pa.Buffer:
    """Bytes of a one-element column as a slice of the map; taking its scalar would copy them."""
    _, offsets, values = pixels.buffers()
    width = np.int64 if pa.types.is_large_binary(pixels.type) else np.int32
    start, end = np.frombuffer(offsets, dtype=width)[pixels.offset : pixels.offset + 2].tolist()
    return values.slice(start, end - start)


def _as_volume(data: pa.Buffer, shape: Sequence[int], dtype: str, place: str) -> np.ndarray:
    if dtype not in IMAGE_DTYPES:
        raise DataError(f"image_dtype {dtype!r}, expected one of {sorted(IMAGE_DTYPES)}", _REPACK, path=place)
    if len(shape) != 3 or min(shape) < 1:
        raise DataError(f"image_shape {list(shape)} is not three positive sizes", _REPACK, path=place)
    itemsize = IMAGE_DTYPES[dtype].itemsize
    expected = itemsize * int(np.prod(shape, dtype=np.int64))
    if data.size != expected:
        raise DataError(
            f"image holds {data.size} bytes, but shape {list(shape)} of {dtype} needs {expected}", _REPACK, path=place
        )
    volume = np.frombuffer(data, dtype=IMAGE_DTYPES[dtype]).reshape(shape)
    volume.flags.writeable = False  # the pages are mapped read-only: writing would kill the process
    return volume


def row_text(row: Mapping[str, Any], name: str) -> list[str]:
    """Return a text column of a row as a list of strings, nulls left out."""
    return [text for text in row.get(name) or [] if text is not None]


def _short(error: BaseException) -> str:
    text = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {text[:120]}"
