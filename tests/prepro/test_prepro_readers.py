"""CT-RATE and CTRG in their published layouts, with the oddities of real downloads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from prepro_builders import FINDINGS, IMPRESSION, SMALL, chest, ct_rate_tree, ctrg_tree, save_nifti
from real_ct import REPORT_COLUMNS, write_table

from mg3d.datasets.labels import CT_RATE_LABELS
from mg3d.errors import DataError
from prepro.readers.base import CaseList
from prepro.readers.ct_rate import CtRateReader
from prepro.readers.ctrg import CtrgReader


def _reports(root: Path, split: str = "train") -> Path:
    return root / "dataset" / "radiology_text_reports" / f"{split}_reports.csv"


def _reasons(found: CaseList) -> dict[str, str]:
    return {item.image_id: item.reason for item in found.exclusions}


def test_the_second_release_is_preferred_volume_by_volume(tmp_path: Path) -> None:
    root = ct_rate_tree(tmp_path, train=12, valid=2, reconstructions=2)
    dataset = root / "dataset"
    for name in ("train_2", "train_10"):
        (dataset / "train_fixed").mkdir(exist_ok=True)
        (dataset / "train" / name).rename(dataset / "train_fixed" / name)
    copy = dataset / "train_fixed" / "train_1" / "train_1_a" / "train_1_a_1.nii.gz"
    save_nifti(copy, chest(5))
    (dataset / "train" / "note.txt").write_text("x")
    (dataset / "train" / "train_1" / "._train_1_a_1.nii.gz").write_text("x")
    cases = CtRateReader(root, SMALL).find_cases().cases
    names = [case.image_id for case in cases if case.origin == "train"]
    assert names == [f"train_{patient}_a_{n}" for patient in range(1, 13) for n in (1, 2)]
    fixed = [case.image_id for case in cases if "train_fixed" in str(case.source[0])]
    assert fixed == ["train_1_a_1", "train_2_a_1", "train_2_a_2", "train_10_a_1", "train_10_a_2"]
    assert CtRateReader(dataset, SMALL).find_cases().cases == cases


def test_reconstructions_share_report_and_keep_their_own_labels_and_metadata(tmp_path: Path) -> None:
    root = ct_rate_tree(tmp_path, train=2, valid=1, reconstructions=3)
    lines = _reports(root).read_text(encoding="utf-8").splitlines()
    _reports(root).write_text("\n".join(line for line in lines if "_a_1" in line or "Volume" in line) + "\n")
    labels = root / "dataset" / "multi_abnormality_labels" / "train_predicted_labels.csv"
    rows = [(f"train_1_a_{n}.nii.gz", *[int(n == 2)] * 18) for n in (1, 2)]
    write_table(labels, ("VolumeName", *CT_RATE_LABELS), rows)
    metadata = root / "dataset" / "metadata" / "train_metadata.csv"
    metadata.write_text(
        metadata.read_text(encoding="utf-8").replace("train_1_a_2.nii.gz,1,0", "train_1_a_2.nii.gz,1,-8192")
    )
    cases = {case.image_id: case for case in CtRateReader(root, SMALL).find_cases().cases}
    first = [cases[f"train_1_a_{number}"] for number in (1, 2, 3)]
    assert len({(case.findings, case.impression, case.patient_id) for case in first}) == 1
    assert [set(case.labels) for case in first] == [{0}, {1}, {0}]  # the third has no row: that of its scan
    assert set(cases["train_2_a_1"].labels) == {-1}
    assert [case.rescale for case in first] == [(1.0, 0.0), (1.0, -8192.0), (1.0, 0.0)]


@pytest.mark.parametrize("cell", ["Not given.", "not given", "", "  ", "nan", "NA", "N/A", "None", "null"])
def test_a_missing_section_is_empty_and_never_a_word(tmp_path: Path, cell: str) -> None:
    root = ct_rate_tree(tmp_path, train=2, valid=1)
    rows = [
        ("train_1_a_1.nii.gz", "x", "y", FINDINGS, cell),
        ("train_2_a_1.nii.gz", "x", "y", cell, cell),
    ]
    write_table(_reports(root), REPORT_COLUMNS, rows)
    found = CtRateReader(root, SMALL).find_cases()
    assert [case.impression for case in found.cases if case.origin == "train"] == [""]
    assert "fewer than 3 words" in _reasons(found)["train_2_a_1"]
    kept = CtRateReader(root, SMALL, empty_report="keep").find_cases().cases
    assert [(case.findings, case.impression) for case in kept if case.image_id == "train_2_a_1"] == [("", "")]


@pytest.mark.parametrize(
    ("findings", "kept"),
    [
        ("肺纹理清晰", True),
        ("1 2 3 4 5", False),
        ("... , ; -- !", False),
        ("x", False),
        ("الرئتان سليمتان تماما", True),
        ("<p>Clear <b>lungs</b> seen</p>", True),
        ("Clear\0 lungs\r\nwere \U0001fac1 seen", True),
        ("Long report text. " * 6000, True),
        ('He said ""normal"", lungs, heart', True),
    ],
)
def test_odd_reports_are_packed_or_left_out_with_a_reason(tmp_path: Path, findings: str, kept: bool) -> None:
    root = ct_rate_tree(tmp_path, train=2, valid=1)
    rows = [("train_1_a_1.nii.gz", "", "", findings, ""), ("train_2_a_1.nii.gz", "", "", FINDINGS, "")]
    write_table(_reports(root), REPORT_COLUMNS, rows)
    found = CtRateReader(root, SMALL).find_cases()
    texts = {case.image_id: case.findings for case in found.cases}
    assert ("train_1_a_1" in texts) is kept
    if kept:
        text = texts["train_1_a_1"]
        assert text.isprintable() and "<" not in text and "  " not in text
    else:
        assert "fewer than 3 words" in _reasons(found)["train_1_a_1"]


def test_duplicate_rows_and_ids_missing_on_either_side(tmp_path: Path) -> None:
    root = ct_rate_tree(tmp_path, train=4, valid=1)
    rows = [
        ("train_1_a_1.nii.gz", "", "", FINDINGS, IMPRESSION),
        ("train_1_a_1.nii.gz", "other", "", FINDINGS, IMPRESSION),
        ("train_2_a_1.nii.gz", "", "", FINDINGS, IMPRESSION),
        ("train_2_a_1.nii.gz", "", "", "Another text of it.", IMPRESSION),
        ("train_9_a_1.nii.gz", "", "", FINDINGS, IMPRESSION),
        ("", "", "", FINDINGS, IMPRESSION),
        ("train_4_a_1", "", "", FINDINGS, IMPRESSION),
    ]
    write_table(_reports(root), REPORT_COLUMNS, rows)
    found = CtRateReader(root, SMALL).find_cases()
    assert [case.image_id for case in found.cases if case.origin == "train"] == ["train_1_a_1", "train_4_a_1"]
    reasons = _reasons(found)
    assert reasons["train_2_a_1"] == "two different reports under one name"
    assert reasons["train_3_a_1"] == "no row in the report table"
    assert found.notes["train_reports_without_volume"] == 1


def test_bytes_that_are_no_utf_8_need_a_name_and_namesakes_are_told(tmp_path: Path) -> None:
    root = ct_rate_tree(tmp_path, train=3, valid=1)
    table = _reports(root)
    table.write_bytes(table.read_bytes().replace(b"open. No", b"open, 5\xd73 mm. No", 1))
    twin = root / "dataset" / "train" / "train_2" / "train_2_a_1.nii.gz"
    save_nifti(twin, chest(9))
    with pytest.raises(DataError, match="row 2: 1 bytes") as refused:
        CtRateReader(root, SMALL).find_cases()
    assert refused.value.path == str(table) and "--encoding" in refused.value.remedy
    found = CtRateReader(root, SMALL, encoding="cp1252").find_cases()
    assert "5×3 mm" in found.cases[0].findings
    assert found.notes["encodings"]["train_reports.csv"] == "cp1252"
    assert "same name as" in _reasons(found)["train_2_a_1"]
    assert [case.image_id for case in found.cases].count("train_2_a_1") == 1


def test_a_first_release_header_without_geometry_gives_way_to_the_table(tmp_path: Path) -> None:
    root = ct_rate_tree(tmp_path, train=2, valid=1)
    reader = CtRateReader(root, SMALL)
    case = reader.find_cases().cases[0]
    whole = reader.load(case)
    voxels = np.asanyarray(nib.load(case.source[0]).dataobj)
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), case.source[0])
    restored = reader.load(case)
    np.testing.assert_array_equal(restored.voxels, whole.voxels)
    assert restored.spacing_mm == pytest.approx(whole.spacing_mm)
    assert restored.record["orientation"] == "assumed LPS"
    assert any("metadata table" in warning for warning in restored.warnings)


@pytest.mark.parametrize("row", ['"[2.0, 2.5]",', '"[nan, 2]",3.0', "[[[,3.0", ",", None])
def test_a_header_without_geometry_and_without_a_whole_row_is_left_out_of_the_pack(
    tmp_path: Path, row: str | None
) -> None:
    root = ct_rate_tree(tmp_path, train=2, valid=1)
    table = root / "dataset" / "metadata" / "train_metadata.csv"
    head, first, *others = table.read_text(encoding="utf-8").splitlines()
    told = [] if row is None else [first.replace('"[2.0, 2.5]",3.0', row)]
    table.write_text("\n".join([head, *told, *others]) + "\n")
    reader = CtRateReader(root, SMALL)
    case = reader.find_cases().cases[0]
    voxels = np.asanyarray(nib.load(case.source[0]).dataobj)
    nib.save(nib.Nifti1Image(voxels, np.eye(4)), case.source[0])
    with pytest.raises(DataError, match="no voxel size") as caught:
        reader.load(case)
    assert caught.value.path == str(case.source[0]) and "--assume-spacing" in caught.value.remedy
    told_reader = CtRateReader(root, SMALL, assumed_spacing_mm=(3.0, 2.5, 2.0))
    assert told_reader.load(case).record["stored_spacing_mm"] == [3.0, 2.5, 2.0]


def test_a_row_that_counts_other_voxels_or_sizes_is_warned_of(tmp_path: Path) -> None:
    root = ct_rate_tree(tmp_path, train=2, valid=1)
    table = root / "dataset" / "metadata" / "train_metadata.csv"
    head, *rows = table.read_text(encoding="utf-8").splitlines()
    rows = [rows[0].replace("[2.0, 2.5]", "[8.0, 8.0]") + ",26,30,20", rows[1] + ",26,30,200"]
    table.write_text("\n".join([f"{head},Rows,Columns,NumberofSlices", *rows]) + "\n")
    reader = CtRateReader(root, SMALL)
    sizes, counts = (reader.load(case).warnings for case in reader.find_cases().cases[:2])
    assert len(sizes) == 1 and "8x8x3 mm" in sizes[0]
    assert len(counts) == 1 and "30 x 26 x 200" in counts[0]


def test_a_real_one_millimetre_header_is_believed(tmp_path: Path) -> None:
    root = ct_rate_tree(tmp_path, train=2, valid=1)
    table = root / "dataset" / "metadata" / "train_metadata.csv"
    table.write_text(table.read_text(encoding="utf-8").replace('"[2.0, 2.5]",3.0', '"[1.0, 1.0]",1.0'))
    reader = CtRateReader(root, SMALL)
    case = reader.find_cases().cases[0]
    save_nifti(case.source[0], chest(1001), spacing=(1.0, 1.0, 1.0), axes="RAS")
    assert reader.load(case).record["orientation"] == "header"


def _ctrg(annotation: Path) -> CtrgReader:
    return CtrgReader(annotation.parent, annotation, SMALL)


def test_slices_in_natural_order_and_missing_ones(tmp_path: Path) -> None:
    annotation = ctrg_tree(tmp_path, train=3, test=1)
    content = json.loads(annotation.read_text(encoding="utf-8"))
    content["train"][1]["image_path"] = "Chest/1"
    for number in (7, 8, 15):
        (tmp_path / "Chest" / "1" / f"{number}.png").unlink()
    content["train"][2]["image_path"] = [*content["train"][2]["image_path"][:3], "Chest/2/99.png"]
    annotation.write_text(json.dumps(content))
    found = _ctrg(annotation).find_cases()
    first, second = found.cases[:2]
    assert [path.name for path in first.source] == [f"{number}.png" for number in range(1, 21)]
    assert [path.name for path in second.source][5:8] == ["6.png", "9.png", "10.png"]
    assert _ctrg(annotation).load(first).warnings == ()
    assert _ctrg(annotation).load(second).warnings == ("3 slice numbers are missing: 7, 8, 15",)
    assert "not found below the root" in _reasons(found)["2"]


def test_ctrg_ids_that_are_missing_repeated_or_contradictory(tmp_path: Path) -> None:
    annotation = ctrg_tree(tmp_path, train=5, test=2)
    content = json.loads(annotation.read_text(encoding="utf-8"))
    train = content["train"]
    del train[0]["id"]
    train[1]["id"] = ""
    train.append(dict(train[2]))
    train.append({**train[3], "report": "A different report of it."})
    train.append(dict(content["test"][0], split="train"))
    annotation.write_text(json.dumps(content))
    found = _ctrg(annotation).find_cases()
    assert [(case.image_id, case.origin) for case in found.cases] == [
        ("2", "train"),
        ("4", "train"),
        ("5", "test"),
        ("6", "test"),
    ]
    reasons = _reasons(found)
    assert reasons["3"] == "two different reports under one id"
    assert list(reasons.values()).count("entry has no id") == 2


def test_ctrg_annotation_in_a_named_encoding_and_with_lone_surrogates(tmp_path: Path) -> None:
    annotation = ctrg_tree(tmp_path, train=2, test=1)
    text = annotation.read_text(encoding="utf-8").replace("No pleural", "0.8\u00d71.0cm, \\ud800 no pleural", 1)
    annotation.write_bytes(text.encode("latin-1"))
    with pytest.raises(DataError, match="no UTF-8"):
        _ctrg(annotation).find_cases()
    found = replace(_ctrg(annotation), encoding="cp1252").find_cases()
    assert "0.8×1.0cm, ? no pleural" in found.cases[0].findings
    assert found.notes["encodings"] == {annotation.name: "cp1252"}


def test_ctrg_annotation_of_another_shape_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for content in ("[]", '{"train": 3}', "[1]", "not json", '"text"', "[" * 100_000):
        path.write_text(content)
        with pytest.raises(DataError):
            CtrgReader(tmp_path, path, SMALL).find_cases()


def test_volumes_may_be_links_into_a_download_cache(tmp_path: Path) -> None:
    root = ct_rate_tree(tmp_path / "raw", train=2, valid=1)
    (tmp_path / "blobs").mkdir()
    for number, path in enumerate(sorted(root.rglob("*.nii.gz"))):
        path.rename(tmp_path / "blobs" / str(number))
        path.symlink_to(tmp_path / "blobs" / str(number))
    reader = CtRateReader(root, SMALL)
    cases = reader.find_cases().cases
    assert [case.image_id for case in cases] == ["train_1_a_1", "train_2_a_1", "valid_1_a_1"]
    assert reader.load(cases[0]).voxels.shape == SMALL.size
