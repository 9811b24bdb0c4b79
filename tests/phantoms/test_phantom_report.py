"""Reports say what was drawn, with its side, and nothing else except in negations."""

from __future__ import annotations

import numpy as np

from mg3d.datasets.report_text import split_fragments
from mg3d.phantoms.findings import FINDINGS, draw_lesion, draw_lesions
from mg3d.phantoms.report import write_report


def _sentences(text: str) -> list[str]:
    return [sentence.strip() for sentence in text.split(".") if sentence.strip()]


def _is_negation(sentence: str) -> bool:
    return "no" in sentence.lower().split()


def test_reports_name_every_finding_and_deny_only_absent_ones() -> None:
    rng = np.random.default_rng(0)
    negations = 0
    for _ in range(200):
        lesions = draw_lesions(rng)
        present = {lesion.finding.lower() for lesion in lesions}
        report = write_report(lesions, rng)
        sentences = _sentences(report.findings)
        for finding in (name.lower() for name in FINDINGS):
            naming = [sentence for sentence in sentences if finding in sentence.lower()]
            affirmed = [sentence for sentence in naming if not _is_negation(sentence)]
            assert bool(affirmed) == (finding in present)
            assert not (finding in present and len(affirmed) < len(naming))
            negations += len(naming) - len(affirmed)
            assert (finding in report.impression.lower()) <= (finding in present)
    assert negations > 200


def test_reports_name_sides_and_lobes() -> None:
    rng = np.random.default_rng(0)
    for finding in ("Medical material", "Lung nodule", "Lung opacity", "Pleural effusion", "Consolidation"):
        for _ in range(10):
            lesion = draw_lesion(finding, rng)
            sentence = next(s for s in _sentences(write_report([lesion], rng).findings) if finding.lower() in s.lower())
            assert lesion.side in sentence.lower().split()
            assert not lesion.site or f"{lesion.side} {lesion.site} lobe" in sentence


def test_sentences_stay_whole_in_the_packing_step() -> None:
    rng = np.random.default_rng(2)
    for _ in range(20):
        text = write_report(draw_lesions(rng), rng).findings
        assert len(split_fragments(text)) == len(_sentences(text))


def test_some_impressions_are_missing_and_most_absent_findings_are_denied() -> None:
    rng = np.random.default_rng(4)
    reports = [write_report((), rng) for _ in range(400)]
    assert 0 < sum(not report.impression for report in reports) < 60
    denied = sum(report.findings.lower().count("no ") for report in reports) / (len(reports) * len(FINDINGS))
    assert 0.6 < denied < 0.8
