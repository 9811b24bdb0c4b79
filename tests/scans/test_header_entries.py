"""A header that nibabel refuses ends in one clear line through every entry that reads scans."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from prepro_builders import SMALL, chest, ct_rate_tree
from test_nifti_header import field, written
from verify_builders import run_verify

from mg3d.datasets.segmentation_case import read_label_map
from mg3d.errors import DataError
from mg3d.finetuning.benchmark import Case
from mg3d.finetuning.predictions import write_label_map
from mg3d.finetuning.scan_checks import check_scan
from mg3d.inference.processor import Processor
from prepro.prepro_pretraining_data import main as pack
from prepro.readers.ct_rate import CtRateReader
from tools.score_segmentation import main as score


def quaternion(header: object) -> None:
    for part in "bcd":
        field(f"quatern_{part}", 1)(header)


HEADERS = {"quaternion": quaternion, "voxel type": field("datatype", 9999), "axes": field("dim", [0] * 8)}


@pytest.mark.parametrize("kind", HEADERS)
def test_reading_functions_raise_one_error_that_names_the_file(tmp_path: Path, kind: str) -> None:
    path = written(tmp_path / "a.nii", HEADERS[kind], sform=None)
    task: object = None
    for read in (lambda: Processor()(path), lambda: read_label_map(Case("1", "1", path, path), task)):  # type: ignore[arg-type]
        with pytest.raises(DataError) as caught:
            read()
        assert str(path) in str(caught.value) and caught.value.remedy
    (line,) = check_scan(path, full=True)
    assert line.startswith(f"{path}: ") and "mend:" in line


@pytest.mark.parametrize("kind", HEADERS)
def test_commands_name_the_file_and_end_with_their_exit_code(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root = ct_rate_tree(tmp_path / "download", train=2, valid=1)
    bad = CtRateReader(root, SMALL).find_cases().cases[0].source[0]
    plain = written(tmp_path / "bad.nii", HEADERS[kind], sform=None)
    bad.unlink()
    plain.rename(bad.with_suffix(""))
    code, findings, _ = run_verify(root)
    assert code == 2 and [item["case"] for item in findings if item["code"] == "scan_unreadable"] == ["train_1_a_1"]
    packing = ["ct_rate", "--root", str(root), "--out", str(tmp_path / "out"), "--image-size", "8", "8", "8"]
    assert pack([*packing, "--workers", "1"]) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["failed"] == 1
    assert score([str(bad.with_suffix("")), str(bad.with_suffix(""))]) == 2
    errors = capsys.readouterr().err
    assert "train_1_a_1" in errors and "Traceback" not in errors and len(errors.splitlines()) <= 5


def test_a_prediction_is_written_over_an_image_that_only_this_project_reads(tmp_path: Path) -> None:
    """A quaternion rounded to a little more than one: nibabel refuses it."""

    def rounded(header: object) -> None:
        for part, value in zip("bcd", (0.70715, 0.70715, 0.0), strict=True):
            field(f"quatern_{part}", value)(header)

    image = written(tmp_path / "a.nii", rounded, sform=None)
    labels = (chest() > 0).astype(np.uint8)
    assert write_label_map(tmp_path / "pred.nii.gz", labels, image).stat().st_size > 0
