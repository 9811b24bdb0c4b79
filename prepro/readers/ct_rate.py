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
from mg3d.datasets.volume import WINDOW_HU
from mg3d.errors import DataError
from mg3d.scans.geometry import Geometry, grid_spacing, plan_axes, resample_crop, to_canonical
from mg3d.scans.hounsfield import decide_rescale
from mg3d.scans.nifti import RawVolume, check_spacing, read_nifti
from prepro.readers.base import Case, CaseList, Exclusion, PackedImage
from prepro.readers.tables import natural_key, read_table

SPLIT_TABLE_NAMES = {"train": ("train", "train"), "valid": ("validation", "valid")}
NAME_PATTERN = re.compile(r"(?P<scan>(?P<patient>[A-Za-z]+_\d+)_[A-Za-z]+)_\d+")
SUFFIXES = (".nii.gz", ".nii")
MAX_NAN_SHARE = 0.1
SPACING_TOLERANCE = 0.02


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
    """

    root: Path
    geometry: Geometry
    rescale: str = "auto"
    orientation: str = "canonical"
    empty_report: str = "skip"
    max_volume_gib: float = 4.0

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
        raw = read_nifti(case.source[0], self.max_volume_gib)
        voxels, filled = _fill_nonfinite(raw.voxels_xyz, case.source[0])
        try:
            scale = decide_rescale(voxels, (raw.slope, raw.intercept), case.rescale, self.rescale)
        except DataError as problem:
            raise DataError(problem.message, problem.remedy, path=str(case.source[0])) from problem
        spacing_xyz, warnings = choose_spacing(raw, case)
        warnings.extend(raw.warnings)
        if not scale.plausible:
            warnings.append("values do not look like a chest CT in HU")
        air = (WINDOW_HU[0] - scale.intercept) / scale.slope
        canonical, spacing_mm, tilt = to_canonical(voxels, raw.affine, spacing_xyz, self.orientation, air)
        plans = plan_axes(canonical.shape, spacing_mm, self.geometry)
        values_hu = resample_crop(canonical, plans, scale.slope, scale.intercept)
        record = {"rescale": scale.decision, "tilt_degrees": round(tilt, 3), "filled_voxels": filled}
        record |= {"stored_shape_DHW": list(canonical.shape), "stored_spacing_mm": [round(s, 6) for s in spacing_mm]}
        record["orientation"] = "header" if raw.oriented else "assumed LPS"
        return PackedImage(np.rint(values_hu).astype(np.int16), grid_spacing(plans), record, tuple(warnings))


def choose_spacing(raw: RawVolume, case: Case) -> tuple[tuple[float, float, float], list[str]]:
    """Take the header's voxel size, the metadata table's where the header has none; say so when they differ.

    Args:
        raw: the volume as read.
        case: its table row.

    Returns:
        voxel size along the stored axes X, Y, Z in mm, and warnings.

    Raises:
        DataError: neither source has a voxel size.
    """
    table = case.table_spacing_mm[::-1] if case.table_spacing_mm else None
    if raw.spacing_mm is None:
        if table is None:
            raise DataError("no voxel size in the header or the metadata table", "add it", path=str(case.source[0]))
        check_spacing(list(table), str(case.source[0]))
        return (table[0], table[1], table[2]), ["voxel size taken from the metadata table"]
    if table and not np.allclose(sorted(raw.spacing_mm), sorted(table), rtol=SPACING_TOLERANCE):
        seen = "x".join(f"{value:g}" for value in table)
        return raw.spacing_mm, [f"metadata table says {seen} mm (x, y, z), the header is used"]
    return raw.spacing_mm, []


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


def _fill_nonfinite(voxels: np.ndarray, path: Path) -> tuple[np.ndarray, int]:
    """Replace NaN and infinity by the smallest finite value (air or padding); count them."""
    if voxels.dtype.kind != "f":
        return voxels, 0
    bad = ~np.isfinite(voxels)
    count = int(np.count_nonzero(bad))
    if count > MAX_NAN_SHARE * voxels.size:
        raise DataError(f"{count} of {voxels.size} voxels are not finite", "download the file again", path=str(path))
    if count:
        voxels[bad] = voxels[~bad].min()
    return voxels, count
