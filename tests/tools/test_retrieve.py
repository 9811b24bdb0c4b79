"""``tools/retrieve.py``: neighbours by text, scan and id; evaluation equal to that of a run; what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mg3d.datasets.collate import PretrainCollator
from mg3d.datasets.whole_word_mask import WholeWordMasker
from mg3d.evaluation.features import collect
from mg3d.evaluation.report import retrieval_entries
from mg3d.inference.model import load_model
from mg3d.metrics.bootstrap import bootstrap_weights
from mg3d.metrics.retrieval import group_identical
from tests.datasets.arrow_builders import write_corpus
from tests.inference.tiny_weights import checkpoint, chest_hu, network, save_nifti
from tests.tools.command import answer, modules_after, refusal
from tools import embed
from tools.embedding.sources import PackedSource
from tools.embedding.table import Table, make_schema
from tools.retrieval.pairs import pairs_of_table, pairs_with_reports
from tools.retrieval.table import read_embeddings
from tools.retrieve import main, measure

REPORTS = ("The heart is clear.", "No pleural effusion is present.", "The lungs are clear. Nodule.")


def write_table(path: Path, rows: list[dict[str, Any]], output: str = "embedding", weights: str = "w") -> Path:
    """A table as tools/embed.py writes it."""
    config = {"weights": weights, "mode": "resize", "about": {"weights": "made_up.ckpt"}}
    schema = make_schema(output, len(rows[0][output]), "text_embedding" in rows[0], config)
    table = Table(path, schema)
    table.add(rows)
    table.finish()
    return path


def rows(count: int = 4) -> list[dict[str, Any]]:
    """Scans on the unit circle, 20 degrees apart; each report points 4 degrees beside its scan."""
    found = []
    for number in range(count):
        turn, beside = np.radians(20 * number), np.radians(20 * number + 4)
        found.append(
            {
                "id": f"ct/valid/scan_{number}.nii.gz",
                "patient_id": f"p{number}",
                "report": f"report {number}",
                "embedding": np.array([np.cos(turn), np.sin(turn)], np.float32),
                "text_embedding": np.array([np.cos(beside), np.sin(beside)], np.float32),
            }
        )
    return found


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def scans(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with three scans, their reports in reports.csv, and their embeddings in table.parquet."""
    folder = tmp_path_factory.mktemp("study")
    for number in range(3):
        save_nifti(folder / "scans" / f"valid_{number}" / f"valid_{number}_a_1.nii.gz", chest_hu(3 * number))
    lines = [f"valid_{number}_a_1.nii.gz,{text}" for number, text in enumerate(REPORTS)]
    (folder / "reports.csv").write_text("VolumeName,Findings_EN\n" + "\n".join(lines) + "\n")
    words = (folder / "scans", "--weights", weights, "--out", folder / "table.parquet", "--workers", 1)
    assert embed.main([str(word) for word in words]) == 0
    return folder


def test_neighbours_of_a_scan_of_the_table_leave_it_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = write_table(tmp_path / "t.parquet", rows())
    told = answer(capsys, main, table, "--id", "scan_1", "--top", 2, "--out", tmp_path / "near.csv")
    assert [entry["id"] for entry in told["answers"]] == ["ct/valid/scan_0.nii.gz", "ct/valid/scan_2.nii.gz"]
    assert [entry["similarity"] for entry in told["answers"]] == [round(float(np.cos(np.radians(20))), 4)] * 2
    assert told["query"] == "ct/valid/scan_1.nii.gz" and "report 2" in told["printed"]
    assert (tmp_path / "near.csv").read_text(encoding="utf-8").splitlines()[0] == "rank,similarity,id,patient_id,report"
    everything = answer(capsys, main, table, "--id", "ct/valid/scan_3", "--top", 9)["answers"]
    assert [entry["id"][-8:-7] for entry in everything] == ["2", "1", "0"]


