"""The baselines beside a generator: what they write, where the words come from, and how they are scored."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mg3d.datasets.labelled_reports import split_report
from mg3d.datasets.report_vocabulary import ReportVocabulary, clean_published
from mg3d.errors import DataError
from mg3d.finetuning.benchmark import Case, ReportTask, Splits
from mg3d.finetuning.config import resolve_finetune_config
from mg3d.finetuning.pictures.report import write_report
from mg3d.finetuning.report_baseline import (
    Beside,
    best_constant,
    best_threshold,
    probe_probabilities,
    score_beside,
    stated_table,
)
from mg3d.finetuning.report_beside import beside_run
from mg3d.models.finetune.report_generation import CaseViews
from mg3d.phantoms.findings import FINDINGS, draw_lesions
from mg3d.phantoms.report import stated_findings
from mg3d.phantoms.report import write_report as write_phantom_report

SENTINEL = "Zebra stripes are unremarkable."


def phantom(count: int, seed: int) -> tuple[list[str], np.ndarray]:
    rng = np.random.default_rng(seed)
    texts = [write_phantom_report(draw_lesions(rng), rng).findings for _ in range(count)]
    return texts, stated_table(texts, stated_findings, FINDINGS)


TRAIN, TRAIN_LABELS = phantom(200, 0)
TEST, TEST_LABELS = phantom(40, 1)
REFERENCES = [f"{text} {SENTINEL}" for text in TEST]


def beside(**changes: Any) -> Beside:
    given: dict[str, Any] = {"reader": stated_findings, "rounds": 20, "hypotheses": REFERENCES, **changes}
    chances = given.pop("probabilities", TEST_LABELS.astype(float))
    return score_beside(given.pop("references", REFERENCES), chances, FINDINGS, TRAIN, TRAIN_LABELS, **given)


@pytest.fixture(scope="module")
def perfect() -> Beside:
    return beside()


def test_what_a_perfect_classifier_finds_is_written_and_beats_the_constant(perfect: Beside) -> None:
    value = {name: entry["mean"] for name, entry in perfect.entries.items()}
    assert value["label_to_report/ce_f1_micro"] == 1.0 == value["label_to_report/classifier_f1_micro"]
    assert value["ce_f1_micro"] == 1.0 and value["bleu_4"] == pytest.approx(1.0)
    assert value["constant_report/ce_f1_micro"] < 0.7
    assert 0 < value["label_to_report/bleu_4"] < 1 and 0 < value["constant_report/bleu_4"] < 1
    assert perfect.entries["label_to_report/crg"]["floor"] == pytest.approx(1 / 3)
    low, high = perfect.entries["constant_report/ce_f1_micro"]["ci95"]
    assert low < value["constant_report/ce_f1_micro"] < high
    bare = {name for name in value if "/" not in name}
    for prefix in ("label_to_report", "constant_report"):
        assert {f"{prefix}/{name}" for name in bare} <= set(value)


def test_every_sentence_is_of_a_training_report_and_states_one_finding_at_most(perfect: Beside) -> None:
    known = {sentence for text in TRAIN for sentence in split_report(text)}
    written = {sentence for text in perfect.texts["label_to_report"] for sentence in split_report(text)}
    assert written <= known and SENTINEL not in written
    assert all(len(stated_findings(sentence)) <= 1 for sentence in written)


def test_the_constant_report_is_one_text_with_the_best_findings(perfect: Beside) -> None:
    (text,) = set(perfect.texts["constant_report"])
    chosen = best_constant(TEST_LABELS)
    assert stated_findings(text) == {name for name, value in zip(FINDINGS, chosen, strict=True) if value}
    assert any("these very references" in note for note in perfect.notes)


def test_a_classifier_without_skill_is_no_better_than_the_constant() -> None:
    chances = np.random.default_rng(5).random(TEST_LABELS.shape)
    found = beside(probabilities=chances, hypotheses=None, threshold=0.7).entries
    assert found["label_to_report/ce_f1_micro"]["mean"] < found["constant_report/ce_f1_micro"]["mean"]
    assert "bleu_4" not in found


def test_without_a_reader_there_is_wording_alone() -> None:
    found = beside(reader=None, labels=TEST_LABELS, rounds=0)
    assert found.entries["label_to_report/bleu_1"]["mean"] > 0
    assert found.entries["label_to_report/classifier_f1_micro"]["mean"] == 1.0
    assert not [name for name in found.entries if "ce_" in name or "crg" in name]
    assert found.entries["bleu_1"]["ci95"] is None
    unknown = beside(reader=None, hypotheses=None)
    assert "label_to_report/classifier_f1_micro" not in unknown.entries
    assert any("the training labels" in note for note in unknown.notes)


def test_labels_of_a_table_are_the_truth_where_they_are_given() -> None:
    silent = ["The trachea is open."] * len(REFERENCES)
    found = beside(references=silent, labels=TEST_LABELS, hypotheses=None, rounds=0).entries
    assert found["label_to_report/ce_f1_micro"]["mean"] == 1.0 == found["label_to_report/classifier_f1_micro"]["mean"]
    assert beside(references=silent, hypotheses=None, rounds=0).entries["label_to_report/ce_f1_micro"]["mean"] == 0.0


def test_references_without_any_finding_give_stated_values() -> None:
    quiet = ["No emphysema is present."] * 4
    found = beside(references=quiet, probabilities=np.zeros((4, len(FINDINGS))), hypotheses=["", *quiet[1:]])
    assert found.entries["crg"]["mean"] is None and found.entries["label_to_report/crg"]["mean"] is None
    assert found.entries["label_to_report/ce_f1_micro"]["mean"] == 0.0
    assert not stated_findings(found.texts["constant_report"][0])
    assert any("1 of 4 generations are empty" in note for note in found.notes)
    assert any("CRG is undefined" in note for note in found.notes)
    assert best_constant(np.zeros((4, 3), dtype=int)).tolist() == [0, 0, 0]


def test_the_texts_take_the_form_of_the_references() -> None:
    cleaned = [clean_published(text) for text in REFERENCES]
    found = beside(references=cleaned, hypotheses=None, clean=clean_published, pretokenised=True, rounds=0)
    assert all(text == text.lower() and text.endswith(" .") for text in found.texts["label_to_report"])
    assert found.entries["label_to_report/ce_f1_micro"]["mean"] == 1.0


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(DataError, match="probabilities"):
        beside(probabilities=TEST_LABELS[:3].astype(float))
    with pytest.raises(DataError, match="labels"):
        beside(labels=TEST_LABELS[:, :4])
    with pytest.raises(DataError, match="39 generated reports for 40"):
        beside(hypotheses=REFERENCES[1:])


def test_the_threshold_is_the_best_of_all() -> None:
    rng = np.random.default_rng(2)
    labels = rng.random((50, 4)) < 0.3
    chances = np.round(np.clip(labels * 0.3 + rng.random((50, 4)) * 0.7, 0, 1), 2)

    def f1(threshold: float) -> float:
        stated = chances >= threshold
        return 2 * (stated & labels).sum() / (stated.sum() + labels.sum())

    assert f1(best_threshold(labels, chances)) == pytest.approx(max(f1(value) for value in np.unique(chances)))
    assert best_threshold(labels[:3] * 0, chances[:3]) == 0.5


def test_a_probe_stands_in_for_a_label_head() -> None:
    rng = np.random.default_rng(0)
    labels = (rng.random((60, 2)) < 0.4).astype(int)
    labels[:, 1] = 0
    labels[0, 1] = 1
    features = np.concatenate([labels[:, :1] * 4.0, np.zeros((60, 3))], axis=1) + rng.normal(size=(60, 4)) * 0.3
    (val, test), rare = probe_probabilities(
        features[:40], labels[:40], [str(number) for number in range(40)], [features[40:45], features[45:]]
    )
    assert val.shape == (5, 2) and test.shape == (15, 2) and rare == [1]
    assert ((test[:, 0] > 0.5) == (labels[45:, 0] == 1)).all() and not test[:, 1].any()


class FakeModule:
    """Stands in for a trained module: its features and its label head know the findings of the reports."""

    def __init__(self, reports: dict[str, str]) -> None:
        self.reports, self.looked = reports, []

    def look(self, data: Any, part: str, device: torch.device) -> CaseViews:
        self.looked.append(part)
        ids = tuple(case.id for case in getattr(data.splits, part))
        truth = stated_table([self.reports[name] for name in ids], stated_findings, FINDINGS).astype(np.float32)
        return CaseViews(ids, truth * 3 + np.random.default_rng(len(ids)).normal(size=truth.shape) * 0.1, truth * 0.8)


@pytest.mark.parametrize("label_loss", [1.0, 0.0])
def test_a_run_takes_its_label_head_or_a_probe(label_loss: float) -> None:
    texts = {str(number): text for number, text in enumerate([*TRAIN[:100], *TEST])}
    table = stated_table(list(texts.values()), stated_findings, FINDINGS)
    cases = [Case(name, name, Path(name), targets=tuple(map(float, table[int(name)]))) for name in texts]
    splits = Splits(tuple(cases[:100]), tuple(cases[100:120]), tuple(cases[120:]))
    task = ReportTask(
        texts,
        ReportVocabulary.build(texts.values(), 1),
        labels=FINDINGS if label_loss else (),
        label_loss=label_loss,
        findings=stated_findings,
        finding_names=FINDINGS,
    )
    rows: list[dict[str, Any]] = [
        {"id": case.id, "patient": case.patient, "reference": clean_published(texts[case.id]), "hypothesis": ""}
        | {f"p_{name}": 0.8 * value for name, value in zip(FINDINGS, case.targets, strict=True)}
        for case in splits.test
    ]
    module = FakeModule(texts)
    cfg = replace(resolve_finetune_config({"bootstrap_rounds": 10}), extra={"meteor": "none"})
    found = beside_run(cfg, task, module, SimpleNamespace(splits=splits), rows, torch.device("cpu"))
    assert found.entries["label_to_report/ce_f1_micro"]["mean"] > 0.9
    assert all(row["label_to_report"] for row in rows)
    assert module.looked == (["val"] if label_loss else ["train", "val", "test"])
    assert ("own label head" if label_loss else "linear probe") in found.notes[0]
    assert "chosen on 20 selection cases" in found.notes[0]


def test_without_labels_and_reader_only_a_note_is_left() -> None:
    task = ReportTask({}, label_loss=0.0)
    found = beside_run(resolve_finetune_config({}), task, None, None, [], torch.device("cpu"))
    assert found.entries == {} and "not computed" in found.notes[0]


def test_the_page_of_a_run_has_three_columns(tmp_path: Path, perfect: Beside) -> None:
    metrics = {**perfect.entries, "definitions": {"crg": "<one third> without skill"}}
    text = write_report(tmp_path, metrics, []).read_text(encoding="utf-8")
    assert "What the numbers mean" in text and "&lt;one third&gt; without skill" in text
    table = text[text.index("Beside the generator") :]
    assert table.index("<th>generator</th>") < table.index("label-to-report") < table.index("best constant report")
    assert text.count("crg (floor 0.3333)") == 2  # in the results, and beside the baselines
    assert "label_to_report/" not in text
    plain = {name: entry for name, entry in perfect.entries.items() if "/" not in name}
    assert "Beside the generator" not in write_report(tmp_path, plain, []).read_text(encoding="utf-8")
