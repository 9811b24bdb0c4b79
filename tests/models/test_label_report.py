"""The label-to-report baseline on phantom reports: it writes the findings it is given, and no others."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mg3d.datasets.keyword_labels import label_by_keywords
from mg3d.datasets.labelled_reports import split_report
from mg3d.datasets.labels import CT_RATE_LABELS
from mg3d.errors import DataError
from mg3d.metrics.clinical import clinical_scores
from mg3d.models.finetune.label_report import ReportTemplates, learn_templates, write_report_from_labels
from mg3d.phantoms.findings import FINDINGS, draw_lesions, label_vector
from mg3d.phantoms.report import write_report

KNOWN = [CT_RATE_LABELS.index(name) for name in FINDINGS]


def phantom_reports(count: int, seed: int) -> tuple[list[list[str]], np.ndarray]:
    rng = np.random.default_rng(seed)
    drawn = [draw_lesions(rng) for _ in range(count)]
    return (
        [split_report(write_report(lesions, rng).findings) for lesions in drawn],
        np.stack([label_vector(lesions) for lesions in drawn]),
    )


@pytest.fixture(scope="module")
def templates() -> ReportTemplates:
    return learn_templates(*phantom_reports(300, 0), CT_RATE_LABELS, label_by_keywords)


def test_every_combination_is_written_and_nothing_else(templates: ReportTemplates) -> None:
    _, labels = phantom_reports(100, 1)
    written = [write_report_from_labels(row, templates) for row in labels]
    found = np.stack([label_by_keywords(text) for text in written])
    scores = clinical_scores(labels[:, KNOWN], found[:, KNOWN])
    assert scores["ce_recall_micro"] == 1.0 and scores["ce_precision_micro"] > 0.9
    lengths = [len(split_report(text)) for text in written]
    assert abs(np.median(lengths) - templates.length) <= 3


def test_an_unseen_finding_is_named_plainly_and_a_contradiction_is_left_out() -> None:
    reports = [["The heart is normal.", "No effusion."]] * 20 + [["Large heart seen.", "No effusion."]] * 10
    labels = np.array([[0, 0]] * 20 + [[1, 0]] * 10)
    templates = learn_templates(reports, labels, ("Cardiomegaly", "Hernia"))
    assert write_report_from_labels(np.array([0, 0]), templates) == "The heart is normal. No effusion."
    assert write_report_from_labels(np.array([1, 0]), templates) == "Large heart seen. No effusion."
    assert "Hernia is present." in write_report_from_labels(np.array([0, 1]), templates)


def test_probabilities_take_thresholds(templates: ReportTemplates) -> None:
    scores = np.zeros(18)
    scores[KNOWN[2]] = 0.4
    text = {t: write_report_from_labels(scores, templates, t) for t in (0.3, 0.5)}
    assert label_by_keywords(text[0.3])[KNOWN[2]] == 1 and label_by_keywords(text[0.5])[KNOWN[2]] == 0
    many = np.full(18, 0.5)
    many[KNOWN[2]] = 0.3
    assert write_report_from_labels(scores, templates, many) == text[0.3]


def test_templates_survive_a_file(templates: ReportTemplates) -> None:
    assert ReportTemplates.from_json(json.loads(json.dumps(templates.to_json()))) == templates


def test_wrong_input_is_refused(templates: ReportTemplates) -> None:
    for scores in (np.zeros(3), np.full(18, np.nan)):
        with pytest.raises(DataError, match="18 findings"):
            write_report_from_labels(scores, templates)
    with pytest.raises(DataError, match="0 reports"):
        learn_templates([], np.zeros((0, 18)), CT_RATE_LABELS)
