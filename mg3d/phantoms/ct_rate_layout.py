"""Phantom studies as a CT-RATE download: nested folders of NIfTI volumes and three tables (downstream 7.1).

``ROOT/dataset/train/train_1/train_1_a/train_1_a_1.nii.gz``; as in the first release, a volume stores
``(HU - RescaleIntercept) / RescaleSlope`` and the metadata table holds slope and intercept.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterable, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np

from mg3d.datasets.labels import CT_RATE_LABELS
from mg3d.files import write_csv
from mg3d.phantoms.chest import render
from mg3d.phantoms.findings import label_vector
from mg3d.phantoms.studies import Study

REPORT_COLUMNS = ("VolumeName", "ClinicalInformation_EN", "Technique_EN", "Findings_EN", "Impressions_EN")
METADATA_COLUMNS = (
    "VolumeName",
    "Manufacturer",
    "PatientSex",
    "PatientAge",
    "PatientPosition",
    "Rows",
    "Columns",
    "XYSpacing",
    "RescaleIntercept",
    "RescaleSlope",
    "RescaleType",
    "NumberofSlices",
    "ZSpacing",
)
# (folder of the volumes, prefix of reports and metadata, prefix of labels)
TABLE_NAMES = {"train": ("train", "train"), "valid": ("validation", "valid")}
_INTERCEPTS = (-1024, -1024, -8192)
_NOT_GIVEN = "Not given."


def volume_name(split: str, study: Study, reconstruction: int) -> str:
    """Published file name, for example ``valid_53_a_1.nii.gz``; reconstructions count from 1."""
    return f"{split}_{study.patient}_{study.scan}_{reconstruction}.nii.gz"


def stored_intercept(study: Study) -> int:
    """RescaleIntercept of a study: two scanners of three use -1024, the third -8192."""
    return _INTERCEPTS[study.case.patient_seed % len(_INTERCEPTS)]


def write_volumes(root: Path, split: str, study: Study) -> None:
    """Render all reconstructions of a study and write them below ``root/dataset``."""
    stem = f"{split}_{study.patient}"
    folder = root / "dataset" / split / stem / f"{stem}_{study.scan}"
    folder.mkdir(parents=True, exist_ok=True)
    for number, grid in enumerate(study.grids, start=1):
        phantom = render(study.case, grid, number)
        stored_xyz = (phantom.hu.astype(np.int32) - stored_intercept(study)).astype(np.int16).transpose(2, 1, 0)
        data = nifti_bytes(stored_xyz, phantom.spacing_mm)
        (folder / volume_name(split, study, number)).write_bytes(data)


def nifti_bytes(stored_xyz: np.ndarray, spacing_mm: Sequence[float]) -> bytes:
    """A .nii.gz file without a time stamp.

    Args:
        stored_xyz: int16 [X, Y, Z]; x towards the patient's left, y towards the back, z towards the head.
        spacing_mm: voxel size (z, y, x).
    """
    z, y, x = (float(step) for step in spacing_mm)
    # NIfTI's world axes point right, front and up, so the first two run against the array.
    image = nib.Nifti1Image(stored_xyz, np.diag([-x, -y, z, 1.0]))
    image.header.set_xyzt_units("mm")
    return gzip.compress(image.to_bytes(), compresslevel=1, mtime=0)


def write_tables(root: Path, split: str, studies: Iterable[Study]) -> None:
    """Write the report, label and metadata tables of one split."""
    listed = [(study, number + 1) for study in studies for number in range(len(study.grids))]
    reports, labels = TABLE_NAMES[split]
    base = root / "dataset"
    write_csv(
        base / "radiology_text_reports" / f"{reports}_reports.csv",
        REPORT_COLUMNS,
        ([volume_name(split, study, number), *_texts(study)] for study, number in listed),
    )
    write_csv(
        base / "multi_abnormality_labels" / f"{labels}_predicted_labels.csv",
        ("VolumeName", *CT_RATE_LABELS),
        ([volume_name(split, study, n), *map(int, label_vector(study.case.lesions))] for study, n in listed),
    )
    write_csv(
        base / "metadata" / f"{reports}_metadata.csv",
        METADATA_COLUMNS,
        (_metadata_row(split, study, number) for study, number in listed),
    )


def _texts(study: Study) -> tuple[str, str, str, str]:
    return _NOT_GIVEN, "Phantom without contrast.", study.report.findings, study.report.impression or _NOT_GIVEN


def _metadata_row(split: str, study: Study, number: int) -> list[object]:
    grid = study.grids[number - 1]
    rng = np.random.default_rng((study.case.patient_seed, 4))
    sex, age = "FM"[int(rng.integers(2))], int(rng.integers(20, 90))
    spacing = f"[{grid.spacing_mm[2]}, {grid.spacing_mm[1]}]"
    place = [volume_name(split, study, number), "Phantom", sex, f"{age:03d}Y", "HFS", grid.shape[1], grid.shape[2]]
    return [*place, spacing, stored_intercept(study), 1, "HU", grid.shape[0], grid.spacing_mm[0]]
