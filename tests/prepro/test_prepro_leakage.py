"""Nothing of a test set is trained on: patients, studies, equal content, the downstream test list."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from prepro_builders import SMALL, chest, ct_rate_tree, save_nifti

from prepro.prepro_pretraining_data import main
from prepro.readers.ctrg import CtrgReader
from prepro.splits import assign_splits

SIZE = ["--image-size", "8", "6", "8", "--target-spacing", "none", "--workers", "1"]


def _pack(root: Path, out: Path, *more: str) -> int:
    return main(["ct_rate", "--root", str(root), "--out", str(out), *SIZE, "--val-fraction", "0", *more])


def _volume(root: Path, split: str, name: str) -> Path:
    patient, scan = name.rsplit("_", 2)[0], name.rsplit("_", 1)[0]
    return root / "dataset" / split / patient / scan / f"{name}.nii.gz"


def _rename(root: Path, split: str, old: str, new: str) -> None:
    target = _volume(root, split, new)
    target.parent.mkdir(parents=True, exist_ok=True)
    _volume(root, split, old).rename(target)
    for table in (root / "dataset").rglob("valid*.csv" if split == "valid" else "train*.csv"):
        table.write_text(table.read_text(encoding="utf-8").replace(f"{old}.nii", f"{new}.nii"))


def _manifest(out: Path) -> dict[str, Any]:
    return json.loads((out / "clm_ct_rate.manifest.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("stray", ["train_1_a_2", "train_1_b_1"])
def test_another_reconstruction_or_study_of_a_training_patient(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stray: str
) -> None:
    root = ct_rate_tree(tmp_path / "raw", train=3, valid=2)
    _rename(root, "valid", "valid_1_a_1", stray)
    assert _pack(root, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert f"1 patients in more than one split: {stray} (test) and train_1_a_1 (train)" in error
    assert _pack(root, tmp_path / "out", "--split-protocol", "reference") == 0
    recorded = _manifest(tmp_path / "out")["patients_in_two_splits"]
    assert f"{stray} (test) and train_1_a_1 (train) and {stray} (val)" in recorded["pairs"]
    assert recorded["count"] == 2  # valid_2 is val and test there


def test_a_long_list_of_pairs_goes_to_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = ct_rate_tree(tmp_path / "raw", train=6, valid=6)
    for number in range(1, 7):
        _rename(root, "valid", f"valid_{number}_a_1", f"train_{number}_b_1")
    assert _pack(root, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "6 patients" in error and len(error.splitlines()) <= 5
    (listing,) = (tmp_path / "out").iterdir()
    assert str(listing) in error
    wanted = [f"train_{n}_b_1 (test) and train_{n}_a_1 (train)" for n in range(1, 7)]
    assert listing.read_text(encoding="utf-8").splitlines() == wanted
    shutil.rmtree(root)
    ct_rate_tree(root, train=6, valid=6)
    assert _pack(root, tmp_path / "out") == 0
    assert not listing.exists()


def test_one_file_under_two_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = ct_rate_tree(tmp_path / "raw", train=6, valid=5)
    for number in range(1, 5):
        shutil.copy(_volume(root, "train", f"train_{number}_a_1"), _volume(root, "valid", f"valid_{number}_a_1"))
    save_nifti(_volume(root, "valid", "valid_5_a_1"), chest(1005), axes="RAS")  # train_5 with other axes
    assert _pack(root, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "5 volumes with equal content" in error
    assert not list((tmp_path / "out").glob("*.arrow"))
    pairs = (tmp_path / "out" / "clm_ct_rate.shared.txt").read_text(encoding="utf-8").splitlines()
    assert sorted(pairs) == [f"valid_{n}_a_1 (test) and train_{n}_a_1 (train)" for n in range(1, 6)]
    assert _pack(root, tmp_path / "out", "--split-protocol", "reference") == 0
    assert _manifest(tmp_path / "out")["shared_between_splits"]["count"] == 5


def test_listed_scans_are_left_out_and_cure_a_leak(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = ct_rate_tree(tmp_path / "raw", train=3, valid=2)
    shutil.copy(_volume(root, "train", "train_1_a_1"), _volume(root, "valid", "valid_1_a_1"))
    listed = tmp_path / "no_chest.csv"
    listed.write_text("VolumeName,why\nvalid_1_a_1.nii.gz,copy\nvalid_77_a_1.nii.gz,elsewhere\n")
    assert _pack(root, tmp_path / "out", "--exclude", str(listed)) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["excluded"] == 1
    manifest = _manifest(tmp_path / "out")
    assert [(item["image_id"], item["reason"]) for item in manifest["exclusions"]] == [
        ("valid_1_a_1", "on the exclusion list")
    ]
    assert manifest["notes"]["exclusion_list"] == {"names": 3, "excluded": 1, "unknown": 1}
    assert manifest["notes"]["exclusion_list_unknown"] == ["valid_77_a_1.nii.gz"]


def made_annotation(path: Path) -> Path:
    """An annotation with the proportions of the published one: 240 to train on, 60 both validated and tested on."""
    groups: dict[str, list[dict[str, str]]] = {"train": [], "val": [], "test": []}
    for number in range(701, 1001):
        split = "train" if number % 5 else "test"
        mark = f" (img{number % 200})" if number % 10 == 0 else ""
        entry = {"id": f"{number}.nii.gz", "image_path": f"Chest/{number}", "result": "Normal."}
        entry["report"] = f"No nodule is seen in lung {number}{mark}. Heart size is normal."
        groups[split].append({**entry, "split": split})
        if split == "test":
            groups["val"].append({**entry, "split": "val"})
    path.write_text(json.dumps(groups), encoding="utf-8")
    return path


@pytest.fixture(params=["made", pytest.param("real", marks=pytest.mark.realdata)])
def ctrg_reader(request: pytest.FixtureRequest, tmp_path: Path) -> CtrgReader:
    if request.param == "real":
        annotation = request.getfixturevalue("shared_dir") / "data" / "text_restricted" / "ctrg_split_small.json"
    else:
        annotation = made_annotation(tmp_path / "annotation.json")
    content = json.loads(annotation.read_text(encoding="utf-8"))
    for group in content.values():
        for entry in group:
            path = tmp_path / entry["image_path"]
            path.parent.mkdir(exist_ok=True)
            path.touch()
    return CtrgReader(tmp_path, annotation, SMALL)


def test_pre_training_never_sees_the_downstream_test_ids(ctrg_reader: CtrgReader) -> None:
    content = json.loads(ctrg_reader.annotation.read_text(encoding="utf-8"))
    downstream = {entry["id"].removesuffix(".nii.gz") for entry in content["test"]}
    for seed in (0, 1):
        cases, unused = assign_splits(ctrg_reader.find_cases(), "clm_chest_ctrg", seed=seed)
        ids = {split: {case.image_id for case in cases if split in case.splits} for split in ("train", "val", "test")}
        assert not unused
        assert ids["test"] == downstream and len(downstream) == 60
        assert not (ids["train"] | ids["val"]) & downstream
        assert (len(ids["train"]), len(ids["val"])) == (216, 24)


def test_marks_of_the_published_reports_stay(ctrg_reader: CtrgReader) -> None:
    cases = {case.image_id: case for case in ctrg_reader.find_cases().cases}
    assert re.search(r"\(img\d+\)", cases["910"].findings)
    marked = [case for case in cases.values() if "(img" in case.findings]
    assert len(marked) > 20
