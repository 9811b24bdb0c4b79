"""Lay CT volumes out as a small CT-RATE download: the real ones, or some that are made here under the same names.

By hand: ``python tests/prepro/real_ct.py --shared DIR --out FOLDER`` and then
``python prepro/prepro_pretraining_data.py ct_rate --root FOLDER --out ARROWS``. Nothing real may be published.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from pathlib import Path

import SimpleITK

from mg3d.datasets.labels import CT_RATE_LABELS
from mg3d.phantoms.canvas import Grid
from mg3d.phantoms.chest import render
from mg3d.phantoms.findings import label_vector
from mg3d.phantoms.studies import plan_studies

REAL_VOLUMES = (
    "lidc_0314_chest_2mm.nii.gz",
    "pyradiomics_lung1_image.nrrd",
    "cip_ct-64.nrrd",
    "cip_ct-64-transformed.nrrd",
    "totalseg_heart_ct_1p5mm.nii.gz",
    "totalseg_abdomen_ct_3mm.nii.gz",
    "crlm_1006_upper_abdomen_pad-3024.nii.gz",
)
REPORTS = "text_restricted/ctrate_text_classifier_train800.csv"
REPORT_COLUMNS = ("VolumeName", "ClinicalInformation_EN", "Technique_EN", "Findings_EN", "Impressions_EN")


def lay_out_real_ct(shared: Path, out: Path, volumes: tuple[str, ...] = REAL_VOLUMES, first_report: int = 0) -> Path:
    """Write the volumes as NIfTI with real report text and labels; the last one is the official validation split.

    The reports belong to other patients: the pairs are good for trying the pipeline, not for learning medicine.

    Args:
        shared: folder with the shared test data (``data/ct`` and ``data/text_restricted`` below it).
        out: folder to write; becomes the CT-RATE root.
        volumes: file names below ``data/ct``.
        first_report: row of the report table to start at.

    Returns:
        ``out``.
    """
    with (shared / "data" / REPORTS).open(encoding="utf-8", newline="") as handle:
        rows = list(csv.DictReader(handle))[first_report : first_report + len(volumes)]
    for split, long_name, part in (("train", "train", slice(None, -1)), ("valid", "validation", slice(-1, None))):
        _write_split(shared, out / "dataset", split, long_name, volumes[part], rows[part])
    return out


def make_collection(folder: Path) -> Path:
    """Write phantoms in place of the real volumes and of the first reports, in several sizes, one in a turned grid.

    Returns:
        ``folder``, to be given to :func:`lay_out_real_ct`.
    """
    studies = list(plan_studies("train", len(REAL_VOLUMES), 64, seed=0))
    for number, (name, study) in enumerate(zip(REAL_VOLUMES, studies, strict=True)):
        grid = Grid((40 + 4 * number, 72, 80), (5.0, 4.0 + 0.2 * number, 4.0))
        image = SimpleITK.GetImageFromArray(render(study.case, grid).hu)
        image.SetSpacing(grid.spacing_mm[::-1])
        if "transformed" in name:
            cosine, sine = math.cos(math.radians(20)), math.sin(math.radians(20))
            image.SetDirection((cosine, -sine, 0, sine, cosine, 0, 0, 0, 1))
        path = folder / "data" / "ct" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        SimpleITK.WriteImage(image, str(path), useCompression=True)
    rows: list[tuple[object, ...]] = [
        (f"train_{number}", f'{study.report.findings}"{study.report.impression}"', *label_vector(study.case.lesions))
        for number, study in enumerate(studies)
    ]
    write_table(folder / "data" / REPORTS, ("AccessionNo", "report_text", *CT_RATE_LABELS), rows)
    return folder


def _write_split(
    shared: Path, base: Path, split: str, long_name: str, volumes: tuple[str, ...], rows: list[dict[str, str]]
) -> None:
    reports, labels, metadata = [], [], []
    for number, (file, row) in enumerate(zip(volumes, rows, strict=True), start=1):
        name = f"{split}_{number}_a_1"
        spacing = _write_volume(shared / "data" / "ct" / file, base / split, name)
        findings, _, impression = row["report_text"].partition('"')
        reports.append((f"{name}.nii.gz", "", "", findings.strip(), impression.strip(' "') or "Not given."))
        labels.append((f"{name}.nii.gz", *list(row.values())[2:]))
        metadata.append((f"{name}.nii.gz", 1, 0, f"[{spacing[0]}, {spacing[1]}]", spacing[2]))
    write_table(base / "radiology_text_reports" / f"{long_name}_reports.csv", REPORT_COLUMNS, reports)
    label_names = ("VolumeName", *list(rows[0])[2:])
    write_table(base / "multi_abnormality_labels" / f"{split}_predicted_labels.csv", label_names, labels)
    header = ("VolumeName", "RescaleSlope", "RescaleIntercept", "XYSpacing", "ZSpacing")
    write_table(base / "metadata" / f"{long_name}_metadata.csv", header, metadata)


def _write_volume(source: Path, split_folder: Path, name: str) -> tuple[float, float, float]:
    image = SimpleITK.ReadImage(str(source))
    patient, scan = name.rsplit("_", 2)[0], name.rsplit("_", 1)[0]
    folder = split_folder / patient / scan
    folder.mkdir(parents=True, exist_ok=True)
    SimpleITK.WriteImage(image, str(folder / f"{name}.nii.gz"), useCompression=True)
    x, y, z = image.GetSpacing()
    return x, y, z


def write_table(path: Path, header: tuple[str, ...], rows: list[tuple[object, ...]]) -> None:
    """Write a CSV with its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(header)
        writer.writerows(rows)


def main() -> int:
    """Lay the volumes out from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shared", type=Path, required=True, help="folder with data/ct and data/text_restricted")
    parser.add_argument("--out", type=Path, required=True, help="CT-RATE root to write")
    parser.add_argument("--first-report", type=int, default=0, help="row of the report table to start at")
    options = parser.parse_args()
    sys.stdout.write(f"{lay_out_real_ct(options.shared, options.out, first_report=options.first_report)}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
