"""The verdict on an own table: nothing to pack, ids that a spreadsheet rewrote, reports of every kind, exit codes."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from prepro_builders import FINDINGS, SMALL, chest, save_nifti
from verify_builders import run_verify

from mg3d.errors import DataError
from mg3d.files import write_csv
from prepro.prepro_pretraining_data import main as pack
from prepro.readers.own_data import OwnDataReader
from prepro.splits import assign_splits, patient_overlaps

HEADER = ["volume", "findings", "split", "patient_id"]


def table(folder: Path, rows: list[list[object]], header: list[str] = HEADER) -> Path:
    write_csv(folder / "cases.csv", header, rows)
    return folder / "cases.csv"


def scans(folder: Path, count: int) -> list[str]:
    names = [f"scan{number}.nii.gz" for number in range(count)]
    for number, name in enumerate(names):
        save_nifti(folder / name, chest(number))
    return names


def rows_of(names: list[str], patients: list[str], split: str = "train") -> list[list[object]]:
    return [[name, f"{FINDINGS} {name}", split, patient] for name, patient in zip(names, patients, strict=True)]


@pytest.mark.parametrize("name", ["x{}.nii.gz", ".\\x{}.nii.gz", "C:\\data\\x{}.nii.gz", "../x{}.nii.gz"])
def test_a_table_of_which_nothing_is_there_is_an_error_as_for_packing(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = table(tmp_path, rows_of([name.format(n) for n in range(3)], ["a", "b", "c"]))
    code, findings, summary = run_verify(path)
    assert code == 2 and summary["errors"] == 1 and summary["warnings"] == 3
    assert [item["code"] for item in findings] == ["nothing_to_pack", *["scan_left_out"] * 3]
    assert findings[0]["file"] == str(path) and "none of 3" in findings[0]["message"]
    assert pack(["own", "--table", str(path), "--out", str(tmp_path / "out")]) == 2
    assert "no scan could be packed" in capsys.readouterr().err


def test_an_empty_table_is_an_error(tmp_path: Path) -> None:
    code, (item, *_), _ = run_verify(table(tmp_path, []))
    assert code == 2 and item["code"] == "nothing_to_pack"


def test_single_losses_are_warnings_and_strict_makes_them_count(tmp_path: Path) -> None:
    names = [*scans(tmp_path, 2), "gone1.nii.gz", "gone2.nii.gz"]
    path = table(tmp_path, rows_of(names, ["a", "b", "c", "d"]))
    code, findings, summary = run_verify(path, "--quick", "--val-fraction", "0")
    lost = [item for item in findings if item["code"] == "scan_left_out"]
    assert code == 0 and len(lost) == 2 and summary["scans"] == 4
    assert all("file not found" in item["message"] for item in lost)
    assert run_verify(path, "--quick", "--strict", "--val-fraction", "0")[0] == 1


def test_paths_written_on_windows_are_read(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    scans(tmp_path / "sub", 1)
    found = OwnDataReader(table(tmp_path, rows_of([".\\sub\\scan0.nii.gz"], ["a"])), tmp_path, SMALL).find_cases()
    assert [case.image_id for case in found.cases] == ["sub/scan0"]
    lost = OwnDataReader(table(tmp_path, rows_of([".\\sub\\other.nii.gz"], ["a"])), tmp_path, SMALL).find_cases()
    assert "neither as written nor with / for \\" in lost.exclusions[0].reason


@pytest.mark.parametrize("spellings", [("001", "1"), ("1", "1.0"), ("P7", "p7"), ("007", "7.00")])
def test_spellings_of_one_patient_never_part(
    spellings: tuple[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = scans(tmp_path, 2)
    path = table(
        tmp_path,
        [[names[0], FINDINGS + " a", "train", spellings[0]], [names[1], FINDINGS + " b", "test", spellings[1]]],
    )
    code, findings, _ = run_verify(path, "--quick")
    kinds = {item["code"]: item for item in findings}
    assert code == 2 and {"patient_spelled_twice", "patient_in_two_splits"} <= kinds.keys()
    said = kinds["patient_spelled_twice"]["message"]
    assert all(f"{spelling!r}" in said for spelling in spellings) and "entry 2" in said and "entry 3" in said
    with caplog.at_level(logging.WARNING):
        cases, _ = assign_splits(OwnDataReader(path, tmp_path, SMALL).find_cases(), "clm_own")
    assert len(patient_overlaps(cases)) == 1 and "differ in spelling only" in caplog.text
    assert [case.patient_id for case in cases] == list(spellings), "ids are kept as written"


def test_a_draw_keeps_all_spellings_of_a_patient_together(tmp_path: Path) -> None:
    names = scans(tmp_path, 40)
    patients = [(f"{n // 2:03d}", f"{n // 2}")[n % 2] for n in range(40)]
    rows = [[name, f"{FINDINGS} {name}", patient] for name, patient in zip(names, patients, strict=True)]
    found = OwnDataReader(table(tmp_path, rows, ["volume", "findings", "patient"]), tmp_path, SMALL).find_cases()
    for seed in range(5):
        cases, _ = assign_splits(found, "clm_own", seed=seed, val_fraction=0.3)
        assert patient_overlaps(cases) == [] and len({case.splits for case in cases}) == 3
        assert all(cases[n].splits == cases[n + 1].splits for n in range(0, 40, 2))


def test_numbers_that_lost_their_digits_are_no_patients(tmp_path: Path) -> None:
    path = table(tmp_path, rows_of(scans(tmp_path, 1), ["1.23457E+12"]))
    with pytest.raises(DataError, match="row 2: patient id") as refused:
        OwnDataReader(path, tmp_path, SMALL).find_cases()
    assert "text" in refused.value.remedy


KINDS_OF_REPORTS: dict[str, tuple[str, str | None]] = {
    "empty": ("", None),
    "blanks": (" \t ", None),
    "nan": ("nan", None),
    "NA": ("NA", None),
    "one letter": ("x", None),
    "100,000 letters": ("clear lung " * 9091, ("clear lung " * 9091).strip()),
    "punctuation": ("... , !!", None),
    "digits": ("12 34 56", None),
    "Chinese": ("左肺下叶见结节", "左肺下叶见结节"),
    "emoji": ("lungs are clear 🫁", "lungs are clear 🫁"),
    "right to left": ("الرئتان صافيتان بدون انصباب", "الرئتان صافيتان بدون انصباب"),
    "zero byte": ("lungs\0 are clear", "lungs are clear"),
    "lines": ("lungs\r\nare\rclear\nnow", "lungs are clear now"),
    "quotes, commas": ('said "clear", then; left', 'said "clear", then; left'),
    "mark in the cell": ("\ufefflungs are clear", "lungs are clear"),
    "HTML": ("<b>lungs</b><br>are clear", "lungs are clear"),
    "formula": ('=HYPERLINK("x") lungs are clear', '=HYPERLINK("x") lungs are clear'),
    "dash": ("- no effusion today", "- no effusion today"),
    "apostrophe": ("'=lungs are clear", "'=lungs are clear"),
}


@pytest.mark.parametrize("kind", KINDS_OF_REPORTS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_every_kind_of_report_is_kept_as_text_or_left_out_with_its_row(
    kind: str, encoding: str, tmp_path: Path
) -> None:
    written, expected = KINDS_OF_REPORTS[kind]
    (tmp_path / "scan.nii.gz").touch()
    path = table(tmp_path, [["scan.nii.gz", written, "train", "a"]])
    path.write_bytes(path.read_bytes().decode().encode(encoding))
    found = OwnDataReader(path, tmp_path, SMALL).find_cases()
    assert [case.findings for case in found.cases] == ([] if expected is None else [expected])
    assert [item.reason for item in found.exclusions] == (
        ["row 2: report has fewer than 3 words"] if expected is None else []
    )


def test_ids_twice_or_missing_on_either_side(tmp_path: Path) -> None:
    names = scans(tmp_path, 3)
    rows = rows_of([names[0], names[0], names[1], names[1], "", names[2]], ["a", "a", "b", "b", "c", ""])
    rows[1][1], rows[3][1] = rows[0][1], "Another report of this scan."
    found = OwnDataReader(table(tmp_path, rows), tmp_path, SMALL).find_cases()
    assert [case.image_id for case in found.cases] == ["scan0"]
    reasons = " | ".join(item.reason for item in found.exclusions)
    for said in (
        "row 3: the row is there twice",
        "two different reports",
        "row 6: no volume path",
        "row 7: patient id is empty",
    ):
        assert said in reasons


def test_report_text_and_names_of_patients_stay_out_of_what_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    names = scans(tmp_path, 2)
    (tmp_path / names[1]).write_bytes(b"damaged")
    secret = "Jane Roe, born 1961-02-03, MRN 4711, lungs are clear."
    path = table(
        tmp_path,
        [[names[0], secret, "train", "a"], [names[1], secret, "train", "b"], ["gone.nii.gz", secret, "train", "c"]],
    )
    with caplog.at_level(logging.DEBUG):
        pack(["own", "--table", str(path), "--out", str(tmp_path / "out"), "--image-size", "8", "8", "8"])
        run_verify(path)
        path.write_bytes(path.read_bytes().replace(b"lungs", b"lung\xfe"))
        assert run_verify(path)[0] == 2
    printed = "".join(capsys.readouterr()) + caplog.text
    assert not [word for word in ("Jane", "Roe", "1961", "4711", "lung") if word in printed]


@pytest.mark.parametrize(
    "name", ["nonsense", "rot13", "hex", "idna", "undefined", "unicode_escape", "raw_unicode_escape", "a\0b"]
)
def test_what_is_no_encoding_is_refused_before_anything_is_read(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        pack(["own", "--table", str(tmp_path / "t.csv"), "--out", str(tmp_path / "out"), "--encoding", name])
    assert ended.value.code == 2 and "--encoding" in capsys.readouterr().err


def test_the_json_report_says_what_the_exit_code_says(tmp_path: Path) -> None:
    path = table(tmp_path, rows_of([*scans(tmp_path, 1), "gone.nii.gz"], ["a", "b"]))
    for words, wanted in (((), 0), (("--strict",), 1)):
        code, findings, summary = run_verify(path, "--quick", "--val-fraction", "0", *words)
        assert code == wanted == summary["exit"] and summary["warnings"] >= 1 and summary["errors"] == 0
        assert all(item.keys() == {"severity", "code", "file", "row", "case", "message", "remedy"} for item in findings)
        json.dumps(findings)
    assert run_verify(tmp_path / "absent.csv")[0] == 2


@pytest.mark.slow
def test_a_thousand_cases_are_all_read_and_every_bad_one_is_named(tmp_path: Path) -> None:
    names = scans(tmp_path, 1000)
    bad = names[::100]
    for name in bad:
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:200])
    path = table(tmp_path, rows_of(names, [f"p{n}" for n in range(1000)]))
    code, findings, summary = run_verify(path)
    assert code == 2 and summary["scans"] == 1000
    assert [item["case"] for item in findings if item["code"] == "scan_unreadable"] == [
        f"scan{n}" for n in range(0, 1000, 100)
    ]
