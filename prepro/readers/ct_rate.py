"""CT-RATE in its published layout: nested folders of NIfTI volumes, three tables (spec downstream 7.1 to 7.3).

``ROOT/dataset/{train,valid}/train_1/train_1_a/train_1_a_1.nii.gz`` with ``radiology_text_reports``,
``multi_abnormality_labels`` and ``metadata`` beside the volumes. A volume of the second release (``train_fixed``,
``valid_fixed``) is preferred to its namesake of the first, and both to the published preprocessing of it
(``train_preprocessed``, ``.npz``). Labels and metadata are optional, reports are not.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from mg3d.datasets.labels import CT_RATE_LABELS, UNKNOWN_LABEL
from mg3d.datasets.report_text import MIN_WORDS
from mg3d.errors import DataError
from mg3d.files import Table, read_csv
from mg3d.inference.scan_table import TableRow, table_row
from mg3d.scans.folders import FOLLOW_LINKS, PassedOver, walk_folders
from mg3d.scans.geometry import Geometry
from mg3d.scans.grey_slices import natural_key
from prepro.readers.base import Case, CaseList, Exclusion
from prepro.readers.hounsfield import HounsfieldReader
from prepro.readers.tables import strip_suffix
from prepro.text import clean_report, count_words

SPLIT_TABLE_NAMES = {"train": ("train", "train"), "valid": ("validation", "valid")}
NAME_PATTERN = re.compile(r"(?P<scan>(?P<patient>[A-Za-z]+_\d+)_[A-Za-z]+)_\d+")
SUFFIXES = (".nii.gz", ".nii", ".npz")
REPORT_COLUMNS = ("VolumeName", "Findings_EN", "Impressions_EN")
LABEL_COLUMNS = ("VolumeName", *CT_RATE_LABELS)
LABEL_CODES = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "": UNKNOWN_LABEL}
NO_ROW = TableRow()
METADATA_COLUMNS = ("VolumeName", "RescaleSlope", "RescaleIntercept", "XYSpacing", "ZSpacing")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CtRateReader(HounsfieldReader):
    """Reader of a CT-RATE download.

    Attributes:
        root: the download, or its ``dataset`` folder.
        geometry: the grid to end on.
        rescale: ``auto``, ``apply`` or ``skip``, see :mod:`mg3d.scans.hounsfield`.
        orientation: ``canonical`` or ``snap``, see :func:`mg3d.scans.geometry.to_canonical`.
        empty_report: ``skip`` leaves scans out whose report is empty, ``keep`` packs them.
        max_volume_gib: largest volume to read.
        assumed_spacing_mm: (z, y, x) used only where neither header nor metadata table has a voxel size.
        follow_links: read linked folders that lie outside the root too.
        encoding: of tables that are not UTF-8, see :func:`mg3d.files.decode_text`.
    """

    root: Path
    geometry: Geometry
    rescale: str = "auto"
    orientation: str = "canonical"
    empty_report: str = "skip"
    max_volume_gib: float = 4.0
    assumed_spacing_mm: tuple[float, float, float] | None = None
    follow_links: bool = False
    encoding: str = ""

    corpus: ClassVar[str] = "clm_ct_rate"
    label_names: ClassVar[tuple[str, ...]] = CT_RATE_LABELS
    table_expected: ClassVar[bool] = True

    def find_cases(self) -> CaseList:
        """List the volumes of both official splits that have a report.

        Returns:
            cases in natural order of their names, train before valid.

        Raises:
            DataError: the folder is not a CT-RATE download, or a needed table or column is missing.
        """
        base = self.dataset_folder()
        found = CaseList()
        for split in SPLIT_TABLE_NAMES:
            if folders := self._volume_folders(base, split):
                self._add_split(found, base, folders, split)
        if not found.cases and not found.exclusions:
            raise DataError("no .nii.gz, .nii or .npz volume below train/ or valid/", "check --root", path=str(base))
        return found

    def dataset_folder(self) -> Path:
        """Return the folder that holds ``train`` or ``valid``: the root itself or its ``dataset`` folder."""
        for folder in (self.root / "dataset", self.root):
            if any(self._volume_folders(folder, split) for split in SPLIT_TABLE_NAMES):
                return folder
        raise DataError("no dataset/train or dataset/valid folder here", "give the CT-RATE root", path=str(self.root))

    @staticmethod
    def _volume_folders(base: Path, split: str) -> list[Path]:
        """Folders of the second and the first release and of the preprocessed volumes, as far as they are there."""
        names = (f"{split}_fixed", split, f"{split}_preprocessed")
        return [base / name for name in names if (base / name).is_dir()]

    def _add_split(self, found: CaseList, base: Path, folders: list[Path], split: str) -> None:
        reports_path, labels_path, metadata_path = table_paths(base, split)
        encodings: dict[str, str] = found.notes.setdefault("encodings", {})

        def table(path: Path, columns: tuple[str, ...]) -> Table:
            read = read_csv(path, columns, encoding=self.encoding)
            encodings[path.name] = read.encoding
            return read

        reports = _read_reports(table(reports_path, REPORT_COLUMNS))
        labels = _read_labels(table(labels_path, LABEL_COLUMNS)) if labels_path.is_file() else {}
        metadata = _read_metadata(table(metadata_path, METADATA_COLUMNS)) if metadata_path.is_file() else {}
        used = set()
        passed_over = PassedOver(FOLLOW_LINKS)
        volumes, namesakes = _volumes(folders, lambda folder: _walk(folder, passed_over, self.root, self.follow_links))
        found.exclusions += namesakes
        found.exclusions += (Exclusion(path.name, str(path), reason) for path, reason in passed_over.reasons())
        for line in passed_over.lines():
            logger.warning("%s: %s", split, line)
        for name, path in sorted(volumes.items(), key=lambda item: natural_key(item[0])):
            match = NAME_PATTERN.fullmatch(name)
            key = reports.key_of(name)
            reason = _reason_against(match is not None, key, reports, self.empty_report)
            used.add(key)
            if reason or match is None:
                found.exclusions.append(Exclusion(name, str(path), reason))
                continue
            row = metadata.get(name, NO_ROW)
            vector = labels.get(name, labels.get(key, (UNKNOWN_LABEL,) * len(CT_RATE_LABELS) if labels else ()))
            texts = reports.texts[key]
            case = Case(name, match["patient"], split, (path,), *texts, vector, row.rescale, row.spacing_mm, row.shape)
            found.cases.append(case)
        found.notes[f"{split}_reports_without_volume"] = len(reports.texts.keys() - used)


def table_paths(base: Path, split: str) -> tuple[Path, Path, Path]:
    """Return where the report, label and metadata tables of an official split are.

    Args:
        base: the ``dataset`` folder.
        split: ``train`` or ``valid``.
    """
    reports_name, labels_name = SPLIT_TABLE_NAMES[split]
    return (
        base / "radiology_text_reports" / f"{reports_name}_reports.csv",
        base / "multi_abnormality_labels" / f"{labels_name}_predicted_labels.csv",
        base / "metadata" / f"{reports_name}_metadata.csv",
    )


def _volumes(
    folders: list[Path], walk: Callable[[Path], Iterator[tuple[str, Path]]]
) -> tuple[dict[str, Path], list[Exclusion]]:
    """Every volume by name, the first folder that holds it first, and namesakes within one folder."""
    volumes: dict[str, Path] = {}
    namesakes = []
    for folder in folders:
        for name, path in walk(folder):
            first = volumes.setdefault(name, path)
            if first != path and first.is_relative_to(folder):
                namesakes.append(Exclusion(name, str(path), f"same name as {first}"))
    return volumes, namesakes


def _walk(folder: Path, passed_over: PassedOver, root: Path, follow_links: bool) -> Iterator[tuple[str, Path]]:
    for parent, files in walk_folders(folder, passed_over, root=root, follow_links=follow_links):
        yield from ((strip_suffix(file), parent / file) for file in files if file.endswith(SUFFIXES))


def _scan_of(name: str) -> str:
    return name.rpartition("_")[0]


@dataclass(frozen=True)
class _Reports:
    """Cleaned (findings, impression) by volume name; reconstructions without a row share that of their scan."""

    texts: dict[str, tuple[str, str]]
    conflicts: frozenset[str]
    by_scan: dict[str, str]

    def key_of(self, name: str) -> str:
        """Name whose row holds the report of a volume; "" when there is none."""
        return name if name in self.texts else self.by_scan.get(_scan_of(name), "")


def _reason_against(named: bool, key: str, reports: _Reports, empty_report: str) -> str:
    if not named:
        return "name is not split_patient_scan_reconstruction"
    if not key:
        return "no row in the report table"
    if key in reports.conflicts:
        return "two different reports under one name"
    if empty_report == "skip" and count_words(" ".join(reports.texts[key])) < MIN_WORDS:
        return f"report has fewer than {MIN_WORDS} words"
    return ""


def _volume_name(row: dict[str, str], path: Path) -> str:
    name = strip_suffix(row["VolumeName"].strip())
    if Path(name).name != name:
        raise DataError(f"VolumeName {row['VolumeName']!r} is a path", "use plain file names", path=str(path))
    return name


def _read_reports(table: Table) -> _Reports:
    texts: dict[str, tuple[str, str]] = {}
    conflicts = set()
    for row in table.rows:
        if not row["VolumeName"].strip():
            continue
        name = _volume_name(row, table.path)
        both = (clean_report(row["Findings_EN"]), clean_report(row["Impressions_EN"]))
        if texts.setdefault(name, both) != both:
            conflicts.add(name)
    by_scan = {_scan_of(name): name for name in reversed(texts)}
    return _Reports(texts, frozenset(conflicts), by_scan)


def _read_labels(table: Table) -> dict[str, tuple[int, ...]]:
    labels = {}
    for number, row in table.numbered():
        try:
            labels[strip_suffix(row["VolumeName"].strip())] = tuple(
                LABEL_CODES[row[name].strip()] for name in CT_RATE_LABELS
            )
        except KeyError as problem:
            raise DataError(
                f"row {number}: label {problem} is not 0, 1 or empty", "repair it", path=str(table.path)
            ) from None
    return labels


def _read_metadata(table: Table) -> dict[str, TableRow]:
    return {strip_suffix(row["VolumeName"].strip()): table_row(row) for row in table.rows}
