"""Files of the table: parts that appear whole or not at all, joined into one parquet file at the end."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mg3d.atomic import atomic_path, writing
from mg3d.errors import DataError

CONFIG_KEY = b"mg3d.embedding"
ABOUT = "about"
"""Entry of the config that only informs; all others decide about the numbers."""

OVERWRITE = "use another --out, or add --overwrite to start anew"

_FIELDS = (
    pa.field("id", pa.string()),
    pa.field("path", pa.string()),
    pa.field("row", pa.int64()),
    pa.field("patient_id", pa.string()),
    pa.field("corpus", pa.string()),
    pa.field("split", pa.string()),
    pa.field("report", pa.string()),
    pa.field("labels", pa.list_(pa.int8())),
    pa.field("spacing_mm", pa.list_(pa.float32())),
    pa.field("source_sha256", pa.string()),
    pa.field("warnings", pa.list_(pa.string())),
    pa.field("record", pa.string()),
    pa.field("volumes", pa.int32()),
)


def make_schema(output: str, width: int, with_text: bool, config: Mapping[str, Any]) -> pa.Schema:
    """Schema of a table.

    Args:
        output: ``embedding``, ``pooled`` or ``tokens``: name of the column of features.
        width: E or P.
        with_text: also hold ``text_embedding`` [P], the vector of the report.
        config: what decided about the numbers; kept in the schema's metadata.
    """
    vector = pa.list_(pa.float32(), width)
    fields = [*_FIELDS, pa.field(output, pa.list_(vector) if output == "tokens" else vector)]
    if with_text:
        fields.append(pa.field("text_embedding", vector))
    return pa.schema(fields, metadata={CONFIG_KEY: json.dumps(dict(config), sort_keys=True)})


class Table:
    """The finished file and the parts of an unfinished run beside it.

    Args:
        out: parquet file.
        schema: of the rows.
    """

    def __init__(self, out: Path, schema: pa.Schema) -> None:
        self.out = out
        self.schema = schema
        self._folder = out.with_name(f".{out.name}.parts")

    def clear(self) -> None:
        """Remove what earlier runs left."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self.out.unlink(missing_ok=True)

    def done(self) -> dict[str, str]:
        """Names that earlier runs finished, and where these scans were.

        Raises:
            DataError: they used other weights or settings, or wrote a file that cannot be read.
        """
        names: dict[str, str] = {}
        for path in self._files():
            try:
                file = pq.ParquetFile(path)
            except (pa.ArrowException, OSError) as error:
                raise DataError(f"cannot be read ({error})", OVERWRITE, path=str(path)) from error
            self._check_same(file.schema_arrow, path)
            known = file.read(columns=["id", "path"])
            names |= zip(known.column("id").to_pylist(), known.column("path").to_pylist(), strict=True)
        return names

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write rows as the next part; a crash leaves no half of one."""
        with writing(self._folder):
            self._folder.mkdir(exist_ok=True)
        number = len(list(self._folder.glob("part-*.parquet")))
        path = self._folder / f"part-{number:06d}.parquet"
        columns = {field.name: [row.get(field.name) for row in rows] for field in self.schema}
        _write(path, self.schema, iter([pa.Table.from_pydict(columns, schema=self.schema)]))

    def finish(self) -> int:
        """Join everything into the one file; returns its rows."""
        files = self._files()
        if files != [self.out]:
            _write(self.out, self.schema, (batch for path in files for batch in _batches(path)))
            shutil.rmtree(self._folder, ignore_errors=True)
        return pq.ParquetFile(self.out).metadata.num_rows

    def _files(self) -> list[Path]:
        finished = [self.out] if self.out.is_file() else []
        return [*finished, *sorted(self._folder.glob("part-*.parquet"))]

    def _check_same(self, found: pa.Schema, path: Path) -> None:
        stored = json.loads((found.metadata or {}).get(CONFIG_KEY, b"{}"))
        wanted = json.loads(self.schema.metadata[CONFIG_KEY])
        other = [key for key in wanted if key != ABOUT and stored.get(key) != wanted[key]]
        if not stored or other:
            what = f"other {', '.join(other)}" if stored else "something else"
            raise DataError(f"the file there was made with {what}", OVERWRITE, path=str(path))
        if found.names != self.schema.names:
            raise DataError("the file there has other columns", OVERWRITE, path=str(path))


def _batches(path: Path) -> Iterator[pa.Table]:
    for batch in pq.ParquetFile(path).iter_batches(batch_size=256):
        yield pa.Table.from_batches([batch])


def _write(path: Path, schema: pa.Schema, tables: Iterator[pa.Table]) -> None:
    with (
        atomic_path(path, "free some space, then run the same command: it goes on from here") as partial,
        open(partial, "wb") as stream,
        pq.ParquetWriter(stream, schema, compression="zstd") as writer,
    ):
        for table in tables:
            writer.write_table(table.cast(schema))