def test_recall_is_that_counted_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    perfect = answer(capsys, main, write_table(tmp_path / "a.parquet", rows()), "--evaluate", "--bootstrap", 20)
    assert perfect["report_to_volume_recall_at_1"]["mean"] == perfect["volume_to_report_recall_at_1"]["mean"] == 1
    assert perfect["report_to_volume_recall_at_1"]["chance"] == pytest.approx(1 / 4)
    # the first two scans share one report, so its vector may find either; the reports of the last two are exchanged
    changed = rows()
    changed[1]["report"], changed[1]["text_embedding"] = changed[0]["report"], changed[0]["text_embedding"]
    for key in ("report", "text_embedding"):
        changed[2][key], changed[3][key] = changed[3][key], changed[2][key]
    told = answer(
        capsys, main, write_table(tmp_path / "b.parquet", changed), "--evaluate", "--out", tmp_path / "m.json"
    )
    assert told["distinct_reports"] == 3 and told["pairs"] == told["patients"] == 4
    assert told["report_to_volume_recall_at_1"]["mean"] == 0.5
    assert told["volume_to_report_recall_at_1"]["mean"] == 0.5
    assert told["volume_to_report_recall_at_1"]["candidates"] == 3
    stored = json.loads((tmp_path / "m.json").read_text(encoding="utf-8"))
    assert stored["report_to_volume_recall_at_1"] == told["report_to_volume_recall_at_1"]
    assert set(stored["permuted_images"]) == {key for key in stored if "_recall_at_" in key}
    assert "report to volume R@1" in told["printed"] and "volumes shuffled" in told["printed"]


def test_intervals_draw_patients_not_scans(tmp_path: Path) -> None:
    many = rows(12)
    for number, row in enumerate(many):
        row["patient_id"] = f"p{number // 6}"
        if number >= 6:
            row["text_embedding"] = -row["text_embedding"]
    pairs = pairs_of_table(read_embeddings(write_table(tmp_path / "t.parquet", many)))
    entry = measure(pairs, 400, 0)["report_to_volume_recall_at_1"]
    assert entry["mean"] == 0.5 and entry["ci95"] == [0.0, 1.0]


