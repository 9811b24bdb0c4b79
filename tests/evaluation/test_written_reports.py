"""Figures and files of written reports: both ways of writing, empty ones, findings and what needs no image."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from mg3d.config_schema import MG3DConfig, resolve_config
from mg3d.datasets.labels import CT_RATE_LABELS
from mg3d.evaluation.written_reports import EMPTY_REFERENCE, render_reports, score_written, write_files

FINDINGS = ("Cardiomegaly", "Emphysema", "Pleural effusion")
TEXTS = (
    "cardiomegaly is present. no emphysema is observed. there is left pleural effusion.",
    "there is no cardiomegaly. mild emphysema is observed in both lungs.",
    "there is right pleural effusion. no emphysema is present. there is no cardiomegaly.",
    "the trachea and the main bronchi are open. no pleural effusion is present.",
)
STATED = ((1, 0, 1), (0, 1, 0), (0, 0, 1), (0, 0, 0))


def config(**keys: Any) -> MG3DConfig:
    chosen = {"loss_names": {"clm": 1}, "vision_only": True, "clm_findings": "phantom", "clm_meteor": "none"}
    return resolve_config(chosen | {"eval_bootstrap": 20, "eval_findings": list(FINDINGS)} | keys)


def case_rows(written: tuple[str, ...] = TEXTS, known: bool = True, **columns: tuple[str, ...]) -> list[dict[str, Any]]:
    rows = []
    for place, text in enumerate(TEXTS):
        labels = [-1 if not known else 0] * len(CT_RATE_LABELS)
        for name, value in zip(FINDINGS, STATED[place], strict=True):
            labels[CT_RATE_LABELS.index(name)] = value if known else -1
        row = {"id": f"case_{place}", "patient": f"p{place}", "corpus": "clm_ct_rate", "reference": text.capitalize()}
        more = {name: texts[place] for name, texts in columns.items()}
        rows.append({**row, "hypothesis": written[place], **more, "labels": labels})
    return rows


def test_the_references_themselves_are_perfect() -> None:
    entries, notes = score_written(case_rows(), config())
    for name in ("bleu_1", "bleu_4", "rouge_l", "ce_f1_micro", "ce_f1_macro", "reader/ce_f1_micro"):
        assert entries[name]["mean"] == pytest.approx(1.0, abs=1e-6), name
    assert entries["ce_f1_macro"]["per_class"] == dict.fromkeys(FINDINGS, 1.0)
    assert entries["meteor_java"]["mean"] is None and entries["empty_reports"]["mean"] == 0.0
    # two of four reports state pleural effusion, one each of the others
    assert entries["constant_report/ce_f1_micro"]["mean"] == pytest.approx(2 * 2 / (4 + 4))
    assert entries["shuffled_reports/ce_f1_micro"]["mean"] < 0.6
    assert any("labels of the corpus" in note for note in notes)


def test_beam_search_and_sampling_are_named_apart() -> None:
    empty = ("", "", TEXTS[2], TEXTS[3])
    entries, notes = score_written(case_rows(hypothesis_sampled=empty), config())
    assert entries["bleu_4"]["mean"] == pytest.approx(1.0, abs=1e-6) and entries["sampled/bleu_4"]["mean"] < 0.9
    assert entries["empty_reports"]["mean"] == 0.0 and entries["sampled/empty_reports"]["mean"] == 0.5
    assert any(note.startswith("sampled: 2 of 4 generations are empty; they score 0") for note in notes)
    table = render_reports(entries, notes, "4 studies")
    assert "beam search" in table and "sampled" in table and "best report" in table


def test_an_empty_report_scores_nothing_or_is_replaced_as_published() -> None:
    empty = ("",) * 4
    kept, _ = score_written(case_rows(empty), config())
    replaced, notes = score_written(case_rows(empty), config(clm_empty_report="sentence_reference"))
    assert kept["bleu_1"]["mean"] == 0.0 and replaced["bleu_1"]["mean"] > 0.0
    assert kept["empty_reports"]["mean"] == replaced["empty_reports"]["mean"] == 1.0
    assert f"4 empty reports were replaced by {EMPTY_REFERENCE!r}, as published" in notes


def test_without_labels_findings_are_read_from_the_reference_and_without_a_reader_not_at_all() -> None:
    entries, notes = score_written(case_rows(known=False), config(clm_findings="keywords"))
    assert entries["ce_f1_micro"]["mean"] == 1.0 and "reader/ce_f1_micro" not in entries
    assert any("read from their text" in note for note in notes)
    entries, notes = score_written(case_rows(), config(clm_findings="none"))
    assert not any("ce_" in name for name in entries)
    assert "beside it" not in render_reports(entries, notes, "4 studies")


def test_files_name_findings_and_keep_the_published_table(tmp_path: Path) -> None:
    written = (TEXTS[1], *TEXTS[1:])
    write_files(tmp_path, case_rows(written, hypothesis_sampled=TEXTS), config())
    with (tmp_path / "per_case.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:2] == ["id", "patient"] and "labels" not in rows[0]
    assert rows[0]["findings"] == "Cardiomegaly; Pleural effusion" and rows[0]["stated"] == "Emphysema"
    table = json.loads((tmp_path / "generated.json").read_text(encoding="utf-8"))
    assert table[0] == {
        "filename": "case_0", "prediction": TEXTS[1], "ground_truth": TEXTS[0].capitalize(), "sampled": TEXTS[0]
    }  # fmt: skip
