"""Tables and paths of a download, read without guessing."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from pathlib import Path

from mg3d.errors import DataError

csv.field_size_limit(16 * 2**20)


def read_table(path: Path, columns: Iterable[str]) -> list[dict[str, str]]:
    """Read a CSV as text: an empty cell stays an empty string and "NA" stays "NA".

    Args:
        path: the file, UTF-8 with or without a byte-order mark.
        columns: columns that must be there; others are kept as well.

    Returns:
        one dict per row.

    Raises:
        DataError: the file or a column is missing.
    """
    if not path.is_file():
        raise DataError("table not found", "download it beside the volumes, under its published name", path=str(path))
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as handle:
        reader = csv.DictReader(handle, restval="")
        found = list(reader.fieldnames or [])
        missing = [name for name in columns if name not in found]
        if missing:
            remedy = f"columns found: {', '.join(found[:8]) or 'none'}"
            raise DataError(f"column {missing[0]!r} is missing", remedy, path=str(path))
        try:
            return [{key: value or "" for key, value in row.items() if key is not None} for row in reader]
        except csv.Error as problem:
            raise DataError(f"line {reader.line_num}: {problem}", "repair the table", path=str(path)) from problem


def confined_path(root: Path, relative: str) -> Path:
    """Join a path taken from a table or JSON to its root and refuse to leave that root.

    Args:
        root: folder the entry belongs to.
        relative: path as written in the table.

    Returns:
        the resolved path.

    Raises:
        DataError: the path is absolute elsewhere, climbs out with ``..`` or follows a link out of the root.
    """
    base = root.resolve()
    try:
        path = (base / relative).resolve()
    except (OSError, ValueError) as problem:
        raise DataError(f"path {relative!r} is unusable ({problem})", "repair the entry") from problem
    if not path.is_relative_to(base):
        raise DataError(f"path {relative!r} leaves the data root {base}", "use paths below --root")
    return path


def natural_key(name: str) -> list[tuple[int, int | str]]:
    """Sort key that puts ``slice_2`` before ``slice_10``.

    Args:
        name: a file or case name.

    Returns:
        digits as numbers, the rest as lower-case text.
    """
    parts = re.split(r"(\d+)", name)
    return [(1, int(part)) if part.isdecimal() else (0, part.lower()) for part in parts]
