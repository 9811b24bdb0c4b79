"""The one place where tables and small text files come in and go out.

Reading: UTF-8 with or without a byte-order mark, UTF-16 and UTF-32 with one, UTF-16 without one where every second byte
is zero. Anything else is never guessed: the refusal shows how common code pages would read the stray letters, and
``--encoding`` names the right one. Writing: a temporary name, then a rename; a text cell that a spreadsheet would run
as a formula gets an apostrophe in front (OWASP, "CSV injection"), which :func:`read_csv` takes away again.
"""

from __future__ import annotations

import argparse
import codecs
import csv
import io
import itertools
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from mg3d.atomic import atomic_path
from mg3d.errors import DataError

__all__ = [
    "ENCODING_HELP",
    "SEPARATORS",
    "Table",
    "add_encoding_option",
    "csv_text",
    "decode_text",
    "id_key",
    "read_csv",
    "read_text",
    "write_csv",
]

csv.field_size_limit(16 * 2**20)
SEPARATORS: Final = (",", ";", "\t")
ENCODING_HELP: Final = "encoding of tables and texts that are not UTF-8 or UTF-16, for example cp1254 (Turkish)"
MAX_LISTED: Final = 8
_MARKS: Final = (
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_WORKBOOKS: Final = (b"PK\x03\x04", b"\xd0\xcf\x11\xe0", b"\x1f\x8b")
_NO_FILES: Final = ("undefined", "idna", "punycode", "unicode-escape", "raw-unicode-escape")
_CODE_PAGES: Final = ("cp1252", "cp1254", "cp1250", "cp1251")
_NAME_ONE: Final = (
    "save it as UTF-8, or name its encoding where the command has --encoding (cp1254 Turkish, cp1252 Western ...)"
)
_STRAY: Final = re.compile("[\udc80-\udcff]")
_SEPARATOR_LINE: Final = re.compile(r"sep=([,;|\t])\r?\n")
_NUMBER: Final = re.compile(r"[+-]?(?:(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?|inf|nan)", re.ASCII | re.IGNORECASE)
_FORMULA: Final = re.compile("'*(?:[\t\r\n]|\\s*[=+\\-@\uff1d\uff0b\uff0d\uff20])")
_REWRITTEN: Final = re.compile(r"0*(\d+)(?:\.0+)?", re.ASCII)

Cells = Sequence[object] | Mapping[str, object]


@dataclass(frozen=True)
class Table:
    """A table as text: an empty cell is an empty string and "NA" stays "NA"; rows without any text are left out.

    Attributes:
        path: the file.
        columns: names of the header row, without blanks around them.
        rows: one dictionary a row.
        numbers: of the rows, as a spreadsheet counts: the header is row 1.
        encoding: how the bytes were read.
    """

    path: Path
    columns: tuple[str, ...]
    rows: tuple[dict[str, str], ...]
    numbers: tuple[int, ...]
    encoding: str

    def numbered(self) -> Iterator[tuple[int, dict[str, str]]]:
        """Number and cells of every row."""
        return zip(self.numbers, self.rows, strict=True)


def read_csv(
    path: Path,
    columns: Iterable[str] = (),
    *,
    encoding: str = "",
    separators: Iterable[str] = SEPARATORS,
    whole_rows: bool = False,
) -> Table:
    """Read a table whose first row names the columns.

    Args:
        path: the file.
        columns: names that must be there once; others are read as well.
        encoding: of a file that is neither UTF-8 nor UTF-16, see :func:`decode_text`.
        separators: cell separators to choose from; the one that gives the header most cells wins.
        whole_rows: refuse rows with fewer cells than the header instead of filling them with empty ones.

    Returns:
        the table.

    Raises:
        DataError: no such file, no table or no known encoding, a column is missing or there twice, or a row has more
            cells than the header; names the file and the row.
    """
    data = _bytes(path, "table not found", "check the path, or complete the download")
    text, used = data.removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape"), "utf-8"
    if encoding or _encoding_of(data) != used:
        text, used = decode_text(data, path, encoding)
    named = _SEPARATOR_LINE.match(text)  # what Excel writes for itself
    text = text[named.end() :] if named else text
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=named[1] if named else _separator(text, separators), strict=True
    )
    number = bool(named) + 0
    first, found, first_stray = number + 1, [], 0
    try:
        for number, cells in enumerate(reader, start=first):
            if not first_stray and _STRAY.search("".join(cells)):
                first_stray = number
            found.append([_as_text(cell) for cell in cells])
    except csv.Error as problem:
        what = f"row {number + 1} is not readable ({problem})"
        raise DataError(what, "repair the quotes of the table", path=str(path)) from None
    if first_stray:
        raise _not_utf8(text, f"row {first_stray}", path)
    header = tuple(name.strip() for name in found[0]) if found else ()
    _check_header(header, tuple(columns), path)
    numbered = [(n, cells) for n, cells in enumerate(found[1:], start=first + 1) if any(map(str.strip, cells))]
    rows = tuple(_row(n, cells, header, whole_rows, path) for n, cells in numbered)
    return Table(path, header, rows, tuple(n for n, _ in numbered), used)


