"""Own scans from one CSV: columns, paths, splits, patients, labels, scale."""

from __future__ import annotations

import csv
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prepro_builders import FINDINGS, IMPRESSION, SMALL, chest, save_nifti

from mg3d.errors import DataError
from prepro.readers.base import CaseList
from prepro.readers.own_data import OwnDataReader
from prepro.splits import assign_splits, patient_overlaps

HEADER = ("volume", "findings", "impression", "split", "patient_id")


def _rows(count: int, split: str = "train") -> list[list[str]]:
    return [[f"scans/{n}.nii.gz", f"{FINDINGS} Case {n}.", IMPRESSION, split, f"p{n // 2}"] for n in range(count)]


def _write(folder: Path, header: tuple[str, ...], rows: list[list[str]], separator: str = ",") -> Path:
    (folder / "scans").mkdir(exist_ok=True)
    for row in rows:
        if row[0].endswith(".nii.gz") and not row[0].startswith(("/", "..")) and "missing" not in row[0]:
            (folder / row[0]).touch()
    path = folder / "own.csv"
    with path.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle, delimiter=separator)
        writer.writerow(header)
        writer.writerows(rows)
    return path


def _find(table: Path, **options: Any) -> CaseList:
    return OwnDataReader(table, table.parent, SMALL, **options).find_cases()


def _reasons(found: CaseList) -> dict[str, str]:
    return {item.image_id: item.reason for item in found.exclusions}


def test_rows_become_cases(tmp_path: Path) -> None:
    (case, other) = _find(_write(tmp_path, HEADER, _rows(2, "Validation"))).cases
    assert (case.image_id, case.patient_id, case.origin) == ("scans/0", "p0", "val")
    assert case.source == ((tmp_path / "scans/0.nii.gz").resolve(),)
    assert (case.findings, case.impression) == (f"{FINDINGS} Case 0.", IMPRESSION)
    assert case.labels == () and case.rescale is None
    assert other.patient_id == "p0"


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_names_are_free_in_case_blanks_and_separator(tmp_path: Path, separator: str) -> None:
    header = ("Volume_Path", "FINDINGS", "Impressions_EN", "Set", "Patient ID", "lung NODULE", "Rescale-Slope", "Note")
    rows = [[*row, label, "2", "x"] for row, label in zip(_rows(3), ("1", "", "0.0"), strict=True)]
    found = _find(_write(tmp_path, header, rows, separator))
    assert [case.labels.count(-1) for case in found.cases] == [17, 18, 17]
    assert [case.labels[9] for case in found.cases] == [1, -1, 0]
    assert found.cases[0].rescale == (2.0, 0.0)
    assert found.notes["columns_ignored"] == ["Note"]


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (("scanfile", "findings"), "column 'volume' is missing"),
        (("volume", "impression"), "column 'findings' is missing"),
        (("volume", "Volume Path", "findings"), "columns 'volume' and 'Volume Path' both mean 'volume'"),
        (("volume", "findings", "Emphysema", "emphysema"), "both mean 'Emphysema'"),
    ],
)
def test_a_missing_or_doubled_column_is_named(tmp_path: Path, header: tuple[str, ...], words: str) -> None:
    with pytest.raises(DataError) as caught:
        _find(_write(tmp_path, header, []))
    assert words in str(caught.value)
    assert "missing" not in words or ", ".join(header) in str(caught.value)


@pytest.mark.parametrize(
    ("column", "cell", "words"),
    [
        ("split", "tran", "row 3: split 'tran'"),
        ("split", "", "row 3: split ''"),
        ("Emphysema", "yes", "row 3: label 'Emphysema' is 'yes'"),
        ("slope", "0", "row 3: slope and intercept"),
        ("intercept", "nan", "row 3: slope and intercept"),
        ("slope", "1,5", "row 3: slope and intercept"),
    ],
)
def test_a_bad_cell_is_named_by_its_row(tmp_path: Path, column: str, cell: str, words: str) -> None:
    good = {"split": "train", "Emphysema": "1", "slope": "1", "intercept": "-1024"}[column]
    rows = [[f"scans/{n}.nii.gz", FINDINGS, value] for n, value in enumerate((good, cell))]
    with pytest.raises(DataError) as caught:
        _find(_write(tmp_path, ("volume", "findings", column), rows))
    assert words in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 5


