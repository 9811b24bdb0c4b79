"""One run from data to figures: what it leaves, its modes, weights, ensembles and processes."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from test_finetune_resume import Killed, go
from tiny_benchmark import BALLS, OUTLINES

from mg3d.errors import ConfigError, DataError
from mg3d.finetuning.config import resolve_finetune_config
from mg3d.finetuning.kinds import build_module
from mg3d.finetuning.scores import score_rows
from mg3d.models.finetune.weights import load_encoder_weights
from mg3d.models.vision_encoders import create_vision_encoder

PROGRAM = Path(__file__).with_name("tiny_benchmark.py")


def read(folder: str | Path, name: str) -> dict[str, Any]:
    """A JSON file of a run."""
    return json.loads((Path(folder) / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the data of all runs are."""
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def unet(root: Path) -> Path:
    """Weights of a UNet encoder as a released file has them."""
    torch.manual_seed(5)
    path = root / "unet.pt"
    encoder = create_vision_encoder("unet", base_width=2)
    torch.save({f"vision_encoder.{name}": value for name, value in encoder.state_dict().items()}, path)
    return path


def test_a_run_leaves_what_every_run_leaves(root: Path, tmp_path: Path, unet: Path) -> None:
    found = go(root, tmp_path, max_epoch=1, weights=str(unet), data_fraction=0.5, learning_rate=0.0)
    folder = Path(found["run_dir"])
    assert folder.parent.name == "balls-unet-full-fold0-0.5-seed0-from_unet"
    names = {path.name for path in folder.rglob("*")}
    wanted = {"config.json", "environment.json", "status.json", "splits.json", "metrics.json", "per_case.csv"}
    assert wanted | {"metrics.jsonl", "weights_report.json", "best.ckpt", "last.ckpt", "best.ckpt.sha256"} <= names
    assert read(folder, "status.json")["state"] == "finished"
    assert read(folder, "weights_report.json")["encoder_loaded"] == read(folder, "weights_report.json")["encoder_total"]
    parts = read(folder, "splits.json")
    assert not {name[:3] for name in parts["train"]} & {name[:3] for name in (*parts["val"], *parts["test"])}
    assert len(parts["train"]) == 12 and "trained on 12 of 24 cases" in parts["notes"][0]
    metrics = read(folder, "metrics.json")
    assert metrics["protocol"] == "clean" and metrics["selected"] == "best" and metrics["notes"] == parts["notes"]
    assert set(metrics["auroc"]) >= {"mean", "ci95", "n"} and metrics["auroc"]["n"] == 8
    assert {"auroc/scan=0", "auroc/scan=1"} <= set(metrics)
    with open(folder / "per_case.csv", encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0])[:2] == ["id", "patient"] and [row["id"] for row in rows] == sorted(parts["test"])
    content = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)
    stored = torch.load(unet, weights_only=True)
    state = content["state_dict"]
    for name in (name for name in stored if name.endswith("weight")):
        place = next(key for key in state if key.endswith(name.removeprefix("vision_encoder.")))
        assert torch.equal(state[place], stored[name])


def test_segmentation_writes_predictions_in_place(root: Path, tmp_path: Path) -> None:
    found = go(root, tmp_path, OUTLINES, max_epoch=1, batch_size=1, predict=True, pictures=True)
    folder = Path(found["run_dir"])
    case = read(folder, "splits.json")["test"][0]
    image, prediction = nib.load(root / "outlines" / f"{case}.nii.gz"), nib.load(folder / f"predictions/{case}.nii.gz")
    assert prediction.shape == image.shape and np.array_equal(prediction.affine, image.affine)
    metrics = read(folder, "metrics.json")
    assert set(metrics["dice"]["per_class"]) == {"ball"} and "nsd@2" in metrics
    assert (folder / "report.html").is_file()
    chained = resolve_finetune_config({"weights": str(folder / "checkpoints" / "last.ckpt"), "encoder": "unet"})
    report = load_encoder_weights(build_module(chained, BALLS.task, 1), chained)
    assert report.encoder_loaded == report.encoder_total, "the weights of one benchmark start another"


@pytest.mark.parametrize("mode", ["linear_probe", "knn_probe"])
def test_probes_use_the_frozen_encoder_once(root: Path, tmp_path: Path, unet: Path, mode: str) -> None:
    found = go(root, tmp_path, mode=mode, weights=str(unet), data_fraction=1.0)
    metrics = read(found["run_dir"], "metrics.json")
    assert metrics["selected"] == mode and {"auroc", "val/auroc"} <= set(metrics)
    assert not list(Path(found["run_dir"], "checkpoints").iterdir())
    features = sorted((root / "balls_work" / "features").iterdir())
    again = go(root, tmp_path, mode=mode, weights=str(unet), data_fraction=1.0)
    assert read(again["run_dir"], "metrics.json") == metrics
    assert sorted((root / "balls_work" / "features").iterdir()) == features


def test_an_ensemble_of_equals_equals_its_member(root: Path, tmp_path: Path) -> None:
    alone = go(root, tmp_path / "a", max_epoch=1)
    places = [alone["run_dir"], str(Path(alone["run_dir"]) / "checkpoints" / "best.ckpt")]
    keys: dict[str, Any] = {"max_epoch": 1, "resume": alone["run_dir"], "stages": ["evaluate"]}
    together = go(root, tmp_path / "b", **keys, ensemble=places)
    one, other = (read(each["run_dir"], "metrics.json")["auroc"] for each in (alone, together))
    assert one == other


