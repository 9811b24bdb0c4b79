"""The verifier on downloads: every bad scan and every missing row is listed, none ends the run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from prepro_builders import FINDINGS, chest, ct_rate_tree, ctrg_tree, save_nifti
from real_ct import lay_out_real_ct
from verify_builders import codes, run_verify

from prepro.verify import main


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return ct_rate_tree(tmp_path / "raw", train=4, valid=2)


def scan(root: Path, name: str) -> Path:
    (path,) = root.rglob(f"{name}.nii.gz")
    return path


def table(root: Path, kind: str) -> Path:
    return root / "dataset" / kind


REPORTS = "radiology_text_reports/train_reports.csv"
LABELS = "multi_abnormality_labels/train_predicted_labels.csv"
METADATA = "metadata/train_metadata.csv"


def edit(path: Path, old: str, new: str, count: int = -1) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, count), encoding="utf-8")


def drop_row(path: Path, name: str) -> None:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(line for line in lines if not line.startswith(name)), encoding="utf-8")


def test_a_good_download_is_clean(root: Path) -> None:
    code, findings, summary = run_verify(root, "--strict")
    assert (code, findings) == (0, [])
    assert summary["scans"] == 6 and summary["rescale_as_stored"] == 6
    assert run_verify(root / "dataset", "--quick")[0] == 0


def test_every_damaged_scan_is_listed_with_its_mend(root: Path) -> None:
    truncated, flipped, empty, html = (scan(root, f"train_{number}_a_1") for number in (1, 2, 3, 4))
    truncated.write_bytes(truncated.read_bytes()[:-400])
    data = bytearray(flipped.read_bytes())
    data[len(data) // 2] ^= 4
    flipped.write_bytes(bytes(data))
    empty.write_bytes(b"")
    html.write_text("<html>404</html>" * 40)
    air = np.full((30, 26, 20), -1000, np.int16)
    save_nifti(scan(root, "valid_1_a_1"), air)
    two_frames = nib.Nifti1Image(np.stack([chest(0), chest(1)], axis=-1), np.diag([-2, -2, 2, 1]))
    nib.save(two_frames, scan(root, "valid_2_a_1"))
    code, findings, _ = run_verify(root)
    assert code == 2
    bad = {item["case"]: item for item in findings if item["code"] == "scan_unreadable"}
    assert len(bad) == 6 and all(item["remedy"] and item["file"].endswith(".nii.gz") for item in bad.values())
    assert "truncated" in bad["train_1_a_1"]["message"]
    assert "empty" in bad["train_3_a_1"]["message"]
    assert "HU" in bad["valid_1_a_1"]["message"]


def test_quick_looks_at_names_and_sizes_only(root: Path) -> None:
    scan(root, "train_1_a_1").write_bytes(b"")
    scan(root, "train_2_a_1").write_bytes(b"damaged")
    _, findings, _ = run_verify(root, "--quick")
    assert [(item["code"], item["case"]) for item in findings] == [("scan_empty_file", "train_1_a_1")]


def test_missing_rows_on_either_side(root: Path) -> None:
    drop_row(table(root, REPORTS), "train_1_a_1")
    drop_row(table(root, LABELS), "train_2_a_1")
    drop_row(table(root, METADATA), "train_3_a_1")
    scan(root, "train_4_a_1").unlink()
    save_nifti(root / "dataset" / "train" / "odd name.nii.gz", chest(9))
    edit(table(root, REPORTS), f"{FINDINGS} Case 2.", "")
    edit(table(root, REPORTS), "Normal thorax CT, no nodule.", "", 1)
    code, findings, summary = run_verify(root)
    assert code == 0 and summary["errors"] == 0
    cases = {(item["code"], item["case"]) for item in findings}
    assert cases == {
        ("scan_without_report", "train_1_a_1"),
        ("scan_left_out", "odd name"),
        ("scan_left_out", "train_2_a_1"),
        ("scan_without_metadata", "train_3_a_1"),
        ("report_without_scan", "train_4_a_1"),
    }
    assert run_verify(root, "--strict", "--quick")[0] == 1


def test_scans_without_labels(root: Path) -> None:
    drop_row(table(root, LABELS), "train_2_a_1")
    assert [(item["code"], item["case"]) for item in run_verify(root)[1]] == [("scan_without_labels", "train_2_a_1")]
    table(root, LABELS).unlink()
    (item,) = run_verify(root, "--quick")[1]
    assert item["message"].startswith("none of the 4 volumes of train has a label row")


def test_unreadable_tables_are_all_listed_and_the_scans_are_read_all_the_same(root: Path) -> None:
    edit(table(root, REPORTS), "Findings_EN", "Findings")
    edit(table(root, LABELS), ",0,", ",yes,", 1)
    table(root, METADATA).write_text('VolumeName,RescaleSlope\n"open')
    scan(root, "valid_2_a_1").write_bytes(b"")
    code, findings, _ = run_verify(root)
    assert code == 2
    places = [Path(item["file"]).name for item in findings if item["code"] == "tree_unreadable"]
    assert sorted(places) == ["train_metadata.csv", "train_predicted_labels.csv", "train_reports.csv"]
    assert [item["case"] for item in findings if item["code"] == "scan_unreadable"] == ["valid_2_a_1"]


def test_odd_table_rows_have_their_numbers(root: Path) -> None:
    path = table(root, REPORTS)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1] = lines[1].replace(b"cough", b"t\xf6rn")
    path.write_bytes(b"".join([*lines, lines[2], b",x,,,\n"]))
    code, (refused, *_), _ = run_verify(root, "--quick")
    assert code == 2 and refused["file"] == str(path) and "row 2" in refused["message"]
    assert "--encoding" in refused["remedy"] and "cough" not in str(refused)
    _, found, _ = run_verify(root, "--quick", "--encoding", "cp1254")
    odd = [item for item in found if item["code"].startswith("table_")]
    assert [(item["code"], item["severity"], item["row"]) for item in odd] == [
        ("table_row_odd", "warning", 6),
        ("table_row_odd", "warning", 7),
        ("table_not_utf8", "note", None),
    ]
    assert odd[-1]["file"] == path.name and "cp1254" in odd[-1]["message"]


def test_spacing_disagreement_and_mixed_releases(root: Path) -> None:
    edit(table(root, METADATA), 'train_1_a_1.nii.gz,1,0,"[2.0, 2.5]",3.0', 'train_1_a_1.nii.gz,1,0,"[2.0, 2.5]",5.0')
    edit(table(root, METADATA), "train_2_a_1.nii.gz,1,0", "train_2_a_1.nii.gz,1,-8192")
    stored = (chest(2).astype(np.int32) + 8192).astype(np.int16)
    save_nifti(scan(root, "train_2_a_1"), stored)
    code, findings, summary = run_verify(root)
    found = {item["code"]: item for item in findings}
    assert code == 0 and set(found) == {"spacing_disagrees", "mixed_releases"}
    assert found["spacing_disagrees"]["case"] == "train_1_a_1" and "2x2.5x5 mm" in found["spacing_disagrees"]["message"]
    assert "train_2_a_1" in found["mixed_releases"]["message"]
    assert (summary["rescale_as_stored"], summary["rescale_applied"]) == (5, 1)


def test_a_file_under_two_names_is_found_before_packing(root: Path) -> None:
    shutil.copy(scan(root, "train_1_a_1"), scan(root, "valid_1_a_1"))
    shutil.copy(scan(root, "train_2_a_1"), scan(root, "train_3_a_1"))
    code, findings, _ = run_verify(root, "--val-fraction", "0")
    assert code == 2 and codes(findings) == {"content_in_two_splits", "duplicate_content"}
    found = {item["code"]: item["message"] for item in findings}
    assert found["content_in_two_splits"] == "valid_1_a_1 (test) and train_1_a_1 (train)"
    assert found["duplicate_content"] == "train_3_a_1 equals train_2_a_1"
    code, findings, _ = run_verify(root, "--split-protocol", "reference")
    assert code == 0 and "note" in {item["severity"] for item in findings}


def test_an_exclusion_list_takes_known_bad_scans_out(root: Path, tmp_path: Path) -> None:
    scan(root, "train_1_a_1").write_bytes(b"")
    listed = tmp_path / "known.txt"
    listed.write_text("train_1_a_1\n")
    assert run_verify(root, "--exclude", listed, "--strict")[0] == 0


def test_two_workers_find_the_same(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scan(root, "train_1_a_1").write_bytes(b"")
    answers = []
    for workers in ("1", "2"):
        assert main([str(root), "--workers", workers]) == 2
        *lines, last = capsys.readouterr().out.splitlines()
        answers.append((lines, {key: value for key, value in json.loads(last).items() if key != "seconds"}))
    assert answers[0] == answers[1]


def test_ctrg_faults(tmp_path: Path) -> None:
    annotation = ctrg_tree(tmp_path, train=4, test=2)
    assert run_verify(tmp_path, "--annotation", annotation)[0] == 0
    (tmp_path / "Chest" / "0" / "3.png").write_bytes(b"\x89PNG broken")
    (tmp_path / "Chest" / "1" / "4.png").unlink()
    content = json.loads(annotation.read_text(encoding="utf-8"))
    content["train"][2]["report"] = "nan"
    annotation.write_text(json.dumps(content))
    code, findings, summary = run_verify(tmp_path, "--annotation", annotation)
    assert code == 2 and summary["scans"] == 6
    assert [(item["code"], item["case"]) for item in findings] == [
        ("scan_left_out", "1"),
        ("scan_left_out", "2"),
        ("scan_unreadable", "0"),
    ]
    annotation.write_text("{")
    code, findings, _ = run_verify(tmp_path, "--annotation", annotation)
    assert code == 2 and findings[0]["code"] == "tree_unreadable"


def test_own_data(tmp_path: Path) -> None:
    rows = ["volume,findings,impression,split,patient_id"]
    for number in range(4):
        save_nifti(tmp_path / f"scan {number}.nii.gz", chest(number))
        split = "test" if number == 3 else "train"
        rows.append(f"scan {number}.nii.gz,{FINDINGS.replace(',', '')} {number},Normal.,{split},p{number}")
    path = tmp_path / "cases.csv"
    path.write_text("\n".join(rows))
    code, findings, _ = run_verify(path, "--val-fraction", "0")
    assert code == 0 and codes(findings) <= {"scan_without_labels"}
    (tmp_path / "scan 1.nii.gz").write_bytes(b"")
    (tmp_path / "scan 2.nii.gz").unlink()
    path.write_text("\n".join(rows).replace(",p3", ",p0"))
    code, findings, _ = run_verify(tmp_path, "--table", path, "--val-fraction", "0")
    found = {item["code"] for item in findings} - {"scan_without_labels"}
    assert code == 2 and found == {"scan_unreadable", "scan_left_out", "patient_in_two_splits"}


@pytest.mark.slow
def test_volumes_of_many_geometries_are_sound(collection: Path, tmp_path: Path) -> None:
    root = lay_out_real_ct(collection, tmp_path / "download")
    code, findings, summary = run_verify(root)
    assert code == 0 and summary["scans"] == 7, findings
