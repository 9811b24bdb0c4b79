"""CT-RATE with a classification head: a linear one on frozen features, and one that trains the encoder too."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from entry import metrics_of, rows_of, start
from folders import config, load_folder

from mg3d.datasets.labels import CT_RATE_LABELS
from mg3d.finetuning import run
from mg3d.phantoms.downstream.ct_rate import write_ct_rate

NEVER_DRAWN = 8
"""Findings that phantoms do not have."""


@pytest.fixture(scope="module")
def download(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("heads") / "download"
    write_ct_rate(root, train=60, valid=16, size=32, seed=1)
    return root


def assert_scored(run_dir: Path) -> None:
    """Figures are means over the findings that occur, the others are null and counted."""
    metrics = metrics_of(run_dir)
    each = {name: entry["mean"] for name, entry in metrics["auroc"]["per_class"].items()}
    assert set(each) == set(CT_RATE_LABELS)
    defined = [value for value in each.values() if value is not None]
    assert 0 < len(defined) <= len(CT_RATE_LABELS) - NEVER_DRAWN
    assert metrics["auroc"]["mean"] == pytest.approx(np.mean(defined))
    assert each["Bronchiectasis"] is None and metrics["f1"]["per_class"]["Bronchiectasis"]["mean"] is None
    assert any(
        f"means over {len(defined)} of 18 outputs" in note and "Bronchiectasis" in note for note in metrics["notes"]
    )
    assert len((run_dir / "results" / "aurocs.csv").read_text(encoding="utf-8").splitlines()) == 2
    assert (run_dir / "report.html").is_file()


@pytest.mark.slow
def test_the_linear_head_through_the_command(download: Path, tmp_path: Path) -> None:
    places = (f"data_root={download}", f"work_dir={tmp_path / 'work'}", f"log_dir={tmp_path / 'log'}")
    words = ("with", "phantom", "linear", *places, "num_gpus=0", "num_threads=1", "bootstrap_rounds=50")
    done = start("CT-RATE", tmp_path, *words)
    assert done.code == 0, done.told[-3000:]
    assert "no probability" in done.told
    run_dir = Path(done.answer["run_dir"])
    assert_scored(run_dir)
    row = rows_of(run_dir)[0]
    assert row["prob_Bronchiectasis"] == "" and 0 < float(row["prob_Pleural effusion"]) < 1
    assert json.loads((run_dir / "status.json").read_text(encoding="utf-8"))["state"] == "finished"


@pytest.mark.slow
def test_a_head_that_trains_the_encoder_weighs_positives(download: Path, tmp_path: Path) -> None:
    benchmark = load_folder("CT-RATE").BENCHMARK
    keys = {**benchmark.named_configs["phantom"], "objective": "classification", "max_epoch": 1, "batch_size": 8}
    places = {"data_root": str(download), "work_dir": str(tmp_path / "work"), "log_dir": str(tmp_path / "log")}
    cfg = config(benchmark, **keys, **places, feature_size=12, num_gpus=0, num_workers=0, bootstrap_rounds=20)
    weights = dict(zip(CT_RATE_LABELS, benchmark.resolve_task(cfg).class_weights, strict=True))
    assert weights["Bronchiectasis"] == 1.0 and weights["Pleural effusion"] > 1.0
    run_dir = Path(run.run(cfg, benchmark)["run_dir"])
    assert_scored(run_dir)
    assert float(rows_of(run_dir)[0]["prob_Bronchiectasis"]) > 0
