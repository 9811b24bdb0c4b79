"""Tables of labelled reports, the keyword labeller, and real CT-RATE reports through both."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from mg3d.datasets.keyword_labels import label_all_by_keywords, label_by_keywords
from mg3d.datasets.labelled_reports import (
    LabelledReports,
    read_labelled_reports,
    shuffle_sentences,
    split_report,
    write_labelled_reports,
)
from mg3d.datasets.labels import CT_RATE_LABELS
from mg3d.errors import DataError
from mg3d.metrics.clinical import clinical_scores
from mg3d.phantoms.findings import draw_lesions, label_vector
from mg3d.phantoms.report import write_report

HEADER = ",".join(["AccessionNo", "report_text", *CT_RATE_LABELS])
ZEROS = ",".join("0" * 18)


def test_a_table_comes_back_as_written(tmp_path: Path) -> None:
    labels = np.random.default_rng(0).integers(0, 2, (3, 18)).astype(np.int8)
    texts = ('Two lines,\nand a "quote".', "", "Größe normal")
    reports = LabelledReports(("a", "b", "c"), texts, labels, CT_RATE_LABELS)
    write_labelled_reports(tmp_path / "t.csv", reports)
    assert (tmp_path / "t.csv").read_text(encoding="utf-8").splitlines()[0] == HEADER
    again = read_labelled_reports(tmp_path / "t.csv")
    assert (again.ids, again.texts, again.names) == (reports.ids, reports.texts, reports.names)
    assert (again.labels == labels).all() and len(again) == 3
    assert again.take([2, 0]).ids == ("c", "a")


def test_labels_may_be_absent_when_reports_are_to_be_labelled(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("report_text,AccessionNo,note\nClear.,a,x\n", encoding="utf-8")
    found = read_labelled_reports(path, need_labels=False)
    assert found.texts == ("Clear.",) and found.labels.shape == (1, 0)
    with pytest.raises(DataError, match="18 columns are missing: Medical material"):
        read_labelled_reports(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no report"),
        (HEADER + "\n", "no report"),
        (HEADER.replace("report_text", "text") + f"\na,b,{ZEROS}\n", "missing: report_text"),
        (HEADER.replace("Emphysema", "emphysema") + f"\na,b,{ZEROS}\n", "missing: Emphysema"),
        (HEADER + f"\na,b,{ZEROS}\na,c,{ZEROS}\n", "'a' is there twice"),
        (HEADER + f"\na,b,2{ZEROS[1:]}\n", "Medical material is '2'"),
        (HEADER + f"\na,b,{ZEROS},1\n", "row 2"),
        (HEADER + "\na,b\n", "row 2"),
    ],
)
def test_bad_tables_are_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_labelled_reports(path)
    with pytest.raises(DataError, match="table not found"):
        read_labelled_reports(tmp_path / "absent.csv")
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="utf-16"):
        read_labelled_reports(path)


def test_sentences_are_shuffled_but_kept() -> None:
    text = 'Heart is 4.5 cm. No effusion. "Result" \u2022 nodule\nEmphysema.'
    assert split_report(text) == ["Heart is 4.5 cm.", "No effusion.", "Result", "nodule", "Emphysema."]
    shuffled = {shuffle_sentences(text, random.Random(seed)) for seed in range(20)}
    assert len(shuffled) > 5
    assert all(sorted(each.split()) == sorted(" ".join(split_report(text)).split()) for each in shuffled)
    assert shuffle_sentences("", random.Random(0)) == ""


@pytest.mark.parametrize(
    ("text", "findings"),
    [
        ("", set()),
        ("Heart size is normal. No pleural effusion.", set()),
        ("Heart size increased.", {"Cardiomegaly"}),
        ("Pericardial effusion-thickening was not observed.", set()),
        ("There is minimal pericardial effusion.", {"Pericardial effusion"}),
        ("Atheroma plaques in the coronary arteries.", {"Coronary artery wall calcification"}),
        ("Calcific plaques in the wall of the aorta.", {"Arterial wall calcification"}),
        ("A 4.5 mm nodule but no consolidation", {"Lung nodule"}),
        ("Emphysema; without atelectasis", {"Emphysema"}),
        ("Consolidation in the left lower lobe", {"Consolidation", "Lung opacity"}),
        ("The picture is consistent with persistent changes.", set()),
        ("A coronary stent is seen.", {"Medical material"}),
    ],
)
def test_keywords_are_denied_where_the_text_denies_them(text: str, findings: set[str]) -> None:
    found = label_by_keywords(text)
    assert {name for name, value in zip(CT_RATE_LABELS, found, strict=True) if value} == findings


def test_keywords_read_phantom_reports() -> None:
    rng = np.random.default_rng(0)
    drawn = [draw_lesions(rng) for _ in range(60)]
    texts = [write_report(lesions, rng).findings for lesions in drawn]
    truth = np.stack([label_vector(lesions) for lesions in drawn])
    assert clinical_scores(truth, label_all_by_keywords(texts))["ce_f1_micro"] > 0.85
    assert label_all_by_keywords([]).shape == (0, 18)


def test_phantom_reports_and_their_labels(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    drawn = [draw_lesions(rng) for _ in range(200)]
    truth = np.stack([label_vector(lesions) for lesions in drawn])
    texts = tuple(write_report(lesions, rng).findings for lesions in drawn)
    written = LabelledReports(tuple(f"case_{n}" for n in range(200)), texts, truth, CT_RATE_LABELS)
    write_labelled_reports(tmp_path / "t.csv", written)
    found = read_labelled_reports(tmp_path / "t.csv")
    assert len(found) == 200 and found.labels.sum(axis=0).tolist() == truth.sum(axis=0).tolist()
    assert clinical_scores(found.labels, label_all_by_keywords(found.texts))["ce_f1_micro"] > 0.85


@pytest.mark.realdata
def test_real_reports_and_their_labels(shared_dir: Path) -> None:
    found = read_labelled_reports(shared_dir / "data" / "text_restricted" / "ctrate_text_classifier_train800.csv")
    assert len(found) == 800
    assert found.labels.sum(axis=0).tolist() == [
        *(120, 221, 90, 64, 178, 128, 272, 184, 224),
        *(370, 240, 213, 117, 67, 71, 125, 77, 67),
    ]
    keywords = label_all_by_keywords(found.texts)
    scores = clinical_scores(found.labels, keywords)
    print("keywords on 800 real reports: macro F1", round(scores["ce_f1_macro"], 3))
    assert scores["ce_f1_macro"] > 0.6