def test_scans_and_texts_are_found_with_the_weights(
    weights: Path, scans: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table, model = scans / "table.parquet", load_model(weights)
    first = scans / "scans" / "valid_1" / "valid_1_a_1.nii.gz"
    told = answer(capsys, main, table, "--scan", first, "--weights", weights)
    assert told["answers"][0]["id"] == "valid_1/valid_1_a_1.nii.gz"
    assert told["answers"][0]["similarity"] == pytest.approx(1, abs=1e-4)
    text = "No pleural effusion is present."
    told = answer(capsys, main, table, "--text", text, "--weights", weights)
    wanted = read_embeddings(table).vectors @ model.encode_text([text])[0].numpy()
    best_first = [round(float(value), 4) for value in sorted(wanted, reverse=True)]
    assert [entry["similarity"] for entry in told["answers"]] == best_first


def test_evaluation_with_a_csv_equals_the_metrics_of_its_parts(
    weights: Path, scans: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--evaluate", "--reports", scans / "reports.csv", "--weights", weights, "--bootstrap", 50)
    told = answer(capsys, main, scans / "table.parquet", *words)
    assert (told["pairs"], told["patients"], told["left_out"]) == (3, 3, 0)
    assert "known from the scans' names" in told["printed"]
    table, model = read_embeddings(scans / "table.parquet"), load_model(weights)
    pairs = pairs_with_reports(table, scans / "reports.csv", model)
    assert pairs.patients == ["valid_0", "valid_1", "valid_2"] and pairs.reports[1] == REPORTS[1].lower()
    # a report of one sentence has the vector of that sentence as a prompt
    assert np.allclose(pairs.text[:2], model.encode_text([text.lower() for text in REPORTS[:2]]).numpy(), atol=1e-5)
    ranks = [1 + int((row > row[number]).sum()) for number, row in enumerate(pairs.text @ table.vectors.T)]
    assert told["report_to_volume_recall_at_1"]["mean"] == pytest.approx(ranks.count(1) / 3)
    (scans / "two.csv").write_text(f"VolumeName,Findings_EN\nvalid_2_a_1.nii.gz,{REPORTS[2]}\nother,{REPORTS[0]}\n")
    words = ("--evaluate", "--reports", scans / "two.csv", "--weights", weights)
    assert answer(capsys, main, scans / "table.parquet", *words)["left_out"] == 2


def test_evaluation_of_packed_rows_equals_that_of_a_run(
    weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "arrows"
    write_corpus(data, "clm_ct_rate", {"test": 7})
    words = (data, "--weights", weights, "--split", "test", "--out", tmp_path / "t.parquet", "--batch-size", 3)
    embed.main([str(word) for word in words])
    told = answer(capsys, main, tmp_path / "t.parquet", "--evaluate", "--bootstrap", 60)
    again = answer(
        capsys, main, tmp_path / "t.parquet", "--evaluate", "--bootstrap", 60, "--reports", data, "--weights", weights
    )
    found = collected(weights, data)
    groups = group_identical(found.cases.reports)
    wanted = retrieval_entries(found.text @ found.image.T, groups, bootstrap_weights(found.cases.patients, 60, 0))
    for name, entry in wanted.items():
        assert told[name] == entry and again[name] == entry, name


def collected(weights: Path, data: Path) -> Any:
    """Features of the test split as the evaluation of a run collects them."""
    model = load_model(weights)
    source = PackedSource(data, "test", model.processor.size_dhw, model.metadata, model.tokenizer)
    samples = [dataset[row] for _, dataset, row in source._rows]
    collate = PretrainCollator(WholeWordMasker(model.tokenizer, 0.15, "padded_reference"), 0, 0.5)
    module = network()
    module.device = torch.device("cpu")
    return collect(module, module.vision_encoder, [collate(samples[:4]), collate(samples[4:])], 2, "test")


def test_tables_that_do_not_fit_are_refused(
    weights: Path, scans: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = scans / "table.parquet"
    assert "needs the model" in refusal(capsys, main, table, "--text", "effusion")
    assert "holds no reports" in refusal(capsys, main, table, "--evaluate")
    assert "no scan is called" in refusal(capsys, main, table, "--id", "valid_9")
    assert "neither .json nor .csv" in refusal(capsys, main, table, "--id", "valid_1_a_1", "--out", tmp_path / "x.txt")
    other = write_table(tmp_path / "other.parquet", rows())
    assert "other weights (made_up.ckpt)" in refusal(capsys, main, other, "--text", "x", "--weights", weights)
    pooled = [{"id": "a", "pooled": np.ones(3, np.float32)}, {"id": "b", "pooled": np.ones(3, np.float32)}]
    pooled_table = write_table(tmp_path / "pooled.parquet", pooled, "pooled")
    assert answer(capsys, main, pooled_table, "--id", "a")["answers"][0]["id"] == "b"
    assert "pooled image features" in refusal(capsys, main, pooled_table, "--evaluate")
    assert "pooled image features" in refusal(capsys, main, pooled_table, "--text", "x", "--weights", weights)
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(table.read_bytes()[:-100])
    assert "cannot be read" in refusal(capsys, main, broken, "--id", "a")
    lost = rows()
    lost[1]["embedding"] = np.array([np.nan, 1], np.float32)
    assert "NaN" in refusal(capsys, main, write_table(tmp_path / "nan.parquet", lost), "--evaluate")
    foreign = tmp_path / "foreign.csv"
    foreign.write_text("VolumeName,Findings_EN\nelsewhere_1.nii.gz,Lungs clear.\n")
    words = ("--evaluate", "--reports", foreign, "--weights", weights)
    assert "a row for none of 3 scans" in refusal(capsys, main, table, *words)


def test_help_and_searching_by_id_need_no_torch(repository: Path, tmp_path: Path) -> None:
    assert modules_after(repository, "tools.retrieve", "--help") == (0, set())
    table = write_table(tmp_path / "t.parquet", rows())
    assert modules_after(repository, "tools.retrieve", table, "--id", "scan_1") == (0, set())
    assert modules_after(repository, "tools.retrieve", tmp_path / "none.parquet", "--evaluate") == (2, set())
