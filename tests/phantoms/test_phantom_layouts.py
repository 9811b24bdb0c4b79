"""Written study sets: published names and tables, voxels that read back as drawn, one command, same bytes again."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from mg3d.datasets.labels import CT_RATE_LABELS
from mg3d.errors import DataError
from mg3d.phantoms.__main__ import main, write_phantoms
from mg3d.phantoms.chest import render
from mg3d.phantoms.ct_rate_layout import stored_intercept, volume_name
from mg3d.phantoms.findings import label_vector
from mg3d.phantoms.studies import plan_studies

COUNTS = {"train": 12, "test": 4, "ctrg": 5, "size": 32, "seed": 3}


@pytest.fixture(scope="module")
def study_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("phantoms") / "set"
    assert write_phantoms(out, **COUNTS)
    return out


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _digest(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_ct_rate_tables_describe_every_volume(study_set: Path) -> None:
    base = study_set / "ct_rate" / "dataset"
    for split, name in (("train", "train"), ("valid", "validation")):
        volumes = {path.name: path for path in (base / split).rglob("*.nii.gz")}
        for path in volumes.values():
            assert re.fullmatch(rf"{split}_\d+_[ab]_[12]\.nii\.gz", path.name)
            assert [path.parent.name, path.parent.parent.name] == [
                path.name.rsplit("_", 1)[0],
                path.name.rsplit("_", 2)[0],
            ]
        tables = {
            "reports": _rows(base / "radiology_text_reports" / f"{name}_reports.csv"),
            "labels": _rows(base / "multi_abnormality_labels" / f"{split}_predicted_labels.csv"),
            "metadata": _rows(base / "metadata" / f"{name}_metadata.csv"),
        }
        for table in tables.values():
            assert {row["VolumeName"] for row in table} == set(volumes)
        assert list(tables["labels"][0])[1:] == list(CT_RATE_LABELS)
        for row in tables["metadata"]:
            shape = nib.load(volumes[row["VolumeName"]]).shape
            zooms = nib.load(volumes[row["VolumeName"]]).header.get_zooms()
            assert shape == (int(row["Columns"]), int(row["Rows"]), int(row["NumberofSlices"]))
            spacing = [*json.loads(row["XYSpacing"]), float(row["ZSpacing"])]
            np.testing.assert_allclose(zooms, spacing, rtol=1e-4)


def test_volumes_read_back_as_drawn(study_set: Path) -> None:
    metadata = _rows(study_set / "ct_rate" / "dataset" / "metadata" / "train_metadata.csv")
    intercepts = {row["VolumeName"]: float(row["RescaleIntercept"]) for row in metadata}
    study = next(plan_studies("train", COUNTS["train"], COUNTS["size"], COUNTS["seed"]))
    name = volume_name("train", study, 1)
    image = nib.load(next((study_set / "ct_rate").rglob(name)))
    hu_xyz = np.asarray(image.dataobj, dtype=np.int64) + intercepts[name]
    np.testing.assert_array_equal(hu_xyz.transpose(2, 1, 0), render(study.case, study.grids[0], 1).hu)
    assert nib.aff2axcodes(image.affine) == ("L", "P", "S")
    assert intercepts[name] == stored_intercept(study)
    labels = _rows(study_set / "ct_rate" / "dataset" / "multi_abnormality_labels" / "train_predicted_labels.csv")
    assert [int(labels[0][label]) for label in CT_RATE_LABELS] == label_vector(study.case.lesions).tolist()


def test_ctrg_annotation_points_to_slices_from_the_neck_down(study_set: Path) -> None:
    root = study_set / "ctrg"
    annotation = json.loads((root / "annotation.json").read_text(encoding="utf-8"))
    assert [len(annotation[split]) for split in ("train", "val", "test")] == [4, 1, 1]
    assert annotation["val"] == annotation["test"]
    entry = annotation["train"][0]
    slices = [np.asarray(Image.open(root / path)) for path in entry["image_path"]]
    assert len(slices) == COUNTS["size"] and slices[0].dtype == np.uint8 and slices[0].ndim == 2
    # The abdomen fills the last slices, lung the upper ones.
    assert slices[-4][44:84, 32:96].mean() > slices[10][44:84, 32:96].mean()


def test_studies_repeat_patients_and_share_reports_between_reconstructions() -> None:
    studies = list(plan_studies("train", 300, 32, 0))
    assert len(studies) == 300
    assert len({study.patient for study in studies}) < 300
    assert 1 < sum(len(study.grids) == 2 for study in studies) < 40
    prefix = list(plan_studies("train", 40, 32, 0))
    assert [study.case for study in studies[:40]] == [study.case for study in prefix]
    others = {study.case.patient_seed for study in plan_studies("valid", 300, 32, 0)}
    assert not others & {study.case.patient_seed for study in studies}


def test_a_finished_set_is_left_alone_and_others_are_refused(study_set: Path, tmp_path: Path) -> None:
    before = _digest(study_set)
    assert not write_phantoms(study_set, **COUNTS)
    with pytest.raises(DataError, match="other settings"):
        write_phantoms(study_set, **(COUNTS | {"seed": 4}))
    (tmp_path / "something").write_text("of mine")
    with pytest.raises(DataError, match="no phantom set"):
        write_phantoms(tmp_path, **COUNTS)
    assert main(["--out", str(tmp_path)]) == 2
    assert _digest(study_set) == before


def test_the_same_settings_give_the_same_bytes(study_set: Path, tmp_path: Path) -> None:
    assert write_phantoms(tmp_path / "again", **COUNTS, workers=2)
    assert _digest(tmp_path / "again") == _digest(study_set)
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


def test_the_command_needs_no_torch(tmp_path: Path, repository: Path) -> None:
    words = ["--out", str(tmp_path / "set"), "--train", "2", "--test", "1", "--ctrg", "1", "--size", "32"]
    code = (
        "import sys; from mg3d.phantoms.__main__ import main\n"
        f"code = main({words!r})\n"
        "heavy = {'torch', 'monai', 'transformers', 'lightning'} & set(sys.modules)\n"
        "sys.exit(code or (3 if heavy else 0))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=repository, capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == 0, done.stderr
    assert "written" in done.stdout and (tmp_path / "set" / "manifest.json").is_file()


def test_bad_numbers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--out", str(tmp_path / "x"), "--size", "16"])
    assert stop.value.code == 2