def _separator(text: str, separators: Iterable[str]) -> str:
    def cells(candidate: str) -> int:
        try:
            return len(next(csv.reader(io.StringIO(text, newline=""), delimiter=candidate), []))
        except csv.Error:
            return 0

    return max(separators, key=cells)


def _check_header(header: tuple[str, ...], columns: Sequence[str], path: Path) -> None:
    counts = Counter(header)
    shown = ", ".join(header[:MAX_LISTED]) + (" ..." if len(header) > MAX_LISTED else "")
    for what, wrong in (
        ("missing", [name for name in columns if not counts[name]]),
        ("there twice", [name for name in columns if counts[name] > 1]),
    ):
        if wrong:
            names = ", ".join(map(repr, wrong[:MAX_LISTED]))
            subject = f"column {names} is" if len(wrong) == 1 else f"columns {names} are"
            raise DataError(f"{subject} {what}", f"columns found: {shown or 'none'}", path=str(path))


def _row(number: int, cells: list[str], header: tuple[str, ...], whole: bool, path: Path) -> dict[str, str]:
    if any(map(str.strip, cells[len(header) :])) or (whole and len(cells) < len(header)):
        remedy = "put cells that hold the separator between quotes, or download the table again"
        raise DataError(f"row {number} has {len(cells)} cells, the header {len(header)}", remedy, path=str(path))
    row: dict[str, str] = {}
    for place, name in enumerate(header):
        row.setdefault(name, cells[place] if place < len(cells) else "")
    return row


def read_text(path: Path, encoding: str = "") -> str:
    """Read a text file.

    Args:
        path: the file.
        encoding: see :func:`decode_text`.

    Raises:
        DataError: no such file, or no known encoding.
    """
    return decode_text(_bytes(path, "no such file", "check the path"), path, encoding)[0]


def _bytes(path: Path, missing: str, remedy: str) -> bytes:
    if not path.is_file():
        raise DataError(missing, remedy, path=str(path))
    try:
        data = path.read_bytes()
    except OSError as problem:
        raise DataError(f"not readable ({problem.strerror})", "check its permissions", path=str(path)) from None
    if data.startswith(_WORKBOOKS):
        raise DataError("is no text, but a workbook or an archive", "save it as CSV or text in UTF-8", path=str(path))
    return data


def decode_text(data: bytes, path: Path, encoding: str = "") -> tuple[str, str]:
    """Decode the bytes of a text.

    Args:
        data: content of a file.
        path: its name, for messages.
        encoding: what the user says it is. A byte-order mark counts more, and so do letters beyond ASCII that are
            UTF-8: a file without any other byte is refused, and where they outnumber the others only those are read
            in this encoding.

    Returns:
        the text, and the encoding it was read in.

    Raises:
        DataError: bytes that do not fit the encoding; without one, bytes that are no UTF-8.
    """
    data, found = data.removeprefix(codecs.BOM_UTF8), _encoding_of(data)
    if found != "utf-8" or not encoding:
        encoding = found
    text = data.decode("utf-8", "surrogateescape")
    stray = len(_STRAY.findall(text))
    mostly_utf8 = sum(letter > "\x7f" for letter in text) > 2 * stray
    if encoding == "utf-8" and stray:
        raise _not_utf8(text, f"line {len(_STRAY.split(text, 1)[0].splitlines()) or 1}", path)
    try:
        if not mostly_utf8 or encoding.startswith("utf"):
            read = data.decode(encoding)
            return read, "utf-8" if read == text else encoding
        if stray:
            return _STRAY.sub(lambda byte: _byte(byte).decode(encoding), text), f"utf-8, {stray} bytes {encoding}"
    except UnicodeDecodeError as problem:
        what = f"byte 0x{problem.object[problem.start]:02x} does not exist in {encoding}"
        raise DataError(what, _NAME_ONE, path=str(path)) from None
    raise DataError(f"is UTF-8, which --encoding {encoding} would misread", "leave --encoding out", path=str(path))


