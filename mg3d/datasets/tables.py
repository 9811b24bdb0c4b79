"""Small csv tables: columns are checked when they are read, files are written whole or not at all."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from mg3d.errors import DataError

__all__ = ["read_table", "write_table"]


def read_table(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Read a csv table whose first row names the columns.

    Args:
        path: the file; a byte-order mark is dropped.
        columns: names that must be there; others are read as well.

    Returns:
        one dictionary a row, texts as stored.

    Raises:
        DataError: no such file, not text, a column is missing, or a row is cut short.
    """
    if not path.is_file():
        raise DataError("no such table", "complete the download, or mend data_root", path=str(path))
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            missing = [name for name in columns if name not in (reader.fieldnames or ())]
            if missing:
                found = ", ".join(reader.fieldnames or ()) or "nothing"
                message = f"column {', '.join(missing)} is missing (found: {found[:200]})"
                remedy = "name the columns as published, between commas, or download the table again"
                raise DataError(message, remedy, path=str(path))
            rows = list(reader)
    except UnicodeDecodeError as problem:
        byte = f"byte 0x{problem.object[problem.start]:02x}"
        raise DataError(f"not UTF-8 ({byte})", "save the table as CSV in UTF-8", path=str(path)) from None
    except (OSError, csv.Error) as problem:
        raise DataError(f"cannot be read as a table ({problem})", "download the table again", path=str(path)) from None
    for number, row in enumerate(rows, start=2):
        if any(row[name] is None for name in columns):
            raise DataError(f"line {number} is cut short", "download the table again", path=str(path))
    return rows


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a csv table under a temporary name, then rename it.

    Args:
        path: the file; its folder is made.
        columns: header row.
        rows: one sequence a row, in the order of ``columns``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(columns)
            writer.writerows(rows)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
