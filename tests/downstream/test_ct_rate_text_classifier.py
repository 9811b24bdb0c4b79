"""``downstream/CT-RATE/text_classifier.py``: trains on phantom reports, beats the constants, labels new reports."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mg3d.atomic import this_host
from mg3d.datasets.labelled_reports import LabelledReports, read_labelled_reports, write_labelled_reports
from mg3d.datasets.labels import CT_RATE_LABELS
from mg3d.finetuning.text_labels import training
from mg3d.finetuning.text_labels.command import main
from mg3d.finetuning.text_labels.splits import held_out_fold
from mg3d.finetuning.text_labels.state import HISTORY, Progress
from mg3d.phantoms.findings import draw_lesions, label_vector
from mg3d.phantoms.report import write_report
from mg3d.phantoms.text_encoder import write_text_encoder
from tests.tools.command import answer, modules_after, refusal

LEARN = ("--unit", "sentence", "--pooling", "mean", "--max-length", "32", "--learning-rate", "2e-3", "--dropout", "0")


def phantom_table(count: int, seed: int) -> LabelledReports:
    rng = np.random.default_rng(seed)
    drawn = [draw_lesions(rng) for _ in range(count)]
    texts = tuple(write_report(lesions, rng).findings for lesions in drawn)
    labels = np.stack([label_vector(lesions) for lesions in drawn])
    return LabelledReports(tuple(f"case_{i}" for i in range(count)), texts, labels, CT_RATE_LABELS)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tables of phantom reports and a tiny text encoder."""
    folder = tmp_path_factory.mktemp("reports")
    reports = phantom_table(150, 0)
    write_labelled_reports(folder / "labelled.csv", reports)
    write_labelled_reports(
        folder / "new.csv", LabelledReports(("x", "y"), ("", "Cardiomegaly is present."), np.zeros((2, 0)), ())
    )
    write_text_encoder(folder / "bert", reports.texts, seed=0)
    return folder


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of a training on one fold."""
    logs = tmp_path_factory.mktemp("logs")
    words = ["train", "--data", data / "labelled.csv", "--fold", 0, "--text-encoder", data / "bert", *LEARN]
    words += ["--probe-epochs", 30, "--max-epochs", 4, "--batch-size", 16, "--shuffle-share", 0.5]
    words += ["--bootstrap-rounds", 50, "--log-dir", logs]
    assert main([str(word) for word in words]) == 0
    return next(logs.glob("*/version_0"))


def test_it_learns_and_is_shown_beside_its_baselines(trained: Path) -> None:
    metrics = json.loads((trained / "metrics.json").read_text(encoding="utf-8"))
    macro = {name: entries["ce_f1_macro"] for name, entries in metrics["labellers"].items()}
    micro = {name: entries["ce_f1_micro"]["mean"] for name, entries in metrics["labellers"].items()}
    assert set(macro) == {"classifier", "keywords", "majority", "all present"}
    assert micro["classifier"] > micro["all present"] + 0.3 > micro["majority"]
    low, high = macro["classifier"]["ci95"]
    assert low < macro["classifier"]["mean"] <= high
    assert metrics["metrics"]["auroc"]["mean"] > 0.85
    assert [row["finding"] for row in metrics["table"]] == list(CT_RATE_LABELS)
    assert any("no reference" in note for note in metrics["notes"])
    history = [json.loads(line) for line in (trained / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row.get("epoch") for row in history[-5:]] == [None, 0, 1, 2, 3]
    assert history[-1]["train_loss"] < 0.5 * history[0]["train_loss"]


def test_the_published_files_have_their_columns(trained: Path) -> None:
    with (trained / "metrics_manual.csv").open(encoding="utf-8") as stream:
        rows = list(csv.reader(stream))
    assert rows[0] == ["Label", "Precision", "Recall", "F1 Score", "Support"]
    assert [row[0] for row in rows[1:19]] == list(CT_RATE_LABELS) and len(rows) == 20
    assert np.load(trained / "test_confusion_matrix.npy").shape == (18, 2, 2)
    assert "macro avg" in (trained / "test_classification_report.txt").read_text(encoding="utf-8")
    splits = json.loads((trained / "splits.json").read_text(encoding="utf-8"))
    assert not set(splits["train"]) & (set(splits["val"]) | set(splits["test"]))
    assert len(splits["train"]) + len(splits["val"]) + len(splits["test"]) == 150


def test_the_best_weights_score_alike_and_label_new_reports(
    trained: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    splits = json.loads((trained / "splits.json").read_text(encoding="utf-8"))
    reports = read_labelled_reports(data / "labelled.csv")
    held_out = reports.take([reports.ids.index(name) for name in splits["test"]])
    write_labelled_reports(tmp_path / "test.csv", held_out)
    words = ("--model", trained / "best", "--bootstrap-rounds", 20)
    told = answer(capsys, main, "evaluate", *words, "--data", tmp_path / "test.csv", "--out", tmp_path / "out")
    metrics = json.loads((trained / "metrics.json").read_text(encoding="utf-8"))
    assert told["f1_macro"]["classifier"] == pytest.approx(metrics["labellers"]["classifier"]["ce_f1_macro"]["mean"])
    assert "macro F1" in told["printed"] and "keywords" in told["printed"]
    assert (tmp_path / "out" / "per_case.csv").is_file()
    told = answer(capsys, main, "label", *words, "--data", data / "new.csv", "--out", tmp_path / "inferred.csv")
    assert told["reports"] == 2 and told["empty_reports"] == 1
    with (tmp_path / "inferred.csv").open(encoding="utf-8") as stream:
        assert next(csv.reader(stream)) == ["AccessionNo", "report_text", *CT_RATE_LABELS]
    found = read_labelled_reports(tmp_path / "inferred.csv")
    assert found.ids == ("x", "y") and found.labels[1, CT_RATE_LABELS.index("Cardiomegaly")] == 1


def test_tables_without_any_finding_are_scored_and_empty_reports_state_none(
    trained: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reports = read_labelled_reports(data / "labelled.csv").take(range(6))
    nothing = LabelledReports(reports.ids, ("", " ", *reports.texts[2:]), 0 * reports.labels, reports.names)
    write_labelled_reports(tmp_path / "none.csv", nothing)
    words = ("--model", trained / "best", "--bootstrap-rounds", 5, "--data", tmp_path / "none.csv")
    told = answer(capsys, main, "evaluate", *words, "--out", tmp_path / "out")
    assert told["f1_macro"]["classifier"] == 0.0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["metrics"]["auroc"]["mean"] is None
    assert any("no reference holds any finding" in note for note in metrics["notes"])
    told = answer(capsys, main, "label", *words, "--out", tmp_path / "inferred.csv")
    assert told["empty_reports"] == 2 and not read_labelled_reports(tmp_path / "inferred.csv").labels[:2].any()


def test_clinical_scores_take_the_trained_classifier(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tools import score_reports

    pairs = [{"id": "a", "ref": "Cardiomegaly is present.", "hyp": "There is cardiomegaly with an increased ratio."}]
    (tmp_path / "pairs.json").write_text(json.dumps(pairs), encoding="utf-8")
    words = ("--labeller", trained / "best", "--meteor", "none", "--rounds", 0)
    told = answer(capsys, score_reports.main, tmp_path / "pairs.json", *words)
    assert told["metrics"]["ce_recall_micro"]["mean"] == 1.0


def test_a_killed_training_goes_on_as_if_nothing_had_happened(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["train", "--data", data / "labelled.csv", "--fold", 0, "--text-encoder", data / "bert"]
    words += [*LEARN[:-1], "0.1", "--probe-epochs", 2, "--max-epochs", 3, "--schedule", "cosine"]  # with dropout
    words += ["--bootstrap-rounds", 5, "--shuffle-share", 0.5]
    whole = answer(capsys, main, *words, "--log-dir", tmp_path / "whole")
    store = training.store

    def killed(folder: Path, progress: Progress, *more: Any) -> None:
        if progress.epoch == 2:  # after the epoch's weights and line, before its state
            raise KeyboardInterrupt
        store(folder, progress, *more)

    monkeypatch.setattr(training, "store", killed)
    assert main([str(word) for word in [*words, "--log-dir", tmp_path / "cut"]]) == 130
    monkeypatch.setattr(training, "store", store)
    capsys.readouterr()
    run = next((tmp_path / "cut").glob("*/version_0"))
    with (run / HISTORY).open("a", encoding="utf-8") as stream:
        stream.write('{"epoch": 1, "train')  # a line cut short
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (run / f".state.ckpt.{this_host()}-{ended.pid}-0123abcd.tmp").touch()  # and a file
    monkeypatch.chdir(tmp_path)
    found = answer(capsys, main, "resume", run)
    assert found["run_dir"] == str(run) and found["epochs"] == 3 and not list(run.glob("*state*"))
    for part in ("best", "last"):
        one, other = (load_file(Path(each["run_dir"]) / part / "model.safetensors") for each in (whole, found))
        assert all(torch.equal(one[name], other[name]) for name in one), part
    one, other = ([json.loads(line) for line in (Path(each["run_dir"]) / HISTORY).open(encoding="utf-8")]
                  for each in (whole, found))  # fmt: skip
    assert [{**row, "seconds": 0} for row in one] == [{**row, "seconds": 0} for row in other]
    assert whole["f1_macro"] == found["f1_macro"]
    assert "finished" in refusal(capsys, main, "resume", run)
    assert "no readable config.json" in refusal(capsys, main, "resume", tmp_path)


def test_resuming_with_other_tables_is_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "labelled.csv"
    table.write_bytes((data / "labelled.csv").read_bytes())

    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "fit", stopped)
    words = ["train", "--data", table, "--fold", 0, "--text-encoder", data / "bert", *LEARN, "--log-dir", tmp_path]
    assert main([str(word) for word in words]) == 130
    write_labelled_reports(table, phantom_table(150, 1))
    capsys.readouterr()
    assert "tables have changed" in refusal(capsys, main, "resume", next(tmp_path.glob("*/version_0")))


@pytest.mark.parametrize("schedule", ["plateau", "cosine"])
def test_no_epoch_and_other_schedules_leave_a_model(
    schedule: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "--data", data / "labelled.csv", "--val", data / "labelled.csv", "--text-encoder", data / "bert"]
    words += [*LEARN, "--bootstrap-rounds", 5, "--log-dir", tmp_path, "--freeze-layers", 2, "--positive-weight"]
    told = answer(capsys, main, *words, "--max-epochs", 0 if schedule == "plateau" else 1, "--schedule", schedule)
    assert (Path(told["model"]) / "model.safetensors").is_file()
    notes = json.loads((Path(told["run_dir"]) / "metrics.json").read_text(encoding="utf-8"))["notes"]
    assert any("selection = reporting" in note for note in notes)
    assert any("150 test reports are training reports too" in note for note in notes)


def test_the_linear_layer_alone_learns_on_a_fixed_encoder(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "--data", data / "labelled.csv", "--fold", 1, "--text-encoder", data / "bert", *LEARN]
    words += ["--probe-epochs", 20, "--max-epochs", 0, "--bootstrap-rounds", 5, "--log-dir", tmp_path]
    told = answer(capsys, main, *words, "--precision", "bf16")
    assert told["epochs"] == 0 and told["f1_macro"]["classifier"] > told["f1_macro"]["all present"] + 0.1
    log = (Path(told["run_dir"]) / "metrics.jsonl").read_text(encoding="utf-8")
    losses = [json.loads(line)["val_loss"] for line in log.splitlines()]
    assert len(losses) == 20 and min(losses) < 0.6 * losses[0]
    best, start = (load_file(path / "model.safetensors") for path in (Path(told["model"]), data / "bert"))
    assert all(torch.equal(best[f"encoder.{name}"], value) for name, value in start.items() if "pooler" not in name)


def test_identical_reports_never_part() -> None:
    reports = phantom_table(60, 3)
    doubled = LabelledReports(
        tuple(f"{i}" for i in range(120)), reports.texts * 2, np.vstack([reports.labels] * 2), CT_RATE_LABELS
    )
    tested: list[str] = []
    for fold in range(3):
        train, val, test = held_out_fold(doubled, fold, 3)
        assert not set(train.texts) & (set(val.texts) | set(test.texts)) and not set(val.texts) & set(test.texts)
        tested += test.ids
    assert sorted(tested, key=int) == list(doubled.ids)


def test_wrong_words_are_refused(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train: tuple[object, ...] = ("train", "--data", data / "labelled.csv", "--text-encoder", data / "bert")
    refused: Callable[..., str] = lambda *words: refusal(capsys, main, *words, "--log-dir", tmp_path)  # noqa: E731
    assert "neither --fold nor --val" in refused(*train)
    assert "either a fold or the tables" in refused(*train, "--fold", 0, "--val", data / "labelled.csv")
    assert "fold 7 of 5" in refused(*train, "--fold", 7)
    assert "--bootstrap-rounds 0" in refused(*train, "--fold", 0, "--bootstrap-rounds", 0)
    assert "192 positions" in refused(*train, "--fold", 0)
    assert "unusable options" in refused(*train, "--fold", 0, "--max-length", 64, "--learning-rate", 0)
    assert "does not exist" in refused("train", "--data", data / "labelled.csv", "--fold", 0, "--text-encoder", "./no")
    assert "18 columns are missing" in refused("train", "--data", data / "new.csv", "--fold", 0)
    assert not list(tmp_path.iterdir())
    label = ("label", "--data", data / "new.csv", "--model", tmp_path)
    assert "lacks classifier.json" in refusal(capsys, main, *label, "--out", tmp_path / "o.csv")
    assert "mend --out" in refusal(capsys, main, *label, "--out", tmp_path / "o.txt")


def test_help_needs_no_torch(repository: Path) -> None:
    assert modules_after(repository, "mg3d.finetuning.text_labels.command", "--help") == (0, set())
    path = repository / "downstream" / "CT-RATE" / "text_classifier.py"
    words = [sys.executable, str(path), "train", "--help"]
    done = subprocess.run(words, cwd="/", capture_output=True, encoding="utf-8", check=True)
    assert "--text-encoder" in done.stdout


@pytest.mark.realdata
@pytest.mark.slow
def test_real_reports_and_a_real_encoder(
    shared_dir: Path, real_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reports = read_labelled_reports(shared_dir / "data" / "text_restricted" / "ctrate_text_classifier_train800.csv")
    check_short_training(reports.take(range(160)), real_bert, tmp_path, capsys)


@pytest.mark.slow
def test_phantom_reports_and_a_real_encoder(
    real_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_short_training(phantom_table(160, 2), real_bert, tmp_path, capsys)


def check_short_training(
    reports: LabelledReports, encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two short epochs on 160 reports: the loss falls and the figures are written."""
    write_labelled_reports(tmp_path / "some.csv", reports)
    words = ["train", "--data", tmp_path / "some.csv", "--fold", 0, "--text-encoder", encoder, "--pooling", "mean"]
    words += ["--max-length", 48, "--freeze-layers", 4, "--max-epochs", 2, "--learning-rate", 5e-4]
    told = answer(capsys, main, *words, "--bootstrap-rounds", 20, "--log-dir", tmp_path / "logs")
    log = (Path(told["run_dir"]) / "metrics.jsonl").read_text(encoding="utf-8")
    losses = [json.loads(line)["train_loss"] for line in log.splitlines()]
    assert losses[1] < losses[0] and told["test"] >= 30
