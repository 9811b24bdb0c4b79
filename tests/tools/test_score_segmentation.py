"""tools/score_segmentation.py: formats, grids, folders, output and refusals, on real label maps where it matters."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK

from tests.tools.command import answer, modules_after, refusal
from tools.score_segmentation import main

AFFINE = np.diag([0.8, 0.8, 2.5, 1.0])


def save(path: Path, labels: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    nib.save(nib.Nifti1Image(labels, affine), path)
    return path


def blob(shift: int = 0) -> np.ndarray:
    labels = np.zeros((16, 14, 12), dtype=np.uint8)
    labels[4 + shift : 10 + shift, 3:9, 3:8] = 1
    labels[11:14, 10:13, 2:9] = 2
    return labels


@pytest.mark.smoke
def test_two_files_as_json_and_as_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truth, pred = save(tmp_path / "t.nii.gz", blob()), save(tmp_path / "p.nii.gz", blob(1))
    told = answer(capsys, main, truth, pred, "--labels", "1=RV", "2=MYO", "3=LV", "--json")
    assert told.pop("printed") == told.pop("told") == ""
    assert list(told) == ["RV", "MYO", "LV"]
    assert told["MYO"] == {"dice": 1, "iou": 1, "hd95": 0, "nsd": {"1": 1, "2": 1}, "assd": 0}
    assert told["LV"] == {"dice": None, "iou": None, "hd95": None, "nsd": {"1": None, "2": None}, "assd": None}
    assert told["RV"]["dice"] == pytest.approx(5 / 6) and told["RV"]["hd95"] == pytest.approx(0.8)
    one = answer(capsys, main, truth, pred, "--tolerance-mm", "0.5", "--definition", "monai")
    assert 0 < one["1"]["nsd"] < 1 and "monai" in one["printed"] and "nsd@0.5" in one["printed"]
    assert list(one["1"]) == ["dice", "iou", "hd95", "nsd", "assd"]


def test_the_same_map_in_other_formats_and_axis_orders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truth = save(tmp_path / "t.nii.gz", blob())
    image = SimpleITK.ReadImage(str(truth))
    SimpleITK.WriteImage(image, str(tmp_path / "p.nrrd"))
    SimpleITK.WriteImage(image, str(tmp_path / "p.mha"))
    nib.save(nib.as_closest_canonical(nib.load(truth)).__class__(blob().astype(float), AFFINE), tmp_path / "p.nii")
    flipped = nib.load(truth).as_reoriented(np.array([[2, 1], [0, -1], [1, 1]]))
    nib.save(flipped, tmp_path / "turned.nii.gz")
    nib.save(nib.MGHImage(blob(), AFFINE), tmp_path / "p.mgz")
    for name in ("p.nrrd", "p.mha", "p.nii", "turned.nii.gz", "p.mgz"):
        told = answer(capsys, main, truth, tmp_path / name, "--json")
        assert told["1"]["dice"] == told["2"]["dice"] == 1, name
        assert told["1"]["hd95"] == 0, name


RECORDED = "expected/segmentation_metrics.json"


@pytest.mark.realdata
def test_recorded_values_of_a_real_nodule(
    tmp_path: Path, shared_dir: Path, reference_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded = json.loads((reference_dir / RECORDED).read_text(encoding="utf-8"))
    expected = recorded["lidc_0314_chest_2mm_nodule_readers: gt = value>=2, pred = value==4; file spacing"]
    source = nib.load(shared_dir / "data/ct/lidc_0314_chest_2mm_nodule_readers.nii.gz")
    readers = np.asarray(source.dataobj)
    truth = save(tmp_path / "t.nii.gz", (readers >= 2).astype(np.uint8), source.affine)
    pred = save(tmp_path / "p.nii.gz", (readers == 4).astype(np.uint8), source.affine)
    check_recorded(capsys, truth, pred, expected)


@pytest.mark.smoke
def test_recorded_values_of_two_balls(tmp_path: Path, reference_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorded = json.loads((reference_dir / RECORDED).read_text(encoding="utf-8"))
    expected = recorded["balls r8 vs r8 shifted 2 voxels on axis0; 48^3; spacing (2,1,1)"]
    ball = (((np.indices((48, 48, 48)) - 24) ** 2).sum(axis=0) <= 64).astype(np.uint8)
    affine = np.diag([2.0, 1.0, 1.0, 1.0])
    truth = save(tmp_path / "t.nii.gz", ball, affine)
    check_recorded(capsys, truth, save(tmp_path / "p.nii.gz", np.roll(ball, 2, axis=0), affine), expected)


def check_recorded(capsys: pytest.CaptureFixture[str], truth: Path, pred: Path, expected: dict) -> None:
    """The command's numbers of two files, by both definitions."""
    for definition, key in (("deepmind", "deepmind"), ("monai", "monai_1.6.1")):
        words = ("--definition", definition, "--tolerance-mm", "1", "2", "--labels", "1=nodule", "--json")
        told = answer(capsys, main, truth, pred, *words)["nodule"]
        assert told["dice"] == pytest.approx(expected["dice"], abs=1e-6)
        assert told["iou"] == pytest.approx(expected["iou"], abs=1e-6)
        assert told["hd95"] == pytest.approx(expected[key]["hd95"], abs=1e-5)
        found = {f"nsd_{mm}mm": value for mm, value in told["nsd"].items()}
        assert found == pytest.approx({name: expected[key][name] for name in found}, abs=1e-6)