def test_reference_protocol_selects_on_what_it_reports_and_says_so(root: Path, tmp_path: Path) -> None:
    found = go(root, tmp_path, max_epoch=1, protocol="reference", shuffle_labels=True)
    metrics = read(found["run_dir"], "metrics.json")
    assert metrics["protocol"] == "reference" and "selection = reporting" in metrics["notes"]
    assert any("shuffled" in note for note in metrics["notes"])


def test_bad_input_is_told(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="names an architecture"):
        go(root, tmp_path, weights="swin_b")
    with pytest.raises(DataError, match="num_folds"):
        go(root, tmp_path, num_folds=60)


def test_means_leave_undefined_values_out() -> None:
    rows = [
        {"id": f"c{k}", "patient": f"p{k // 2}", "phase": "ab"[k % 2], "class": name, "volume_ml": 1.0, "dice": value}
        for k, values in enumerate([(0.5, 1.0), (0.7, float("nan")), (0.9, 0.5), (0.1, float("nan"))])
        for name, value in zip(("x", "y"), values, strict=True)
    ]
    task = OUTLINES.task.__class__(classes=("x", "y"), label_map={1: 1, 2: 2})
    entries, notes = score_rows(rows, task, resolve_finetune_config({"bootstrap_rounds": 50}))
    assert set(entries) == {"dice", "dice/phase=a", "dice/phase=b"} and not notes
    dice = entries["dice"]
    assert dice["per_class"]["x"]["mean"] == pytest.approx(0.55) and dice["per_class"]["y"]["mean"] == 0.75
    assert dice["mean"] == pytest.approx(0.65) and (dice["n"], dice["per_class"]["y"]["n"]) == (4, 2)
    assert dice["ci95"][0] <= dice["mean"] <= dice["ci95"][1]
    assert entries["dice/phase=b"]["per_class"]["y"]["mean"] is None


def command(root: Path, log_dir: Path, *words: str, processes: int = 1) -> list[str]:
    """Command line of a run in processes of its own."""
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    place = [f"data_root={root / 'balls'}", f"work_dir={root / 'balls_work'}", f"log_dir={log_dir}"]
    small = ["phantom", "encoder=unet", "feature_size=2", "num_gpus=0", "batch_size=3", "data_fraction=0.34", *place]
    return [sys.executable, *start, str(PROGRAM), "with", *small, *words]


def environment(repository: Path) -> dict[str, str]:
    """Threads and import path of a run in processes of its own."""
    return {**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1", "MG3D_PROCESS_DEFAULTS": "off"}


@pytest.mark.slow
def test_two_processes_score_every_case_once(root: Path, tmp_path: Path, repository: Path) -> None:
    alone = go(root, tmp_path / "one", max_epoch=1)
    score = [f"resume={alone['run_dir']}", "stages=evaluate", "max_epoch=1", "bootstrap_rounds=20"]
    line = command(root, tmp_path / "two", *score, processes=2)
    done = subprocess.run(line, env=environment(repository), capture_output=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.strip().splitlines()[-1])
    one, two = (
        Path(place, "per_case.csv").read_text(encoding="utf-8") for place in (alone["run_dir"], told["run_dir"])
    )
    first, second = (list(csv.DictReader(text.splitlines())) for text in (one, two))
    assert [row["id"] for row in first] == [row["id"] for row in second]
    for a, b in zip(first, second, strict=True):
        assert float(a["prob_ball"]) == pytest.approx(float(b["prob_ball"]), abs=1e-6)
    assert told["auroc"] == read(alone["run_dir"], "metrics.json")["auroc"]["mean"]


@pytest.mark.slow
def test_two_processes_train_and_a_signal_leaves_a_checkpoint(root: Path, tmp_path: Path, repository: Path) -> None:
    go(root, tmp_path / "data", max_epoch=1)  # the data
    trained = subprocess.run(
        command(root, tmp_path / "two", "max_epoch=1", processes=2),
        env=environment(repository),
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    assert trained.returncode == 0, trained.stderr[-3000:]
    assert len(list((tmp_path / "two").glob("balls-*/version_*"))) == 1
    with subprocess.Popen(
        command(root, tmp_path / "cut", "max_epoch=500"), env=environment(repository), stderr=subprocess.DEVNULL
    ) as process:
        lines: list[Path] = []
        while not lines and process.poll() is None:
            time.sleep(0.2)
            lines = list((tmp_path / "cut").glob("balls-*/version_0/metrics.jsonl"))
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 128 + signal.SIGTERM
    folder = lines[0].parent
    assert read(folder, "status.json")["state"] == "stopped" and (folder / "checkpoints" / "last.ckpt").is_file()


def test_a_killed_preparation_leaves_no_half(tmp_path: Path) -> None:
    def write_a_part(folder: Path, seed: int) -> None:
        (folder / "part.npy").write_bytes(b"x")
        raise Killed

    with pytest.raises(Killed):
        go(tmp_path, tmp_path / "runs", dataclasses.replace(BALLS, write_phantom=write_a_part))
    assert not (tmp_path / "balls").exists()
    go(tmp_path, tmp_path / "runs", stages=["prepare"])
    assert (tmp_path / "balls" / "targets.json").is_file() and not list(tmp_path.glob(".*partial"))
