"""Reports with findings as a table: ``AccessionNo,report_text`` and one 0/1 column a finding (downstream spec 7.11)."""

from __future__ import annotations

import csv
import io
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from mg3d.atomic import write_text_atomically
from mg3d.datasets.labels import CT_RATE_LABELS
from mg3d.errors import DataError

ID_COLUMN: Final = "AccessionNo"
TEXT_COLUMN: Final = "report_text"
_SENTENCE: Final = re.compile(r"(?<=[.!?])\s+|\s*[\n\"\u2022]\s*")
_SHOWN: Final = 5


@dataclass(frozen=True)
class LabelledReports:
    """n reports.

    Attributes:
        ids: unique names [n].
        texts: reports [n], possibly empty.
        labels: int8 [n, L] of 0 and 1; [n, 0] when the table has none.
        names: the L findings.
    """

    ids: tuple[str, ...]
    texts: tuple[str, ...]
    labels: np.ndarray
    names: tuple[str, ...]

    def __len__(self) -> int:
        """Number of reports."""
        return len(self.ids)

    def take(self, rows: Sequence[int] | np.ndarray) -> LabelledReports:
        """The reports of some rows, in that order."""
        chosen = [int(row) for row in rows]
        ids, texts = (tuple(column[row] for row in chosen) for column in (self.ids, self.texts))
        return LabelledReports(ids, texts, self.labels[chosen], self.names)


def read_labelled_reports(
    path: Path, names: Sequence[str] = CT_RATE_LABELS, *, need_labels: bool = True
) -> LabelledReports:
    """Read a table of reports.

    Args:
        path: csv file, UTF-8, with the columns above in any order; further columns are ignored.
        names: label columns.
        need_labels: refuse a table without label columns; else labels may be absent altogether.

    Raises:
        DataError: no such file, not a table, columns missing, no row, a name twice, or a label that is not 0 or 1.
    """
    rows, columns = _read_rows(path)
    with_labels = need_labels or any(name in columns for name in names)
    needed = (ID_COLUMN, TEXT_COLUMN, *(names if with_labels else ()))
    missing = [name for name in needed if name not in columns]
    if missing:
        raise DataError(
            f"{len(missing)} columns are missing: {', '.join(missing[:_SHOWN])}",
            f"name the columns {ID_COLUMN},{TEXT_COLUMN} and the findings exactly as in CT-RATE's tables",
            path=str(path),
        )
    ids = tuple(row[ID_COLUMN].strip() for row in rows)
    _refuse_repeats(ids, path)
    labels = [[_label(row, name, path) for name in names] if with_labels else [] for row in rows]
    texts = tuple(row[TEXT_COLUMN] or "" for row in rows)
    array = np.asarray(labels, dtype=np.int8).reshape(len(rows), -1)
    return LabelledReports(ids, texts, array, tuple(names) if with_labels else ())


def write_labelled_reports(path: Path, reports: LabelledReports) -> None:
    """Write a table that `read_labelled_reports` reads back: the two text columns, then the findings."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([ID_COLUMN, TEXT_COLUMN, *reports.names])
    for name, text, row in zip(reports.ids, reports.texts, reports.labels, strict=True):
        writer.writerow([name, text, *(int(value) for value in row)])
    write_text_atomically(path, stream.getvalue())


def split_report(text: str) -> list[str]:
    """Sentences of a report; the quotation mark between findings and impression, bullets and lines separate too."""
    return [part.strip() for part in _SENTENCE.split(text) if part and part.strip()]


def shuffle_sentences(text: str, rng: random.Random) -> str:
    """The same sentences in random order: an augmentation, since labels do not depend on the order."""
    sentences = split_report(text)
    rng.shuffle(sentences)
    return " ".join(sentences)


def _read_rows(path: Path) -> tuple[list[dict[str, str]], list[str]]:
    if not path.is_file():
        raise DataError("no such file", "give a csv table of reports", path=str(path))
    try:
        text = path.read_bytes().decode("utf-8-sig")
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        rows, columns = list(reader), list(reader.fieldnames or [])
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"not a UTF-8 csv table: {error}", "save it as csv, UTF-8", path=str(path)) from error
    if not rows:
        raise DataError(
            "the table holds no report", "give a table with a header and one row per report", path=str(path)
        )
    broken = next((number for number, row in enumerate(rows, start=2) if None in row or None in row.values()), None)
    if broken:
        raise DataError(f"row {broken} has another number of cells than the header", "quote texts", path=str(path))
    return rows, columns


def _refuse_repeats(ids: Sequence[str], path: Path) -> None:
    seen: set[str] = set()
    for name in ids:
        if not name or name in seen:
            raise DataError(f"{ID_COLUMN} {name!r} is there twice or empty", "name each report once", path=str(path))
        seen.add(name)


def _label(row: dict[str, str], name: str, path: Path) -> int:
    text = row[name].strip()
    if text not in ("0", "1", "0.0", "1.0"):
        raise DataError(f"{name} is {text!r}, not 0 or 1", "mend this cell", case_id=row[ID_COLUMN], path=str(path))
    return int(float(text))
