"""Own data from the CSV to a training batch."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest
from prepro_builders import FINDINGS, IMPRESSION, chest, save_nifti

from mg3d.config_schema import resolve_config
from mg3d.errors import ConfigError
from prepro.prepro_pretraining_data import main

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "datasets"))


def _own_table(root: Path, count: int) -> Path:
    for number in range(count):
        save_nifti(root / "scans" / f"{number}.nii.gz", chest(number))
    path = root / "own data; semicolons.csv"
    with path.open("w", newline="", encoding="utf-8-sig") as handle:
        writer = csv.writer(handle, delimiter=";")
        writer.writerow(("Volume", "Findings", "Impression", "Patient", "Emphysema"))
        for number in range(count):
            text = f"{FINDINGS} Case {number}; or so."
            writer.writerow((f"scans/{number}.nii.gz", text, IMPRESSION, f"p{number}", number % 2))
    return path


def test_packed_own_data_gives_a_training_batch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from arrow_builders import tokenizer

    from mg3d.datamodules.pretraining import MG3DDataModule

    corpus = "clm_own_hospital"
    table, out = _own_table(tmp_path / "raw", 8), tmp_path / "out"
    size = ["--image-size", "64", "32", "32", "--target-spacing", "none", "--workers", "1", "--val-fraction", "0.2"]
    assert main(["own", "--table", str(table), "--out", str(out), "--corpus", corpus, *size]) == 0
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["corpus"] == corpus
    assert summary["rows"] == {"train": 5, "val": 1, "test": 2}
    assert summary["truncated"] == {"train": 0, "val": 0, "test": 0}
    assert summary["truncated_is_exact"] is False
    config = resolve_config(
        {
            "datasets": [corpus],
            "data_root": str(out),
            "image_size": [64, 32, 32],
            "num_workers": 0,
            "per_gpu_batchsize": 2,
            "batch_size": 2,
            "num_gpus": 0,
        }
    )
    data = MG3DDataModule(config, tokenizer())
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (2, 64, 1, 32, 32)
    assert batch["corpus"] == [corpus, corpus]
    assert all(image_id.startswith("scans/") for image_id in batch["image_id"])
    assert batch["text_ids"].shape == (2, 250) and (batch["text_ids"] != 0).any()
    assert len(data.dataset("train")) == 5


def test_only_own_corpora_may_have_free_names() -> None:
    assert resolve_config({"datasets": ["clm_own", "clm_own_b"]}).datasets == ("clm_own", "clm_own_b")
    with pytest.raises(ConfigError, match=r"write datasets=\[clm_own\]"):
        resolve_config({"datasets": ["clm_onw"]})
    with pytest.raises(ConfigError, match="clm_own_"):
        resolve_config({"datasets": ["my_data"]})


@pytest.mark.parametrize("name", ["clm_ct_rate", "hospital", "clm_own_train", "clm_own-b", "../clm_own"])
def test_names_that_could_not_be_trained_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["own", "--table", str(tmp_path / "t.csv"), "--out", str(tmp_path), "--corpus", name])
    assert caught.value.code == 2


def test_a_missing_table_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["own", "--table", str(tmp_path / "t.csv"), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "t.csv: table not found" in error and len(error.splitlines()) <= 5
