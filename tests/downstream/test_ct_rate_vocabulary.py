"""CT-RATE: splits, labels, report text, images on the grid, pools, the check of a download, and a whole run."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from entry import metrics_of, rows_of, start
from folders import config, load_folder

from mg3d.datasets.labels import CT_RATE_LABELS
from mg3d.errors import ConfigError, DataError
from mg3d.finetuning.benchmark import ClassificationTask, VocabularyTask
from mg3d.finetuning.label_tables import positive_weights
from mg3d.phantoms.downstream.ct_rate import write_ct_rate

folder = load_folder("CT-RATE")
BENCHMARK = folder.BENCHMARK
SIZE = [32, 24, 32]


@pytest.fixture(scope="module")
def download(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ct_rate") / "download"
    write_ct_rate(root, train=12, valid=5, size=32, seed=3)
    return root


@pytest.fixture
def own_copy(download: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(download, tmp_path / "copy"))


def cfg_of(root: Path, **keys: Any) -> Any:
    return config(BENCHMARK, data_root=str(root), roi=SIZE, **keys)


def change_table(path: Path, change: Callable[[list[dict[str, str]]], object]) -> None:
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    change(rows)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def reports_table(root: Path) -> Path:
    return root / "dataset" / "radiology_text_reports" / "validation_reports.csv"


def test_the_validation_split_is_reported_and_training_patients_select(download: Path) -> None:
    chosen = BENCHMARK.splits(cfg_of(download))
    assert all(case.id.startswith("valid_") for case in chosen.test) and len(chosen.test) >= 5
    assert all(case.id.startswith("train_") for case in chosen.train + chosen.val)
    assert chosen.val and not {case.patient for case in chosen.val} & {case.patient for case in chosen.train}
    assert all(len(case.targets) == 18 for case in chosen.train)
    reference = BENCHMARK.splits(cfg_of(download, protocol="reference", max_cases=3))
    assert reference.val == reference.test and "selection = reporting" in reference.notes
    assert len(reference.train) == len(reference.test) == 3


def test_a_subset_is_drawn_by_the_seed_and_reported(download: Path) -> None:
    first, second = (BENCHMARK.splits(cfg_of(download, max_cases=6, seed=seed)) for seed in (0, 1))
    assert {case.id for case in first.train + first.val} != {case.id for case in second.train + second.val}
    assert BENCHMARK.splits(cfg_of(download, max_cases=6)) == first
    assert any("max_cases" in note for note in first.notes)


def test_labels_and_images_are_those_of_the_tables(download: Path) -> None:
    cfg = cfg_of(download)
    case = BENCHMARK.splits(cfg).test[0]
    with (download / "dataset/multi_abnormality_labels/valid_predicted_labels.csv").open(encoding="utf-8") as file:
        rows = {row["VolumeName"]: row for row in csv.DictReader(file)}
    assert case.targets == tuple(float(rows[f"{case.id}.nii.gz"][name]) for name in CT_RATE_LABELS)
    image = folder.load(case, cfg)
    assert image.shape == tuple(SIZE) and image.dtype == np.float32
    assert 0 <= image.min() < 0.1 and 0.5 < image.max() <= 1


def test_report_text() -> None:
    assert folder.report_text("Clear (lungs).", 'No "effusion".', "clean") == "Clear lungs. No effusion."
    assert folder.report_text("Clear lungs.", "Normal heart.", "reference") == "Clear lungs.Normal heart."
    assert folder.report_text("", "Normal.", "clean") == "Normal."


def test_not_given_is_no_text_and_empty_reports_are_left_out(own_copy: Path) -> None:
    def blank(rows: list[dict[str, str]]) -> None:
        rows[0].update(Findings_EN="Not given.", Impressions_EN="Not given.")
        rows[1].update(Findings_EN="Not given.", Impressions_EN="Two small words here.")

    change_table(reports_table(own_copy), blank)
    texts = folder.reports(cfg_of(own_copy))
    names = [path.name.removesuffix(".nii.gz") for path in sorted((own_copy / "dataset/valid").rglob("*.nii.gz"))]
    assert "Two small words here." in texts.values()
    missing = [name for name in names if name not in texts]
    assert len(missing) == 1 and missing[0] not in {case.id for case in BENCHMARK.splits(cfg_of(own_copy)).test}
    assert any("have no report" in line for line in BENCHMARK.check_data(cfg_of(own_copy)))


def test_objectives(download: Path) -> None:
    task = BENCHMARK.resolve_task(cfg_of(download))
    assert isinstance(task, VocabularyTask) and task.outputs == CT_RATE_LABELS and task.size_dhw == tuple(SIZE)
    assert task.templates == (("{name}. ", "not {name}. "),) and task.text_encoder.endswith("text_encoder")
    linear = BENCHMARK.resolve_task(cfg_of(download, objective="classification"))
    assert type(linear) is ClassificationTask and len(linear.class_weights) == 18
    two = BENCHMARK.resolve_task(cfg_of(download, templates=["{name}.|no {name}.", "yes {name}|not {name}"]))
    assert len(two.templates) == 2
    for keys, said in (({"objective": "all"}, "vocabulary"), ({"templates": ["{name}"]}, "pair")):
        with pytest.raises(ConfigError, match=said):
            BENCHMARK.resolve_task(cfg_of(download, **keys))


def test_wrong_volumes_leave_the_corrected_pool(download: Path, tmp_path: Path) -> None:
    path = tmp_path / "wrong.txt"
    path.write_text("valid_1_a_1.nii.gz\nvalid_2_a_1\n", encoding="utf-8")
    task = BENCHMARK.resolve_task(cfg_of(download, excluded=str(path), pools=["corrected"]))
    assert task.excluded == {"valid_1_a_1", "valid_2_a_1"}
    with pytest.raises(DataError, match="excluded"):
        BENCHMARK.resolve_task(cfg_of(download, excluded=str(tmp_path / "none.txt")))
    for keys, said in (({"pools": ["corrected"]}, "excluded="), ({"maps": ["pca"]}, "tsne, umap")):
        with pytest.raises(ConfigError, match=said):
            BENCHMARK.resolve_task(cfg_of(download, **keys))
    assert "excluded=" in BENCHMARK.check_data(cfg_of(download, pools=["corrected"]))[0]


def test_the_check_names_files_and_columns(own_copy: Path) -> None:
    assert BENCHMARK.check_data(cfg_of(own_copy)) == []


def test_a_wrong_column_and_a_missing_volume_are_told(own_copy: Path) -> None:
    table = reports_table(own_copy)
    text = table.read_text(encoding="utf-8")
    table.write_text(text.replace("Findings_EN", "Findings"), encoding="utf-8")
    (line,) = BENCHMARK.check_data(cfg_of(own_copy))
    assert "Findings_EN" in line and "validation_reports.csv" in line
    other = own_copy.with_name("other")
    own_copy.rename(other)
    reports_table(other).write_text(text, encoding="utf-8")
    next((other / "dataset/valid").rglob("*.nii.gz")).unlink()
    assert any("without_volume" in line for line in BENCHMARK.check_data(cfg_of(other)))


def test_weights_of_positives() -> None:
    labels = np.asarray([[1, 0, -1], [0, 0, 1], [0, 0, 1], [0, -1, 0]])
    assert positive_weights(labels) == (3.0, 1.0, 0.5)


@pytest.mark.slow
def test_a_phantom_run_names_visible_findings_and_retrieves(tmp_path: Path) -> None:
    places = [f"{key}={tmp_path / key}" for key in ("data_root", "work_dir", "log_dir")]
    quick = ("max_epoch=7", "learning_rate=3e-3", "val_every_epochs=7", "pictures=False")
    done = start("CT-RATE", tmp_path, "with", "phantom", *quick, *places, "num_gpus=0", "num_threads=1")
    assert done.code == 0, done.told[-3000:]
    run_dir = Path(json.loads(done.out.splitlines()[-1])["run_dir"])
    assert json.loads((run_dir / "config.json").read_text(encoding="utf-8"))["fusion"] == "gated"
    metrics = metrics_of(run_dir)
    assert metrics["auroc_scored"]["mean"] > 0.8 and metrics["auroc_scored"]["ci95"][0] > 0.7
    assert len(metrics["auroc_scored"]["per_class"]) == 8
    for k in (5, 10):
        recall = metrics[f"recall@{k}"]
        assert recall["mean"] >= 3 * recall["chance"] and recall["ci95"][0] > 2 * recall["chance"]
    assert {"recall@10/volumes", "recall@10/unique_reports", "map@1", "f1", "f1/own_threshold"} <= set(metrics)
    parts = json.loads((run_dir / "splits.json").read_text(encoding="utf-8"))
    patients = [{name.rsplit("_", 2)[0] for name in parts[part]} for part in ("train", "val", "test")]
    assert all(patients) and not patients[2] & (patients[0] | patients[1]) and not patients[0] & patients[1]
    rows = rows_of(run_dir)
    assert len(rows) == metrics["cases"]["test"] == metrics["auroc"]["n"]
    assert np.load(run_dir / "results/image_latents.npz")["data"].shape == (len(rows), 1, 64)
    assert np.load(run_dir / "predictions/report_to_volume.npz")["data"].shape == (len(rows), len(rows))
    for name in ("labels_weights.npz", "predicted_weights.npz", "accessions.txt", "aurocs.csv", "i2i_real.txt"):
        assert (run_dir / "results" / name).is_file()