def _byte(match: re.Match[str]) -> bytes:
    return bytes([ord(match.group()) - 0xDC00])


def _encoding_of(data: bytes) -> str:
    marked = next((name for mark, name in _MARKS if data.startswith(mark)), "")
    sample = data[:256]
    odd, even = sample[1::2].count(0), sample[::2].count(0)
    if marked or max(odd, even) <= len(sample) * 0.3:
        return marked or "utf-8"
    return ("utf-16-le" if not even else "") or ("utf-16-be" if not odd else "utf-8")


def _not_utf8(text: str, place: str, path: Path) -> DataError:
    """The refusal of stray bytes: it shows single letters, never words, since these are reports of patients."""
    if "\0" in text:
        return DataError("is no text, it holds zero bytes", "give a text file", path=str(path))
    found = _STRAY.findall(text)
    stray = bytes(ord(letter) - 0xDC00 for letter in dict.fromkeys(found))[:6]
    readings = ", ".join(f"{stray.decode(page, 'replace')!r} in {page}" for page in _CODE_PAGES)
    what = f"{place}: {len(found)} bytes of the file are no UTF-8; {stray.hex(' ')} would be {readings}"
    return DataError(what, _NAME_ONE, path=str(path))


def add_encoding_option(add: Callable[..., object]) -> None:
    """Add ``--encoding`` to a command line.

    Args:
        add: ``add_argument`` of a parser or group.
    """
    add("--encoding", type=_encoding_name, default="", metavar="NAME", help=ENCODING_HELP)


def _encoding_name(text: str) -> str:
    try:
        "x".encode(text or "utf-8")  # refuses what is no text encoding, such as rot13
        name = codecs.lookup(text).name if text else ""
    except (LookupError, ValueError):
        name = _NO_FILES[0]
    if name.replace("_", "-") in _NO_FILES:
        raise argparse.ArgumentTypeError(f"{text!r} is no encoding of files, such as cp1254")
    return name


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Cells]) -> None:
    """Write a table whole or not at all; cells as in :func:`csv_text`.

    Args:
        path: the file; its folder is made.
        columns: header row.
        rows: cells in the order of ``columns``, or by their names.

    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
        stream.writelines(_lines(columns, rows))


def csv_text(columns: Sequence[str], rows: Iterable[Cells]) -> str:
    """A table as text: numbers as they are, texts so that no spreadsheet runs them, absent cells empty.

    Args:
        columns: header row.
        rows: cells in the order of ``columns``, or by their names.
    """
    return "".join(_lines(columns, rows))


class _Echo:
    """Lets the csv module hand back each line."""

    def write(self, line: str) -> str:
        return line


def _lines(columns: Sequence[str], rows: Iterable[Cells]) -> Iterator[str]:
    writer = csv.writer(_Echo(), lineterminator="\r\n")  # so that cells with one of the two are put between quotes
    for row in itertools.chain([columns], rows):
        cells = [row.get(name, "") for name in columns] if isinstance(row, Mapping) else row
        yield writer.writerow([_safe(cell) for cell in cells])[:-2] + "\n"  # type: ignore[index]


def _safe(cell: object) -> object:
    if cell is None or isinstance(cell, (int, float)):
        return cell
    text = str(cell).encode("utf-8", "backslashreplace").decode()  # names of files may hold bytes that are no text
    return f"'{text}" if _FORMULA.match(text) and not _NUMBER.fullmatch(text) else text


def _as_text(cell: str) -> str:
    """Undo :func:`_safe`."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


def id_key(name: str) -> str:
    """What an id is compared by: numbers a spreadsheet rewrote ("001", "1", "1.0") and other letter cases are equal.

    Args:
        name: patient or scan id as written.
    """
    plain = " ".join(unicodedata.normalize("NFKC", name).casefold().split())
    number = _REWRITTEN.fullmatch(plain)
    return number[1] if number else plain
