"""CTRG's cleaning, vocabulary and codes (spec downstream 8.3)."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mg3d.datasets.report_vocabulary import MAX_TOKENS, UNKNOWN, ReportVocabulary, clean_published
from mg3d.phantoms.findings import draw_lesions
from mg3d.phantoms.report import write_report

MEASURED = {
    "1. Lungs are clear. 2. No effusion; size 0.8 × 1.0cm (img117). Heart/vessel normal..": (
        "lungs are clear . no effusion size 08 × 10cm img117 . heartvessel normal ."
    ),
    "Both lungs clear. No nodule. ": "both lungs clear . no nodule .",
}


@pytest.mark.parametrize("written", MEASURED)
def test_cleaning_as_measured(written: str) -> None:
    assert clean_published(written) == MEASURED[written]


def test_cleaning_of_odd_text() -> None:
    assert clean_published("Heart\nnormal.... Lung__clear") == "heart normal . lungclear ."
    assert clean_published("1. A b. 2. C d. 5. E f") == "a b . c d . e f ."
    assert clean_published("") == clean_published(" . ? ") == ""
    assert clean_published("a. ?? . b") == "a . . b ."  # an emptied sentence keeps its full stop, as published


def test_vocabulary_has_frequent_words_in_order() -> None:
    vocabulary = ReportVocabulary.build(["b a. b", "b c"], min_count=2)
    assert vocabulary.words == (".", UNKNOWN, "b")
    assert vocabulary.size == 3
    assert vocabulary.encode("b a") == [0, 3, 2, 1, 0]
    sizes = [ReportVocabulary.build(MEASURED, count).size for count in (1, 2, 3, 10)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[1]


@pytest.mark.parametrize("written", MEASURED)
def test_decoding_gives_the_cleaned_text_back(written: str) -> None:
    vocabulary = ReportVocabulary.build(MEASURED, min_count=1)
    assert vocabulary.decode(vocabulary.encode(written)) == MEASURED[written]


def test_a_cut_report_keeps_its_end_unless_published() -> None:
    vocabulary = ReportVocabulary.build(["x y z"], min_count=1)
    ours, published = vocabulary.encode("x y z " * 100), vocabulary.encode("x y z " * 100, keep_end=False)
    assert len(ours) == len(published) == MAX_TOKENS
    assert (ours[0], ours[-1]) == (0, 0)
    assert published[-1] != 0
    assert vocabulary.encode("x y") == vocabulary.encode("x y", keep_end=False)  # short ones are the same
    with pytest.raises(ValueError, match="at least 3"):
        vocabulary.encode("x", max_tokens=2)


def test_decoding_stops_at_the_first_end() -> None:
    vocabulary = ReportVocabulary.build(["x y z"], min_count=1)
    first = vocabulary.encode("x")[1]
    assert vocabulary.decode([0, first, 0, first]) == "x"
    assert vocabulary.decode([0, 0, first]) == ""
    with pytest.raises(ValueError, match="not in 0"):
        vocabulary.decode([0, vocabulary.size + 1])


def test_sizes_on_phantom_reports() -> None:
    rng = np.random.default_rng(0)
    reports = [write_report(draw_lesions(rng), rng).findings for _ in range(240)]
    counts = Counter(word for text in reports for word in clean_published(text).split())
    for least in (1, 3, 10):
        wanted = sum(count >= least for count in counts.values()) + 1  # the unknown word
        assert ReportVocabulary.build(reports, least).size == wanted
    whole = ReportVocabulary.build(reports, 1)
    assert all(whole.decode(whole.encode(text, max_tokens=1000)) == clean_published(text) for text in reports)


@pytest.mark.realdata
def test_sizes_on_the_real_training_reports(shared_dir: Path) -> None:
    path = shared_dir / "data" / "text_restricted" / "ctrg_split_small.json"
    reports = [entry["report"] for entry in json.loads(path.read_text(encoding="utf-8"))["train"]]
    vocabularies = {count: ReportVocabulary.build(reports, count) for count in (1, 3, 10)}
    assert len(reports) == 240
    assert {count: each.size for count, each in vocabularies.items()} == {1: 1043, 3: 447, 10: 223}
    whole = vocabularies[1]
    assert all(whole.decode(whole.encode(text, max_tokens=1000)) == clean_published(text) for text in reports)
    cut = sum(len(clean_published(text).split()) > MAX_TOKENS - 2 for text in reports)
    assert cut == 58
