"""Your own scans: one CSV that names every volume with its report, and optionally split, patient, labels and scale.

Column names are compared without case, blanks and punctuation; the accepted ones are in :data:`COLUMNS`. Paths are
relative to the root and stay below it. A volume is anything :func:`mg3d.scans.read.read_scan` opens, a folder with a
DICOM series included.
"""

from __future__ import annotations

import logging
import math
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from mg3d.datasets.labels import CT_RATE_LABELS, UNKNOWN_LABEL
from mg3d.datasets.report_text import MIN_WORDS
from mg3d.errors import DataError
from mg3d.files import Table, read_csv
from mg3d.paths import confined_path
from mg3d.scans.geometry import Geometry
from prepro.readers.base import Case, CaseList, Exclusion
from prepro.readers.hounsfield import HounsfieldReader
from prepro.readers.tables import strip_suffix
from prepro.text import clean_report, count_words

COLUMNS: dict[str, tuple[str, ...]] = {
    "volume": ("volume", "volume path", "volume name", "image", "image path", "path", "file", "file name", "scan"),
    "findings": ("findings", "findings en", "report", "report text", "text"),
    "impression": ("impression", "impressions", "impression en", "impressions en", "conclusion"),
    "split": ("split", "set", "subset"),
    "patient": ("patient id", "patient", "subject id", "subject"),
    "slope": ("rescale slope", "slope"),
    "intercept": ("rescale intercept", "intercept"),
}
REQUIRED = ("volume", "findings")
SPLIT_WORDS = {"train": "train", "training": "train", "test": "test", "testing": "test"} | dict.fromkeys(
    ("val", "valid", "validation", "dev"), "val"
)
SHORTENED_NUMBER = re.compile(r"\d(?:[.,]\d+)?E\+\d+", re.IGNORECASE)
LABEL_CODES = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "": UNKNOWN_LABEL, "-1": UNKNOWN_LABEL, "-1.0": UNKNOWN_LABEL}
MAX_WARNED = 5
ABSENT = "file not found"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OwnDataReader(HounsfieldReader):
    """Reader of a CSV with scans and reports.

    Attributes:
        table: the CSV, separated by comma, semicolon or tab.
        root: folder that the volume paths are relative to.
        geometry: the grid to end on.
        corpus: name of the data set, ``clm_own`` or ``clm_own_<word>``.
        rescale: ``auto``, ``apply`` (the columns slope and intercept) or ``skip``.
        orientation: ``canonical`` or ``snap``, see :func:`mg3d.scans.geometry.to_canonical`.
        empty_report: ``skip`` leaves scans out whose report is empty, ``keep`` packs them.
        max_volume_gib: largest volume to read.
        assumed_spacing_mm: (z, y, x) for files that hold no voxel size.
        series: of a DICOM folder that holds several: ``largest``, or SeriesInstanceUID.
        encoding: of a table that is not UTF-8, see :func:`mg3d.files.decode_text`.
    """

    table: Path
    root: Path
    geometry: Geometry
    corpus: str = "clm_own"
    rescale: str = "auto"
    orientation: str = "canonical"
    empty_report: str = "skip"
    max_volume_gib: float = 4.0
    assumed_spacing_mm: tuple[float, float, float] | None = None
    series: str = ""
    encoding: str = ""

    label_names: ClassVar[tuple[str, ...]] = CT_RATE_LABELS

    def find_cases(self) -> CaseList:
        """List the rows whose volume exists, in the order of the table.

        Returns:
            the cases; ``origin`` is the split column's, "" without one.

        Raises:
            DataError: the table or a needed column is missing, or a split, label or scale is no such thing.
        """
        table = read_csv(self.table, encoding=self.encoding)
        columns = _Columns.of(table)
        found = CaseList(entries=len(table.rows), notes=columns.notes(table))
        for number, row in table.numbered():
            case = self._case(number, row, columns)
            (found.cases if isinstance(case, Case) else found.exclusions).append(case)  # type: ignore[arg-type]
        _set_repeats_aside(found)
        _warn(found, columns, self.table)
        return found

    def _case(self, number: int, row: dict[str, str], columns: _Columns) -> Case | Exclusion:
        place = f"row {number}"
        written = columns.cell(row, "volume")
        if not written:
            return Exclusion(place, "", f"{place}: no volume path")
        try:
            path = confined_path(self.root, written)
        except DataError as problem:
            return Exclusion(place, written, f"{place}: {problem.message}")
        image_id = strip_suffix(path.relative_to(self.root.resolve()).as_posix())
        texts = clean_report(columns.cell(row, "findings")), clean_report(columns.cell(row, "impression"))
        patient = columns.cell(row, "patient") if "patient" in columns.roles else image_id
        if SHORTENED_NUMBER.fullmatch(patient):
            what = f"{place}: patient id {patient!r} is a number whose digits a spreadsheet dropped"
            raise DataError(what, "give the column the format text and export the table again", path=str(self.table))
        origin = self._split(columns.cell(row, "split"), place) if "split" in columns.roles else ""
        labels, rescale = columns.labels(row, place, self.table), columns.rescale(row, place, self.table)
        reason = self._reason_against(path, patient, texts)
        if reason == ABSENT and "\\" in written:
            reason += ", neither as written nor with / for \\"
        if reason:
            return Exclusion(image_id, str(path), f"{place}: {reason}")
        return Case(image_id, patient, origin, (path,), *texts, labels, rescale, position=number)

    def _split(self, word: str, place: str) -> str:
        if word.lower() not in SPLIT_WORDS:
            raise DataError(f"{place}: split {word!r}", "write train, val or test", path=str(self.table))
        return SPLIT_WORDS[word.lower()]

    def _reason_against(self, path: Path, patient: str, texts: tuple[str, str]) -> str:
        if not patient:
            return "patient id is empty"
        if not path.exists():
            return ABSENT
        if self.empty_report == "skip" and count_words(" ".join(texts)) < MIN_WORDS:
            return f"report has fewer than {MIN_WORDS} words"
        return ""


