"""CTRG from the drawn download to metrics: a whole run, and eight phantom reports learned by heart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from folders import config, load_folder

from mg3d.datamodules.report_generation import ReportDataModule
from mg3d.finetuning.benchmark import Splits
from mg3d.finetuning.report_scores import best_constant, score_reports
from mg3d.models.finetune.report_generation import build_report_module
from mg3d.phantoms.downstream.ctrg import write_ctrg

BENCHMARK = load_folder("CTRG").BENCHMARK
QUICK = {
    "labels": "planted_findings.csv",
    "phantom": True,
    "roi": [32, 32, 32],
    "feature_size": 12,
    "freeze": "encoder",
    "cache": "memory",
    "num_workers": 0,
    "num_gpus": 0,
    "meteor": "none",
    "bootstrap_rounds": 20,
}


@pytest.fixture(scope="module")
def download(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ctrg_run") / "download"
    write_ctrg(root, studies=12, size=32, seed=1)
    return root


def cfg_of(root: Path, **keys: Any) -> Any:
    return config(BENCHMARK, data_root=str(root), **{**QUICK, **keys})


def rows_of(root: Path) -> list[dict[str, Any]]:
    task = BENCHMARK.resolve_task(cfg_of(root))
    texts = {case.id: task.reports[case.id] for case in BENCHMARK.splits(cfg_of(root)).train}
    clean = {name: task.vocabulary.clean(text) for name, text in texts.items()}
    return [
        {"id": name, "patient": name, "reference": text, "reference_published": text, "hypothesis": text, "score": 0.0}
        for name, text in clean.items()
    ]


def test_perfect_reports_score_one_and_both_references_are_kept(download: Path) -> None:
    cfg, rows = cfg_of(download), rows_of(download)
    entries, notes = score_reports(rows, BENCHMARK.resolve_task(cfg), cfg)
    for prefix in ("", "full/", "reference/"):
        assert entries[f"{prefix}bleu_4"]["mean"] == pytest.approx(1.0)
    assert entries["ce_f1_micro"]["mean"] == 1.0
    assert 0 < entries["constant_report/ce_f1_micro"]["mean"] < 1
    assert all(row["bleu_4"] == pytest.approx(1.0) and row["cider"] > 0 for row in rows)
    assert entries["meteor_java"]["mean"] is None and entries["meteor_nltk"]["mean"] is None
    assert any("references: full" in note for note in notes)


def test_the_best_constant_report_is_the_best_of_all() -> None:
    truth = (np.random.default_rng(0).random((30, 6)) < np.linspace(0.1, 0.6, 6)).astype(int)

    def f1(stated: np.ndarray) -> float:
        return 2 * (truth * stated).sum() / (truth.sum() + len(truth) * stated.sum())

    every = [np.array([code >> k & 1 for k in range(6)]) for code in range(1, 64)]
    assert f1(best_constant(truth)) == pytest.approx(max(f1(stated) for stated in every))


@pytest.mark.slow
def test_a_run_leaves_scores_reports_and_the_published_table(download: Path, tmp_path: Path) -> None:
    from mg3d.finetuning.run import run

    places = {"work_dir": str(tmp_path / "work"), "log_dir": str(tmp_path / "result")}
    cfg = cfg_of(download, **places, max_epoch=1, batch_size=4, width=32, max_tokens=30, seed=0, gallery=6)
    result = run(cfg, BENCHMARK)
    folder = Path(result["run_dir"])
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    assert {"full/bleu_4", "reference/bleu_4", "bleu_4", "ce_f1_micro", "constant_report/ce_f1_micro"} <= set(metrics)
    assert metrics["protocol"] == "clean" and metrics["meteor_java"]["mean"] is None
    table = json.loads((folder / "generated.json").read_text(encoding="utf-8"))
    assert set(table[0]) == {"filename", "prediction", "ground_truth"}
    parts = json.loads((folder / "splits.json").read_text(encoding="utf-8"))
    assert {row["filename"] for row in table} == set(parts["test"])
    assert not set(parts["test"]) & set(parts["val"] + parts["train"])
    assert (folder / "per_case.csv").read_text(encoding="utf-8").startswith("id,patient,")
    # the baselines stand beside the generator, and the gallery shows what it saw
    for name in ("bleu_4", "ce_f1_micro", "crg"):
        assert {f"label_to_report/{name}", f"constant_report/{name}"} <= set(metrics)
    assert "floor" in metrics["crg"] and "0.333" in metrics["definitions"]["crg"]
    assert any("own label head" in note for note in metrics["notes"])
    assert "Beside the generator" in (folder / "report.html").read_text(encoding="utf-8")
    gallery = (folder / "gallery.html").read_text(encoding="utf-8")
    assert gallery.count("<article") == len(table) and gallery.count("data:image/") == 3 * len(table)


@pytest.mark.slow
def test_eight_phantom_reports_are_learned_by_heart(download: Path) -> None:
    cfg = cfg_of(download, batch_size=8, width=96)
    chosen = BENCHMARK.splits(cfg)
    eight = (*chosen.train, *chosen.val)[:8]
    task = BENCHMARK.resolve_task(cfg)
    torch.manual_seed(0)
    module = build_report_module(cfg, task, 150)
    module.log = lambda *_, **__: None  # type: ignore[method-assign]
    data = ReportDataModule(cfg, task, Splits(eight, (), ()))
    module.cache_features(data, torch.device("cpu"))
    batch = next(iter(data.image_loader("train")))
    optimizer = torch.optim.Adam(module.parameters(), lr=3e-3)
    module.train()
    for _ in range(150):
        optimizer.zero_grad()
        module.training_step(batch, 0)["loss"].backward()
        optimizer.step()
    module.eval()
    module._note(batch)
    entries, _ = score_reports(module._rows, task, cfg)
    assert entries["bleu_4"]["mean"] > 0.8
    assert entries["ce_f1_micro"]["mean"] > 0.8