def test_unusable_rows_are_left_out_with_their_number(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = _rows(9)
    rows[1][4] = " "
    rows[2][0] = ""
    rows[3][0] = "scans/missing.nii.gz"
    rows[4][0] = "../out.nii.gz"
    rows[5][1:3] = ["NA", "nan"]
    rows[6][1:3] = ["1 2 3 4", "..."]
    rows[7] = [""] * 5
    with caplog.at_level(logging.WARNING):
        found = _find(_write(tmp_path, HEADER, rows))
    assert [case.image_id for case in found.cases] == ["scans/0", "scans/8"]
    reasons = _reasons(found)
    assert reasons["scans/1"] == "row 3: patient id is empty"
    assert reasons["row 4"] == "row 4: no volume path"
    assert reasons["scans/missing"] == "row 5: file not found"
    assert "leaves the data root" in reasons["row 6"]
    assert "fewer than 3 words" in reasons["scans/5"] and "row 7" in reasons["scans/5"]
    assert "fewer than 3 words" in reasons["scans/6"]
    assert "row 3: patient id is empty" in caplog.text
    kept = _find(tmp_path / "own.csv", empty_report="keep")
    assert "scans/5" in [case.image_id for case in kept.cases]
    assert {case.findings for case in kept.cases if case.image_id == "scans/5"} == {""}


def test_repeated_rows(tmp_path: Path) -> None:
    rows = _rows(4)
    rows += [list(rows[0]), list(rows[1]), list(rows[2]), list(rows[3])]
    rows[5][1] = "Another report of the same scan."
    rows[6][3] = "test"
    rows[7][4] = "p9"
    found = _find(_write(tmp_path, HEADER, rows))
    assert [(case.image_id, case.origin) for case in found.cases] == [
        ("scans/0", "train"),
        ("scans/2", "train"),
        ("scans/2", "test"),
    ]
    reasons = [item.reason for item in found.exclusions]
    assert reasons.count("row 6: the row is there twice") == 1
    assert sum("two different reports or patients" in reason for reason in reasons) == 4
    cases, _ = assign_splits(found, "clm_own")
    assert patient_overlaps(cases) == ["scans/2 (test) and scans/2 (train)"]


def test_two_files_that_differ_in_their_ending_only(tmp_path: Path) -> None:
    rows = [["scans/a.nii.gz", FINDINGS], ["scans/a.nrrd", FINDINGS]]
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans" / "a.nrrd").touch()
    found = _find(_write(tmp_path, ("volume", "findings"), rows))
    assert found.cases == []
    assert all("another file ending" in item.reason for item in found.exclusions)


def test_without_patients_a_loud_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [row[:3] for row in _rows(4)]
    with caplog.at_level(logging.WARNING):
        found = _find(_write(tmp_path, HEADER[:3], rows))
    assert len({case.patient_id for case in found.cases}) == 4
    assert "EVERY SCAN COUNTS AS ITS OWN PATIENT" in caplog.text
    assert "no column" in found.notes["patients"]


def test_without_splits_test_and_validation_are_drawn_by_patient(tmp_path: Path) -> None:
    rows = [[row[0], row[1], row[4]] for row in _rows(80)]
    found = _find(_write(tmp_path, ("volume", "findings", "patient_id"), rows))
    cases, unused = assign_splits(found, "clm_own")
    patients = {split: {c.patient_id for c in cases if c.splits == (split,)} for split in ("train", "val", "test")}
    assert {split: len(names) for split, names in patients.items()} == {"train": 32, "val": 4, "test": 4}
    assert not unused and patient_overlaps(cases) == []
    again, _ = assign_splits(found, "clm_own_b")
    assert again == cases
    assert assign_splits(found, "clm_own", seed=1)[0] != cases
    wide, _ = assign_splits(found, "clm_own", val_fraction=0.25)
    assert len({c.patient_id for c in wide if c.splits == ("test",)}) == 10


def test_a_table_with_train_and_test_gets_a_drawn_validation(tmp_path: Path) -> None:
    rows = [*_rows(40), *[[f"scans/t{n}.nii.gz", FINDINGS, "", "test", f"q{n}"] for n in range(5)]]
    cases, _ = assign_splits(_find(_write(tmp_path, HEADER, rows)), "clm_own")
    counts = {split: sum(case.splits == (split,) for case in cases) for split in ("train", "val", "test")}
    assert counts == {"train": 36, "val": 4, "test": 5}


def test_a_turkish_table_is_refused_until_its_encoding_is_named(tmp_path: Path) -> None:
    table = _write(tmp_path, HEADER, _rows(2))
    table.write_bytes(
        table.read_text(encoding="utf-8").replace("No pleural", "Göğüs işlemi. No pleural", 1).encode("cp1254")
    )
    with pytest.raises(DataError) as refused:
        _find(table)
    assert "row 2" in refused.value.message and "'öğüş' in cp1254" in refused.value.message
    assert "--encoding" in refused.value.remedy and "lemi" not in str(refused.value)
    found = OwnDataReader(table, tmp_path, SMALL, encoding="cp1254").find_cases()
    assert "Göğüs işlemi" in found.cases[0].findings
    assert found.notes["encodings"] == {table.name: "cp1254"}


def test_slope_and_intercept_are_used_as_told(tmp_path: Path) -> None:
    rows = [["scans/a.nii.gz", FINDINGS, "2", "-1000"]]
    table = _write(tmp_path, ("volume", "findings", "slope", "intercept"), rows)
    hu = chest(1)
    save_nifti(tmp_path / "scans" / "a.nii.gz", ((hu.astype(int) + 1000) // 2).astype(np.int16))
    reader = OwnDataReader(table, tmp_path, SMALL)
    (case,) = reader.find_cases().cases
    applied = reader.load(case)
    assert applied.record["rescale"] == "applied"
    save_nifti(tmp_path / "scans" / "b.nii.gz", hu)
    table = _write(tmp_path, ("volume", "findings", "slope"), [["scans/b.nii.gz", FINDINGS, ""]])
    plain = OwnDataReader(table, tmp_path, SMALL)
    as_stored = plain.load(plain.find_cases().cases[0])
    assert as_stored.record["rescale"] == "as_stored"
    assert np.abs(applied.voxels.astype(int) - as_stored.voxels).max() <= 3
    with pytest.raises(DataError, match="slope and intercept"):
        OwnDataReader(table, tmp_path, SMALL, rescale="apply").load(plain.find_cases().cases[0])
    json.dumps(as_stored.record)


@pytest.mark.realdata
def test_real_nrrd_and_dicom_folder(shared_dir: Path, tmp_path: Path) -> None:
    check_nrrd_and_series(tmp_path, shared_dir / "data" / "ct" / "cip_ct-64.nrrd")


def test_an_nrrd_and_a_dicom_folder_of_it_give_the_same(tmp_path: Path) -> None:
    import SimpleITK

    image = SimpleITK.GetImageFromArray(chest(shape=(40, 36, 24)).transpose(2, 1, 0))
    image.SetSpacing((4.2, 4.2, 4.0))
    image.SetOrigin((-80.5, -70.0, 12.0))
    SimpleITK.WriteImage(image, str(tmp_path / "made.nrrd"))
    check_nrrd_and_series(tmp_path, tmp_path / "made.nrrd")


def check_nrrd_and_series(tmp_path: Path, nrrd: Path) -> None:
    """A table that names an NRRD and the DICOM slices made of it."""
    import shutil

    import SimpleITK

    (tmp_path / "study" / "series").mkdir(parents=True)
    shutil.copy(nrrd, tmp_path / "study" / "ct.nrrd")
    image = SimpleITK.Cast(SimpleITK.ReadImage(str(nrrd)), SimpleITK.sitkInt16)
    for number in range(image.GetDepth()):
        plane = image[:, :, number]
        position = image.TransformIndexToPhysicalPoint((0, 0, number))
        tags = {
            "0008|0060": "CT",
            "0020|000e": "1.2.3",
            "0020|0013": str(number),
            "0020|0032": "\\".join(f"{value:.6f}" for value in position),
            "0020|0037": "1\\0\\0\\0\\1\\0",
            "0018|0050": str(image.GetSpacing()[2]),
            "0028|1052": "0",
            "0028|1053": "1",
        }
        for tag, value in tags.items():
            plane.SetMetaData(tag, value)
        writer = SimpleITK.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.SetFileName(str(tmp_path / "study" / "series" / f"{number}.dcm"))
        writer.Execute(plane)
    table = _write(tmp_path, ("volume", "findings"), [["study/ct.nrrd", FINDINGS], ["./study/series", FINDINGS]])
    reader = OwnDataReader(table, tmp_path, SMALL)
    first, second = reader.find_cases().cases
    assert (first.image_id, second.image_id) == ("study/ct", "study/series")
    volume, series = reader.load(first), reader.load(second)
    assert np.abs(volume.voxels.astype(int) - series.voxels).max() <= 1
    assert volume.spacing_mm == pytest.approx(series.spacing_mm, rel=1e-4)
    assert volume.record["source_sha256"] != series.record["source_sha256"]
