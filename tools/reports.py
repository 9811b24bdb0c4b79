"""Reports of scans: a text file with headings, rows of a table or of packed files, or the words themselves."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final, NamedTuple

from mg3d.errors import DataError
from mg3d.files import Table, id_key, read_csv, read_text
from prepro.readers.tables import strip_suffix
from prepro.text import clean_report

NAME_COLUMNS: Final = ("volumename", "volume", "imageid", "image", "path", "file", "filename", "scan", "id")
FINDINGS_COLUMNS: Final = ("findingsen", "findings", "report", "reporttext", "text", "finding")
IMPRESSION_COLUMNS: Final = ("impressionsen", "impressionen", "impressions", "impression", "conclusion")
PATIENT_COLUMNS: Final = ("patientid", "patient", "subjectid", "subject")
MAX_REPORT_BYTES: Final = 2**20
_HEADING: Final = re.compile(r"^[ \t#*]*(findings?|impressions?|conclusions?)[ \t]*\**[ \t]*(?::\**|$)", re.I | re.M)


class Report(NamedTuple):
    """Findings and impression of one scan, cleaned; patient and stored comma fragments, where the source has them."""

    findings: str
    impression: str
    patient: str = ""
    fragments: tuple[tuple[str, ...], tuple[str, ...]] | None = None


def report_of_words(findings: str | None, impression: str | None) -> Report:
    """Clean the two texts.

    Raises:
        DataError: both are empty.
    """
    report = Report(clean_report(findings), clean_report(impression))
    if not (report.findings or report.impression):
        raise DataError("the report is empty", "give findings or impression")
    return report


def read_report(path: Path, encoding: str = "") -> Report:
    """Read a text file with the headings "Findings:" and "Impression:", or a JSON object with these keys.

    Without headings the whole text counts as findings.

    Args:
        path: the file.
        encoding: where it is not UTF-8, see :func:`mg3d.files.decode_text`.

    Raises:
        DataError: missing, too large, no text, or an empty report.
    """
    if not path.is_file():
        raise DataError("no such report", "give a text file", path=str(path))
    if path.stat().st_size > MAX_REPORT_BYTES:
        raise DataError("larger than 1 MiB", "give one report, or a table as --reports", path=str(path))
    text = read_text(path, encoding)
    if "\0" in text:
        raise DataError("is no text", "give a text file", path=str(path))
    found = _from_json(text, path) if path.suffix.lower() == ".json" else _sections(text)
    try:
        return report_of_words(*found)
    except DataError as problem:
        raise DataError(problem.message, problem.remedy, path=str(path)) from problem


def _from_json(text: str, path: Path) -> tuple[str, str]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise DataError(f"is no JSON ({error})", "give findings and impression", path=str(path)) from error
    if not isinstance(content, dict):
        raise DataError("holds no object", 'write {"findings": "...", "impression": "..."}', path=str(path))
    plain = {_key(str(key)): value for key, value in content.items() if isinstance(value, str)}
    return _first(plain, FINDINGS_COLUMNS), _first(plain, IMPRESSION_COLUMNS)


def _sections(text: str) -> tuple[str, str]:
    headings = list(_HEADING.finditer(text))
    if not headings:
        return text, ""
    parts = {"findings": [text[: headings[0].start()]], "impression": []}
    ends = [heading.start() for heading in headings[1:]] + [len(text)]
    for heading, end in zip(headings, ends, strict=True):
        section = "findings" if heading.group(1).lower().startswith("finding") else "impression"
        parts[section].append(text[heading.end() : end])
    return " ".join(parts["findings"]), " ".join(parts["impression"])


class ReportTable:
    """Reports of many scans, found by the names of the scans: endings do not matter, folders only to tell two apart.

    Args:
        path: where they come from, for messages.
        rows: name of a scan and its report.
    """

    def __init__(self, path: Path, rows: Iterable[tuple[str, Report]]) -> None:
        self.path = path
        self._reports: dict[str, set[Report]] = {}
        self._by_last: dict[str, set[str]] = {}
        for scan, report in rows:
            if key := scan_key(scan):
                self._reports.setdefault(key, set()).add(report)
                self._by_last.setdefault(key.rsplit("/", 1)[-1], set()).add(key)

    @classmethod
    def open(cls, path: Path, encoding: str = "") -> ReportTable:
        """Read packed rows (an ``.arrow`` file or a folder), or a CSV as CT-RATE publishes it or your own.

        Args:
            path: the file or folder.
            encoding: of a CSV that is not UTF-8.

        Raises:
            DataError: no such file, or no reports in it.
        """
        packed = path.suffix == ".arrow" or path.is_dir()
        return cls(path, _packed_rows(path) if packed else _table_rows(path, encoding))

    def match(self, scan: str) -> str | None:
        """Name in the table that stands for a scan: equal, or one ends with the other; None without one.

        Raises:
            DataError: several names fit.
        """
        key = scan_key(scan)
        if key in self._reports:
            return key
        near = self._by_last.get(key.rsplit("/", 1)[-1], set())
        fits = [name for name in near if f"/{key}".endswith(f"/{name}") or f"/{name}".endswith(f"/{key}")]
        if len(fits) > 1:
            remedy = f"give the folder too: {', '.join(sorted(fits)[:3])}"
            raise DataError(f"{len(fits)} rows fit this scan", remedy, case_id=key, path=str(self.path))
        return fits[0] if fits else None

    def report(self, scan: str) -> Report:
        """Return the report of a scan.

        Args:
            scan: path or id.

        Raises:
            DataError: no row, or several different reports.
        """
        name = self.match(scan)
        if name is None:
            key = scan_key(scan)
            like = next((known for known in self._reports if id_key(known) == id_key(key)), None)
            remedy = f"the table has {like!r}: write both alike" if like else "check the names"
            raise DataError("no row for this scan", remedy, case_id=key, path=str(self.path))
        found = self._reports[name]
        if len(found) > 1:
            raise DataError("different reports for this scan", "keep one row", case_id=name, path=str(self.path))
        return next(iter(found))


def _table_rows(path: Path, encoding: str) -> Iterator[tuple[str, Report]]:
    table = read_csv(path, encoding=encoding)
    columns = {_key(column): column for column in reversed(table.columns)}
    name = _column(table, columns, NAME_COLUMNS, "of the scans")
    findings = _column(table, columns, FINDINGS_COLUMNS, "of the findings")
    impression = _first(columns, IMPRESSION_COLUMNS)
    patient = _first(columns, PATIENT_COLUMNS)
    for row in table.rows:
        text, conclusion = (clean_report(row[column]) if column else "" for column in (findings, impression))
        yield row[name], Report(text, conclusion, row[patient].strip() if patient else "")


def _column(table: Table, columns: dict[str, str], names: tuple[str, ...], what: str) -> str:
    found = _first(columns, names)
    if not found:
        remedy = f"columns found: {', '.join(table.columns[:8]) or 'none'}"
        raise DataError(f"no column {what} (such as {names[0]!r})", remedy, path=str(table.path))
    return found


def _packed_rows(path: Path) -> Iterator[tuple[str, Report]]:
    from tools.gallery.arrow_source import ArrowSource
    from tools.gallery.items import Problem

    for study in ArrowSource(sorted(path.glob("[!.]*.arrow")) if path.is_dir() else [path]).scan():
        if not isinstance(study, Problem):
            fragments = (study.findings_sen, study.impression_sen)
            report = Report(study.findings, study.impression, study.patient_id, fragments)
            yield f"{study.corpus}/{study.split}/{study.image_id}", report


def scan_key(scan: str) -> str:
    """Name of a scan with forward slashes and without its ending: ``a/train_1_a_1.nii.gz`` gives ``a/train_1_a_1``."""
    return strip_suffix(scan.replace("\\", "/").strip().strip("/"))


def _key(name: str) -> str:
    return re.sub(r"[\W_]", "", name).lower()


def _first(values: dict[str, str], names: tuple[str, ...]) -> str:
    return next((values[name] for name in names if name in values), "")
