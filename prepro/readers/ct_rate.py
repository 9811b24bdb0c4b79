"""CT-RATE in its published layout: nested folders of NIfTI volumes, three tables (spec downstream 7.1 to 7.3).

``ROOT/dataset/{train,valid}/train_1/train_1_a/train_1_a_1.nii.gz`` with ``radiology_text_reports``,
``multi_abnormality_labels`` and ``metadata`` beside the volumes; the corrected ``train_fixed`` and ``valid_fixed``
folders of the second release are preferred where present. Labels and metadata are optional, reports are not.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from mg3d.datasets.labels import CT_RATE_LABELS, UNKNOWN_LABEL
from mg3d.datasets.report_text import MIN_WORDS, clean_text
from mg3d.errors import DataError
from mg3d.scans.geometry import Geometry
from mg3d.scans.prepare import prepare_scan
from mg3d.scans.read import read_scan
from prepro.readers.base import Case, CaseList, Exclusion, PackedImage
from prepro.readers.tables import natural_key, read_table

SPLIT_TABLE_NAMES = {"train": ("train", "train"), "valid": ("validation", "valid")}
NAME_PATTERN = re.compile(r"(?P<scan>(?P<patient>[A-Za-z]+_\d+)_[A-Za-z]+)_\d+")
SUFFIXES = (".nii.gz", ".nii")


@dataclass(frozen=True)
class CtRateReader:
    """Reader of a CT-RATE download.

    Attributes:
        root: the download, or its ``dataset`` folder.
        geometry: the grid to end on.
        rescale: ``auto``, ``apply`` or ``skip``, see :mod:`mg3d.scans.hounsfield`.
        orientation: ``canonical`` or ``snap``, see :func:`mg3d.scans.geometry.to_canonical`.
        empty_report: ``skip`` leaves scans out whose report is empty, ``keep`` packs them.
        max_volume_gib: largest volume to read.
        assumed_spacing_mm: (z, y, x) used only where neither header nor metadata table has a voxel size.
    """

    root: Path
    geometry: Geometry
    rescale: str = "auto"
    orientation: str = "canonical"
    empty_report: str = "skip"
    max_volume_gib: float = 4.0
    assumed_spacing_mm: tuple[float, float, float] | None = None

    corpus: ClassVar[str] = "clm_ct_rate"
    label_names: ClassVar[tuple[str, ...]] = CT_RATE_LABELS
    window: ClassVar[str] = "[-1000,1000]"

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
            folder = self._volume_folder(base, split)
            if folder is not None:
                self._add_split(found, base, folder, split)
        if not found.cases and not found.exclusions:
            raise DataError("no .nii.gz volume below train/ or valid/", "check --root", path=str(base))
        return found

    def dataset_folder(self) -> Path:
        """Return the folder that holds ``train`` or ``valid``: the root itself or its ``dataset`` folder."""
        for folder in (self.root / "dataset", self.root):
            if any(self._volume_folder(folder, split) for split in SPLIT_TABLE_NAMES):
                return folder
        raise DataError("no dataset/train or dataset/valid folder here", "give the CT-RATE root", path=str(self.root))

    @staticmethod
    def _volume_folder(base: Path, split: str) -> Path | None:
        candidates = (base / f"{split}_fixed", base / split)
        return next((folder for folder in candidates if folder.is_dir()), None)

    def _add_split(self, found: CaseList, base: Path, folder: Path, split: str) -> None:
        reports_name, labels_name = SPLIT_TABLE_NAMES[split]
        reports, conflicts = _read_reports(base / "radiology_text_reports" / f"{reports_name}_reports.csv")
        labels = _read_labels(base / "multi_abnormality_labels" / f"{labels_name}_predicted_labels.csv")
        metadata = _read_metadata(base / "metadata" / f"{reports_name}_metadata.csv")
        by_scan = {_scan_of(name): name for name in reversed(reports)}
        used = set()
        for name, path in sorted(_volumes(folder), key=lambda item: natural_key(item[0])):
            match = NAME_PATTERN.fullmatch(name)
            key = name if name in reports else by_scan.get(_scan_of(name), "")
            reason = _reason_against(match is not None, key, conflicts, reports, self.empty_report)
            used.add(key)
            if reason or match is None:
                found.exclusions.append(Exclusion(name, str(path), reason))
                continue
            slope_intercept, spacing = metadata.get(name, (None, None))
            vector = labels.get(name, labels.get(key, (UNKNOWN_LABEL,) * len(CT_RATE_LABELS) if labels else ()))
            found.cases.append(
                Case(name, match["patient"], split, (path,), *reports[key], vector, slope_intercept, spacing)
            )
        found.notes[f"{split}_reports_without_volume"] = len(reports.keys() - used)

    def load(self, case: Case) -> PackedImage:
        """Read, rescale, orient and resample one volume.

        Args:
            case: from :meth:`find_cases`.

        Returns:
            int16 HU on the configured grid.

        Raises:
            DataError: the file is damaged or its values or geometry make no sense.
        """
        scan = prepare_scan(
            read_scan(case.source[0], self.max_volume_gib),
            self.geometry,
            rescale=self.rescale,
            table_rescale=case.rescale,
            table_spacing_mm=case.table_spacing_mm,
            assumed_spacing_mm=self.assumed_spacing_mm,
            orientation=self.orientation,
        )
        return PackedImage(np.rint(scan.voxels_hu).astype(np.int16), scan.spacing_mm, scan.record, scan.warnings)


def _volumes(folder: Path) -> Iterator[tuple[str, Path]]:
    for parent, _, files in os.walk(folder):
        for file in files:
            suffix = next((ending for ending in SUFFIXES if file.endswith(ending)), None)
            if suffix and not file.startswith("."):
                yield file.removesuffix(suffix), Path(parent) / file


def _stem(volume_name: str) -> str:
    return volume_name.strip().removesuffix(".gz").removesuffix(".nii")


def _scan_of(name: str) -> str:
    return name.rpartition("_")[0]


def _reason_against(
    named: bool, key: str, conflicts: set[str], reports: dict[str, tuple[str, str]], empty_report: str
) -> str:
    if not named:
        return "name is not split_patient_scan_reconstruction"
    if not key:
        return "no row in the report table"
    if key in conflicts:
        return "two different reports under one name"
    if len(" ".join(reports[key]).split()) < MIN_WORDS and empty_report == "skip":
        return f"report has fewer than {MIN_WORDS} words"
    return ""


def _read_reports(path: Path) -> tuple[dict[str, tuple[str, str]], set[str]]:
    reports: dict[str, tuple[str, str]] = {}
    conflicts = set()
    for row in read_table(path, ("VolumeName", "Findings_EN", "Impressions_EN")):
        name = _stem(row["VolumeName"])
        texts = (clean_text(row["Findings_EN"]), clean_text(row["Impressions_EN"]))
        if Path(name).name != name:
            raise DataError(f"VolumeName {row['VolumeName']!r} is a path", "use plain file names", path=str(path))
        if reports.setdefault(name, texts) != texts:
            conflicts.add(name)
    return reports, conflicts


def _read_labels(path: Path) -> dict[str, tuple[int, ...]]:
    if not path.is_file():
        return {}
    codes = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "": UNKNOWN_LABEL}
    labels = {}
    for number, row in enumerate(read_table(path, ("VolumeName", *CT_RATE_LABELS)), start=2):
        try:
            labels[_stem(row["VolumeName"])] = tuple(codes[row[name].strip()] for name in CT_RATE_LABELS)
        except KeyError as problem:
            raise DataError(
                f"row {number}: label {problem} is not 0, 1 or empty", "repair it", path=str(path)
            ) from None
    return labels


MetadataRow = tuple[tuple[float, float] | None, tuple[float, float, float] | None]


def _read_metadata(path: Path) -> dict[str, MetadataRow]:
    if not path.is_file():
        return {}
    rows = read_table(path, ("VolumeName", "RescaleSlope", "RescaleIntercept", "XYSpacing", "ZSpacing"))
    return {_stem(row["VolumeName"]): _metadata_row(row) for row in rows}


def _metadata_row(row: dict[str, str]) -> MetadataRow:
    try:
        rescale = (float(row["RescaleSlope"]), float(row["RescaleIntercept"]))
    except ValueError:
        rescale = None
    if rescale and (not np.isfinite(rescale).all() or rescale[0] == 0):
        rescale = None
    try:
        in_plane = json.loads(row["XYSpacing"])
        spacing = (float(row["ZSpacing"]), float(in_plane[-1]), float(in_plane[0]))
    except (ValueError, TypeError, IndexError):
        return rescale, None
    return rescale, spacing if np.isfinite(spacing).all() and min(spacing) > 0 else None