@pytest.mark.realdata
def test_a_real_map_of_many_organs_against_itself(shared_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_many_organs(capsys, shared_dir / "data/ct/totalseg_abdomen_seg117.nii.gz")


def test_a_map_of_many_organs_against_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = np.arange(5 * 5 * 4, dtype=np.uint8).reshape(5, 5, 4)  # numbers up to 99, each a block of its own
    check_many_organs(capsys, save(tmp_path / "organs.nii.gz", np.kron(values, np.ones((6, 5, 3), np.uint8))))


def check_many_organs(capsys: pytest.CaptureFixture[str], organs: Path) -> None:
    """Every class of a map compared with itself is perfect."""
    told = answer(capsys, main, organs, organs, "--json")
    scores = [entry for name, entry in told.items() if name not in ("printed", "told")]
    assert len(scores) >= 40 and all(entry["dice"] == entry["nsd"]["1"] == 1 for entry in scores)


def test_two_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in ("truth", "pred"):
        (tmp_path / folder).mkdir()
    for k in range(3):
        save(tmp_path / "truth" / f"case_{k}.nii.gz", blob())
        save(tmp_path / "pred" / f"case_{k}.nii", blob(k))
    save(tmp_path / "pred" / "unknown.nii.gz", blob())
    out = tmp_path / "per_case.csv"
    told = answer(capsys, main, tmp_path / "truth", tmp_path / "pred", "--out", out)
    assert told["1"]["dice"]["n"] == 3 and told["2"]["dice"]["mean"] == 1
    assert told["1"]["dice"]["mean"] == pytest.approx((1 + 5 / 6 + 4 / 6) / 3)
    low, high = told["1"]["dice"]["ci95"]
    assert 4 / 6 - 1e-9 <= low < high <= 1 and "3 cases" in told["printed"]
    rows = list(csv.DictReader(out.read_text(encoding="utf-8").splitlines()))
    assert [(row["id"], row["class"]) for row in rows][:3] == [("case_0", "1"), ("case_0", "2"), ("case_1", "1")]
    assert float(rows[2]["dice"]) == pytest.approx(5 / 6)
    (tmp_path / "pred" / "case_1.nii").unlink()
    subset = answer(capsys, main, tmp_path / "truth", tmp_path / "pred", "--subset")
    assert subset["1"]["dice"]["n"] == 2 and "2 cases" in subset["printed"] and not subset["told"]
    save(tmp_path / "pred" / "case_2.nii", blob()[:-1])
    partly = answer(capsys, main, tmp_path / "truth", tmp_path / "pred", "--json", code=1)
    assert partly["1"]["dice"]["n"] == 1
    assert "case_1: no prediction" in partly["told"] and "case_2: " in partly["told"]


def test_refusals_name_both_grids_and_the_mend(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truth = save(tmp_path / "t.nii.gz", blob())
    shorter = save(tmp_path / "short.nii.gz", blob()[:-1])
    told = refusal(capsys, main, truth, shorter)
    assert "(15, 14, 12)" in told and "(16, 14, 12)" in told and "t.nii.gz" in told
    moved = AFFINE.copy()
    moved[0, 3] = 0.4
    told = refusal(capsys, main, truth, save(tmp_path / "moved.nii.gz", blob(), moved))
    assert "0.4 mm" in told and "first voxel at (0.40" in told
    other = refusal(capsys, main, truth, save(tmp_path / "size.nii.gz", blob(), np.diag([0.8, 0.8, 2.0, 1])))
    assert "0.8 x 0.8 x 2 mm" in other and "0.8 x 0.8 x 2.5 mm" in other
    assert "no whole number, such as 0.5" in refusal(capsys, main, truth, save(tmp_path / "f.nii.gz", blob() * 0.5))
    assert "-1000" in refusal(capsys, main, truth, save(tmp_path / "ct.nii.gz", blob().astype(np.int16) - 1000))
    assert "neither map holds" in refusal(
        capsys, main, *(save(tmp_path / f"e{k}.nii.gz", blob() * np.uint8(0)) for k in range(2))
    )


def test_refusals_of_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truth = save(tmp_path / "t.nii.gz", blob())
    (tmp_path / "noise.gipl").write_bytes(b"no label map")
    assert "neither nibabel nor SimpleITK" in refusal(capsys, main, truth, tmp_path / "noise.gipl")
    assert "no such file" in refusal(capsys, main, truth, tmp_path / "absent.nii.gz")
    assert "two folders" in refusal(capsys, main, truth, tmp_path)
    (tmp_path / "empty").mkdir()
    assert "both folders" in refusal(capsys, main, tmp_path, tmp_path / "empty")
    assert "twice" in refusal(capsys, main, truth, truth, "--labels", "1=a", "2=a")
    assert "--tolerance-mm" in refusal(capsys, main, truth, truth, "--tolerance-mm", "-1")
    assert "--labels" in refusal(capsys, main, truth, truth, "--labels", "0=background")
    assert "--out" in refusal(capsys, main, truth, truth, "--out", tmp_path / "no" / "where.csv")


def test_scoring_and_help_need_no_torch(repository: Path, tmp_path: Path) -> None:
    truth = save(tmp_path / "t.nii.gz", blob())
    assert modules_after(repository, "tools.score_segmentation", "--help") == (0, set())
    assert modules_after(repository, "tools.score_segmentation", truth, truth) == (0, set())
