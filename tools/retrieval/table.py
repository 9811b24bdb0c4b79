"""The table that ``tools/embed.py`` wrote, as arrays to search in."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mg3d.errors import DataError
from prepro.readers.tables import strip_suffix

CONFIG_KEY: Final = b"mg3d.embedding"
SEARCHABLE: Final = ("embedding", "pooled")
_TEXT_COLUMNS: Final = ("path", "patient_id", "corpus", "split", "report")


@dataclass(frozen=True)
class EmbeddingTable:
    """n scans with their vectors.

    Attributes:
        path: the parquet file.
        ids: unique names.
        vectors: unit vectors [n, P] float32.
        kind: ``embedding`` (space shared with texts) or ``pooled`` (image features alone).
        text_vectors: unit vectors [n, P] of the scans' own reports; None where the table has none.
        columns: text columns by name; empty strings where a value is missing.
        config: what decided about the numbers.
    """

    path: Path
    ids: list[str]
    vectors: np.ndarray
    kind: str
    text_vectors: np.ndarray | None
    columns: dict[str, list[str]]
    config: dict[str, Any]

    def __len__(self) -> int:
        return len(self.ids)

    def row_of(self, name: str) -> int:
        """Row of a scan by its id, or by the last part of it if only one scan has that.

        Raises:
            DataError: no or several such scans.
        """
        if name in self.ids:
            return self.ids.index(name)
        short = strip_suffix(name.rstrip("/"))
        rows = [row for row, known in enumerate(self.ids) if f"/{strip_suffix(known)}".endswith(f"/{short}")]
        if len(rows) == 1:
            return rows[0]
        some = ", ".join(self.ids[row] for row in rows[:3]) if rows else f"{', '.join(self.ids[:3])} ..."
        problem = f"{len(rows)} scans are called {name!r}" if rows else f"no scan is called {name!r}"
        raise DataError(problem, f"name one of: {some}", path=str(self.path))

    def need_shared_space(self) -> None:
        """Raise DataError if the vectors cannot be compared with texts."""
        if self.kind != "embedding":
            raise DataError(
                "holds pooled image features, which no text can be compared with",
                "make it with tools/embed.py --output embedding and weights that have a shared space",
                path=str(self.path),
            )

    def need_weights(self, digest: str) -> None:
        """Raise DataError if the table was made with other weights than those of ``digest``."""
        if self.config.get("weights") != digest:
            made = (self.config.get("about") or {}).get("weights", "unknown weights")
            raise DataError(f"was made with other weights ({made})", "give the same --weights", path=str(self.path))


def read_embeddings(path: Path) -> EmbeddingTable:
    """Read a table.

    Args:
        path: parquet file of ``tools/embed.py``.

    Raises:
        DataError: missing, unreadable, empty, without vectors, or with vectors that are no directions.
    """
    if not path.is_file():
        raise DataError("no such table", "make it with tools/embed.py", path=str(path))
    try:
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
        kind = next((name for name in SEARCHABLE if name in names), None)
        if kind is None or "id" not in names:
            raise DataError("holds no embeddings", "make it with tools/embed.py", path=str(path))
        wanted = [name for name in ("id", *_TEXT_COLUMNS, kind, "text_embedding") if name in names]
        table = file.read(columns=wanted)
        config = json.loads((file.schema_arrow.metadata or {}).get(CONFIG_KEY, b"{}"))
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"cannot be read ({error})", "make it again with tools/embed.py", path=str(path)) from error
    if not table.num_rows:
        raise DataError("holds no scan", "make it again with tools/embed.py", path=str(path))
    text = {name: [value or "" for value in table.column(name).to_pylist()] for name in wanted if name in _TEXT_COLUMNS}
    own_text = _matrix(table, "text_embedding", path, may_be_zero=True) if "text_embedding" in wanted else None
    ids = table.column("id").to_pylist()
    return EmbeddingTable(path, ids, _matrix(table, kind, path), kind, own_text, text, config)


def _matrix(table: pa.Table, name: str, path: Path, *, may_be_zero: bool = False) -> np.ndarray:
    """Rows of unit length [n, P]; zero rows (reports without words) stay zero where they may."""
    column = table.column(name).combine_chunks()
    if column.null_count:
        raise DataError(f"{column.null_count} rows have no {name}", "make the table again", path=str(path))
    rows = np.asarray(column.flatten(), dtype=np.float32).reshape(len(column), -1)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    if not np.isfinite(rows).all() or (not may_be_zero and (lengths == 0).any()):
        raise DataError(f"column {name} holds NaN, infinity or zero vectors", "make it again", path=str(path))
    return rows / np.where(lengths > 0, lengths, 1)