@dataclass(frozen=True)
class _Columns:
    """Which column of the table plays which role, and which holds which of the 18 labels."""

    roles: dict[str, str]
    label_columns: dict[str, str]
    ignored: tuple[str, ...]

    @classmethod
    def of(cls, table: Table) -> _Columns:
        """Find the columns by their names."""
        by_key: dict[str, list[str]] = defaultdict(list)
        for name in table.columns:
            by_key[_key(name)].append(name)
        roles: dict[str, str] = {}
        for role, names in COLUMNS.items():
            _assign(roles, role, [column for name in names for column in by_key.get(_key(name), [])], table)
        missing = next((role for role in REQUIRED if role not in roles), None)
        if missing:
            accepted = ", ".join(repr(name) for name in COLUMNS[missing][:3])
            remedy = f"name it one of {accepted}; columns found: {', '.join(table.columns[:8]) or 'none'}"
            raise DataError(f"column {missing!r} is missing", remedy, path=str(table.path))
        labels: dict[str, str] = {}
        for label in CT_RATE_LABELS:
            _assign(labels, label, by_key.get(_key(label), []), table)
        used = {*roles.values(), *labels.values()}
        return cls(roles, labels, tuple(name for name in table.columns if name not in used))

    def cell(self, row: dict[str, str], role: str) -> str:
        """Content of a role's cell, "" without such a column."""
        return row[self.roles[role]].strip() if role in self.roles else ""

    def labels(self, row: dict[str, str], place: str, path: Path) -> tuple[int, ...]:
        """The 18 labels, unknown where there is no column; () when there is none at all."""
        values = []
        for label in CT_RATE_LABELS if self.label_columns else ():
            word = row[self.label_columns[label]].strip() if label in self.label_columns else ""
            if word not in LABEL_CODES:
                raise DataError(f"{place}: label {label!r} is {word!r}", "write 0, 1 or leave it empty", path=str(path))
            values.append(LABEL_CODES[word])
        return tuple(values)

    def rescale(self, row: dict[str, str], place: str, path: Path) -> tuple[float, float] | None:
        """Slope and intercept, None when both cells are empty or absent."""
        words = [self.cell(row, role) for role in ("slope", "intercept")]
        if not any(words):
            return None
        try:
            slope, intercept = float(words[0] or 1), float(words[1] or 0)
        except ValueError:
            slope = intercept = math.nan
        if not (math.isfinite(slope) and math.isfinite(intercept)) or slope == 0:
            raise DataError(f"{place}: slope and intercept {words}", "write two finite numbers", path=str(path))
        return slope, intercept

    def notes(self, table: Table) -> dict[str, object]:
        """What the manifest says about the table."""
        notes: dict[str, object] = {"table_rows": len(table.rows), "columns_used": self.roles}
        notes["columns_ignored"] = list(self.ignored)
        notes["patients"] = "from the table" if "patient" in self.roles else "no column: every scan is its own patient"
        notes["encodings"] = {table.path.name: table.encoding}
        return notes


def _assign(roles: dict[str, str], role: str, columns: list[str], table: Table) -> None:
    if len(columns) > 1:
        shown = " and ".join(repr(name) for name in columns)
        raise DataError(f"columns {shown} both mean {role!r}", "keep one of them", path=str(table.path))
    if columns:
        roles[role] = columns[0]


def _key(name: str) -> str:
    return re.sub(r"[\W_]", "", name).lower()


def _set_repeats_aside(found: CaseList) -> None:
    """Keep one of equal rows, none of rows that contradict each other; one per split stays, for the leakage check."""
    groups: dict[str, list[Case]] = defaultdict(list)
    for case in found.cases:
        groups[case.image_id].append(case)
    found.cases = []
    for cases in groups.values():
        texts = {(case.findings, case.impression, case.patient_id) for case in cases}
        files = {case.source for case in cases}
        kept = {case.origin: case for case in reversed(cases)} if len(texts) == len(files) == 1 else {}
        conflict = "two different reports or patients under one name"
        reason = conflict if len(texts) > 1 else "same name with another file ending"
        for case in cases:
            if kept.get(case.origin) is case:
                found.cases.append(case)
            else:
                why = "the row is there twice" if kept else reason
                found.exclusions.append(Exclusion(case.image_id, str(case.source[0]), f"row {case.position}: {why}"))
    found.cases.sort(key=lambda case: case.position)


def _warn(found: CaseList, columns: _Columns, path: Path) -> None:
    if "patient" not in columns.roles:
        logger.warning(
            "%s has no patient column: EVERY SCAN COUNTS AS ITS OWN PATIENT, so scans of one patient can land in two "
            "splits; add a column 'patient_id'",
            path,
        )
    for item in found.exclusions[:MAX_WARNED]:
        logger.warning("%s left out: %s", item.image_id, item.reason)
    if len(found.exclusions) > MAX_WARNED:
        logger.warning("and %d more left out; the manifest lists them", len(found.exclusions) - MAX_WARNED)
