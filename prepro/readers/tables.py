"""Tables and paths of a download, read without guessing."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mg3d.errors import DataError

csv.field_size_limit(16 * 2**20)
SEPARATORS = (",", ";", "\t")
UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
SCAN_SUFFIXES = (".nii.gz.npz", ".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd", ".npz")
MAX_LISTED = 8
_STRAY_BYTE = re.compile("[\udc80-\udcff]")


@dataclass(frozen=True)
class Table:
    """A CSV as text: an empty cell is an empty string and "NA" stays "NA".

    Attributes:
        path: the file.
        columns: names of the header row, as written.
        rows: one dict per data row; the first one is row 2, as a spreadsheet counts.
        not_utf8: numbers of the rows that held bytes which are no UTF-8; those bytes were read as Windows Latin-1.
    """

    path: Path
    columns: tuple[str, ...]
    rows: tuple[dict[str, str], ...]
    not_utf8: tuple[int, ...] = ()


def read_table(path: Path, columns: Iterable[str] = (), separators: Iterable[str] = (",",)) -> Table:
    """Read a CSV in UTF-8, with or without a byte-order mark, or in UTF-16 with one.

    Args:
        path: the file.
        columns: columns that must be there; others are kept as well.
        separators: cell separators to choose from; the one that gives the header most cells wins.

    Returns:
        the table.

    Raises:
        DataError: the file is missing or no table, a column is missing or there twice, or a row has more cells than
            the header.
    """
    if not path.is_file():
        raise DataError("table not found", "download it under its published name, or check the path", path=str(path))
    text = decode_text(path.read_bytes())
    separator = find_separator(text, separators)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        header = tuple(name.strip() for name in next(reader, []))
        check_columns(header, columns, path)
        rows, not_utf8 = _read_rows(reader, header, path)
    except csv.Error as problem:
        raise DataError(
            f"line {reader.line_num}: {problem}", "repair the quotes of the table", path=str(path)
        ) from None
    return Table(path, header, tuple(rows), tuple(not_utf8))


def check_columns(header: tuple[str, ...], columns: Iterable[str], path: Path) -> None:
    """Refuse a header that lacks a column or names one twice.

    Args:
        header: names as written.
        columns: names that must be there.
        path: the file, for the message.

    Raises:
        DataError: names the column and the columns found.
    """
    found = ", ".join(header[:MAX_LISTED]) + (" ..." if len(header) > MAX_LISTED else "")
    counts = Counter(header)
    for name in columns:
        if counts[name] != 1:
            what = "is missing" if not counts[name] else "is there twice"
            raise DataError(f"column {name!r} {what}", f"columns found: {found or 'none'}", path=str(path))


def decode_text(data: bytes) -> str:
    """Decode UTF-8 or, with a byte-order mark, UTF-16; a byte that is neither becomes a lone surrogate.

    Args:
        data: the bytes of a file.
    """
    if data.startswith(UTF16_MARKS):
        return data.decode("utf-16", "replace")
    return data.decode("utf-8-sig", "surrogateescape")


def find_separator(text: str, separators: Iterable[str] = SEPARATORS) -> str:
    """Return the separator that cuts the first row into most cells.

    Args:
        text: content of a table.
        separators: candidates; the first one wins a tie.
    """
    return max(separators, key=lambda candidate: len(_first_row(text, candidate)))


def _first_row(text: str, separator: str) -> list[str]:
    try:
        return next(csv.reader(io.StringIO(text, newline=""), delimiter=separator), [])
    except csv.Error:
        return []


def _read_rows(
    reader: Iterable[list[str]], header: tuple[str, ...], path: Path
) -> tuple[list[dict[str, str]], list[int]]:
    rows, not_utf8 = [], []
    for number, cells in enumerate(reader, start=2):
        if any(cell.strip() for cell in cells[len(header) :]):
            remedy = "put cells that hold the separator between quotes"
            message = f"row {number} has {len(cells)} cells, the header {len(header)}"
            raise DataError(message, remedy, path=str(path))
        repaired = [windows_text(cell) for cell in cells]
        if any(count for _, count in repaired):
            not_utf8.append(number)
            cells = [text for text, _ in repaired]
        padded = cells + [""] * (len(header) - len(cells))
        rows.append(dict(zip(header, padded, strict=False)))
    return rows, not_utf8


def windows_text(text: str) -> tuple[str, int]:
    """Read the stray bytes that :func:`decode_text` left as Windows Latin-1.

    Args:
        text: decoded text.

    Returns:
        the text, and how many bytes were not UTF-8.
    """
    return _STRAY_BYTE.subn(_windows_character, text)


def _windows_character(match: re.Match[str]) -> str:
    stray = bytes([ord(match.group()) - 0xDC00])
    return stray.decode("cp1252", "ignore") or stray.decode("latin-1")


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


def strip_suffix(name: str) -> str:
    """Drop the ending of a scan file: ``train_1_a_1.nii.gz`` gives ``train_1_a_1``.

    Args:
        name: a file name; other endings stay.
    """
    lower = name.lower()
    ending = next((suffix for suffix in SCAN_SUFFIXES if lower.endswith(suffix)), "")
    return name[: len(name) - len(ending)]
