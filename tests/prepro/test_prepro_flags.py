"""Flags that change what is packed, through the whole command."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from packing import SIZE, manifest_of, pack_ct_rate, pack_ctrg, rows_of
from prepro_builders import FINDINGS, IMPRESSION, chest, ct_rate_tree, ctrg_tree, save_nifti

from prepro.prepro_pretraining_data import main


def _own(root: Path, out: Path, *more: str) -> int:
    table = ["--table", str(root / "cases.csv")]
    return main(["own", "--root", str(root), *table, "--out", str(out), *SIZE, "--workers", "1", *more])


def test_own_data_gets_the_name_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "raw"
    for number in range(4):
        save_nifti(root / f"scan{number}.nii.gz", chest(number))
    with (tmp_path / "raw" / "cases.csv").open("w", newline="") as handle:
        rows = [(f"scan{n}.nii.gz", FINDINGS, IMPRESSION, f"p{n}", "test" if n == 3 else "train") for n in range(4)]
        csv.writer(handle).writerows([("volume", "findings", "impression", "patient_id", "split"), *rows])
    assert _own(root, tmp_path / "out", "--corpus", "clm_own_lung") == 0
    assert json.loads(capsys.readouterr().out)["rows"]["test"] == 1
    row = rows_of(tmp_path / "out" / "clm_own_lung_test.arrow")[0]
    assert (row["image_id"], row["patient_id"], row["corpus"]) == ("scan3", "p3", "clm_own_lung")
    with pytest.raises(SystemExit) as caught:
        _own(root, tmp_path / "out", "--corpus", "clm_own_train")
    assert caught.value.code == 2


@pytest.mark.parametrize(
    ("exact", "limit", "truncated"), [(False, 16, 1), (False, 60, 0), (True, 16, 1), (True, 60, 0)]
)
def test_truncated_reports_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], exact: bool, limit: int, truncated: int
) -> None:
    root = ct_rate_tree(tmp_path / "raw", train=2, valid=1)
    (tmp_path / "vocab.txt").write_text("\n".join(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", ".", ",")))
    more = ("--tokenizer", str(tmp_path)) if exact else ()
    assert pack_ct_rate(root, tmp_path / "out", "--max-text-len", str(limit), *more) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["truncated"] == dict.fromkeys(("train", "val", "test"), truncated)
    assert summary["truncated_is_exact"] is exact
    text = manifest_of(tmp_path / "out", "clm_ct_rate")["text"]["train"]
    assert (text["reports"], text["max_text_len"], text["tokens_are_exact"]) == (1, limit, exact)


def test_unknown_tokenizer_is_refused_before_reading(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = ct_rate_tree(tmp_path / "raw", train=1, valid=1)
    assert pack_ct_rate(root, tmp_path / "out", "--tokenizer", str(tmp_path / "none")) == 2
    assert "tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_assumed_spacing_saves_scans_without_any(tmp_path: Path) -> None:
    root = ct_rate_tree(tmp_path / "raw", train=1, valid=1)
    path = next(root.rglob("train_1_a_1.nii.gz"))
    image = nib.Nifti1Image(chest(1), None)
    image.header["pixdim"][1:4] = 0
    nib.save(image, path)
    (root / "dataset" / "metadata" / "train_metadata.csv").unlink()
    assert pack_ct_rate(root, tmp_path / "out") == 1
    assert pack_ct_rate(root, tmp_path / "out", "--assume-spacing", "3", "2.5", "2") == 0
    row = rows_of(tmp_path / "out" / "clm_ct_rate_train.arrow")[0]
    stored = np.array([20, 26, 30]) * [3.0, 2.5, 2.0] * np.array([17 / 20, 17 / 26, 26 / 30]) / [8, 6, 8]
    np.testing.assert_allclose(row["spacing_mm"], stored, rtol=1e-6)


def test_assumed_spacing_of_slices(tmp_path: Path) -> None:
    annotation = ctrg_tree(tmp_path / "raw", train=2, test=1)
    spacings = []
    for index, words in enumerate(([], ["--assume-spacing", "3", "0.75", "0.75"])):
        pack_ctrg(annotation, tmp_path / str(index), *words)
        spacings.append(rows_of(tmp_path / str(index) / "clm_chest_ctrg_test.arrow")[0]["spacing_mm"])
    np.testing.assert_allclose(np.divide(*spacings[::-1]), [2, 1, 1], rtol=1e-6)


def test_sentence_fragments(tmp_path: Path) -> None:
    root = ct_rate_tree(tmp_path / "raw", train=1, valid=1)
    pack_ct_rate(root, tmp_path / "out", "--fragments", "sentence")
    row = rows_of(tmp_path / "out" / "clm_ct_rate_train.arrow")[0]
    assert row["findings_sen"] == [
        "Trachea, both main bronchi are open. ",
        "No pleural effusion was detected. ",
        "Case 1.",
    ]
    assert manifest_of(tmp_path / "out", "clm_ct_rate")["config"]["fragments"] == "sentence"


def test_limit_keeps_the_first_of_each_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = ct_rate_tree(tmp_path / "raw", train=8, valid=4)
    pack_ct_rate(root, tmp_path / "out", "--limit", "2")
    assert json.loads(capsys.readouterr().out)["rows"] == {"train": 2, "val": 1, "test": 2}
