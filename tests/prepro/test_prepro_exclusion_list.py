"""Scans that a user names are left out, under whatever name; names that fit nothing are counted."""

from __future__ import annotations

from pathlib import Path

import pytest

from mg3d.errors import DataError
from prepro.exclusion_list import REASON, apply_exclusion_list, read_exclusion_list
from prepro.readers.base import Case, CaseList, Exclusion

PLACES = ("train_1/train_1_a/train_1_a_1", "train_2/train_2_a/train_2_a_1", "train_10/train_10_a/train_10_a_1")


def _found() -> CaseList:
    cases = [
        Case(Path(place).name, Path(place).parts[0], "train", (Path(f"/data/dataset/train/{place}.nii.gz"),), "f", "i")
        for place in PLACES
    ]
    slices = tuple(Path(f"/data/Chest/910/{number}.jpg") for number in (1, 2))
    cases.append(Case("910", "910", "train", slices, "f", "i"))
    return CaseList(cases, [Exclusion("train_3_a_1", "", "no row in the report table")], notes={"kept": 1})


def _apply(tmp_path: Path, content: str, name: str = "list.txt") -> CaseList:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    return apply_exclusion_list(_found(), read_exclusion_list(path))


@pytest.mark.parametrize(
    "entry",
    [
        "train_2_a_1",
        "train_2_a_1.nii.gz",
        "train_2_a_1.npz",
        "train_2_a/train_2_a_1.nii.gz",
        "dataset/train/train_2/train_2_a/train_2_a_1.nii.gz",
        "/elsewhere/CT-RATE/dataset/train/train_2/train_2_a/train_2_a_1.nii.gz",
        "C:\\CT-RATE\\train_2_a_1.nii.gz",
        "  train_2_a_1   # a brain",
    ],
)
def test_every_way_to_name_a_volume(tmp_path: Path, entry: str) -> None:
    found = _apply(tmp_path, f"# comment\n\n{entry}\n")
    assert [case.image_id for case in found.cases] == ["train_1_a_1", "train_10_a_1", "910"]
    assert found.exclusions[-1] == Exclusion("train_2_a_1", f"/data/dataset/train/{PLACES[1]}.nii.gz", REASON)
    assert found.notes["exclusion_list"] == {"names": 1, "excluded": 1, "unknown": 0}
    assert found.notes["kept"] == 1


@pytest.mark.parametrize("entry", ["910", "910.nii.gz", "Chest/910"])
def test_slice_folders_go_by_id_or_folder(tmp_path: Path, entry: str) -> None:
    assert "910" not in [case.image_id for case in _apply(tmp_path, entry).cases]


def test_unknown_names_are_counted_and_known_exclusions_are_not_unknown(tmp_path: Path) -> None:
    found = _apply(tmp_path, "train_2\ntrain_3_a_1\ntrain_1/train_2_a_1x\n_a_1\ntrain_2\n")
    assert len(found.cases) == 4
    assert found.notes["exclusion_list"] == {"names": 4, "excluded": 0, "unknown": 3}
    assert found.notes["exclusion_list_unknown"] == ["train_2", "train_1/train_2_a_1x", "_a_1"]


@pytest.mark.parametrize("separator", [",", ";"])
def test_the_first_column_of_a_csv_counts_with_or_without_heading(tmp_path: Path, separator: str) -> None:
    rows = [f"train_1_a_1.nii.gz{separator}brain", f'"train_2_a_1"{separator}"x{separator} y"']
    for head in ([], [f"VolumeName{separator}why"]):
        found = _apply(tmp_path, "\ufeff" + "\n".join([*head, *rows]), "list.csv")
        assert [case.image_id for case in found.cases] == ["train_10_a_1", "910"]
        assert found.notes["exclusion_list"]["unknown"] == 0


def test_a_name_that_fits_several_scans_is_refused(tmp_path: Path) -> None:
    cases = [Case(f"p{n}/ct", f"p{n}", "", (Path(f"/d/p{n}/ct.nrrd"),), "f", "i") for n in (1, 2)]
    path = tmp_path / "list.txt"
    path.write_text("ct.nrrd")
    with pytest.raises(DataError, match=r"'ct\.nrrd' fits 2 scans: p1/ct, p2/ct"):
        apply_exclusion_list(CaseList(cases), read_exclusion_list(path))
    path.write_text("p2/ct.nrrd")
    assert [case.image_id for case in apply_exclusion_list(CaseList(cases), read_exclusion_list(path)).cases] == [
        "p1/ct"
    ]


@pytest.mark.parametrize("content", ["", "# only a comment\n"])
def test_an_empty_or_missing_list_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "list.txt"
    with pytest.raises(DataError, match="no such file"):
        read_exclusion_list(path)
    path.write_text(content)
    with pytest.raises(DataError, match="empty"):
        read_exclusion_list(path)
