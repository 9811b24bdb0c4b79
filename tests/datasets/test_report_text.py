from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from arrow_builders import tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from mg3d.datasets.report_text import (
    clean_text,
    encode_report,
    prepare_sections,
    split_fragments,
    wordpiece_tokenizer_from_vocab,
)
from mg3d.datasets.sentence_splitter import split_into_sentences

TOKENIZER = tokenizer()


@pytest.fixture(scope="module")
def golden_cases(golden_dir: Path) -> dict[str, Any]:
    stored = json.loads((golden_dir / "text_sentence_index.json").read_text(encoding="utf-8"))
    assert stored["cases"]
    return stored


def test_sections_and_fragments_equal_golden(golden_dir: Path) -> None:
    stored = json.loads((golden_dir / "text_prepro_ctrg.json").read_text(encoding="utf-8"))
    assert stored["split_sentences"] and stored["reports"]
    for case in stored["split_sentences"]:
        assert split_fragments(case["input"]) == case["output"]
    for report, row in zip(stored["reports"], stored["expected"]["train"], strict=True):
        sections = prepare_sections(report["report"], report["result"])
        assert [sections.caption] == row["texts"]
        assert ([sections.findings], [sections.impression]) == (row["findings"], row["impression"])
        assert list(sections.findings_sen) == row["findings_sen"]
        assert list(sections.impression_sen) == row["impression_sen"]


def test_sentence_splitter_equals_golden(golden_dir: Path) -> None:
    cases = json.loads((golden_dir / "text_split_into_sents.json").read_text(encoding="utf-8"))
    assert cases
    for case in cases:
        assert split_into_sentences(case["input"]) == case["output"]


def test_reference_encoding_equals_golden(golden_cases: dict[str, Any]) -> None:
    tok = wordpiece_tokenizer_from_vocab(golden_cases["vocab"], lowercase=False)
    for case in golden_cases["cases"]:
        out = encode_report(
            tok,
            case["findings_sen"],
            case["impression_sen"],
            max_text_len=case["max_text_len"],
            sent_level=case["sent_level"],
            fragment_separator="none_reference",
        )
        assert out.text == case["text"]
        assert out.input_ids.tolist() == case["input_ids"]
        assert out.attention_mask.tolist() == case["attention_mask"]
        assert out.sentence_index.tolist() == case["sentence_index"]
        assert [(s.text, [s.input_ids]) for s in out.sentences] == [
            (s["text"], s["input_ids"]) for s in case["sen_txt"]
        ]


def test_blank_separator_differs_only_where_words_merge(golden_cases: dict[str, Any]) -> None:
    tok = wordpiece_tokenizer_from_vocab(golden_cases["vocab"], lowercase=False)
    whole = [case for case in golden_cases["cases"] if 0 in case["input_ids"]]
    assert {"massno" in case["text"] for case in whole} == {True, False}
    for case in whole:
        out = encode_report(tok, case["findings_sen"], case["impression_sen"], max_text_len=case["max_text_len"])
        merges = "massno" in case["text"]
        assert (out.input_ids.tolist() == case["input_ids"]) is not merges
        assert [s.text for s in out.sentences] == [s["text"] for s in case["sen_txt"]]


fragments = st.lists(
    st.text(alphabet="abcdeLungs normal effusion ,.;()?!1é肺\n", max_size=30).map(clean_text), max_size=12
)


@given(fragments, fragments, st.integers(4, 40), st.booleans())
@settings(max_examples=200, deadline=None)
def test_sentence_index_agrees_with_the_sentences(findings: list, impression: list, length: int, level: bool) -> None:
    before = list(findings), list(impression)
    out = encode_report(TOKENIZER, findings, impression, max_text_len=length, sent_level=level)
    assert (findings, impression) == before
    count = len(out.sentences)
    assert out.has_text is (count > 0)
    assert set(out.sentence_index.tolist()) - {-1} == set(range(1, count + 1))
    used = int(out.attention_mask.sum())
    assert out.input_ids[0] == TOKENIZER.cls_token_id and out.input_ids[used - 1] == TOKENIZER.sep_token_id
    for number, sentence in enumerate(out.sentences, start=1):
        assert sentence.input_ids[1:-1] == out.input_ids[out.sentence_index == number].tolist()
    assert len(out.input_ids) == len(out.attention_mask) == len(out.sentence_index) == length


def test_truncation_keeps_the_end_token_and_shows_no_hidden_word() -> None:
    out = encode_report(TOKENIZER, ["the lungs are clear, ", "no nodule seen."], ["heart normal"], max_text_len=9)
    assert TOKENIZER.convert_ids_to_tokens(out.input_ids) == [
        *("[CLS]", "the", "lungs", "are", "clear", ",", "no", "nodule", "[SEP]")
    ]
    assert TOKENIZER.convert_ids_to_tokens(out.sentences[-1].input_ids) == ["[CLS]", "no", "nodule", "[SEP]"]


@pytest.mark.parametrize("empty", [[], [""], ["  ", "\n"], ["nan"], ["NaN "], ["Not given."]])
def test_empty_report_is_marked_and_still_valid(empty: list[str]) -> None:
    out = encode_report(TOKENIZER, empty, [], max_text_len=6)
    assert not out.has_text and out.sentences == []
    assert TOKENIZER.convert_ids_to_tokens(out.input_ids) == ["[CLS]", "[SEP]", "[PAD]", "[PAD]", "[PAD]", "[PAD]"]
    assert (out.sentence_index == -1).all()


def test_sentence_of_a_fragment_is_drawn_by_the_given_generator() -> None:
    fragment = ["clear lungs? no mass! normal heart?"]
    texts = {encode_report(TOKENIZER, fragment, [], rng=random.Random(seed)).text for seed in range(20)}
    assert texts == {"clear lungs?", "no mass!", "normal heart?"}
    again = [encode_report(TOKENIZER, fragment, [], rng=random.Random(3)).text for _ in range(2)]
    assert again[0] == again[1]
    assert encode_report(TOKENIZER, fragment, [], sent_level=False).text == "clear lungs? no mass! normal heart?"


@pytest.mark.parametrize(
    "missing", [None, float("nan"), "nan", "NA", "N/A", "None", " null ", "Not given.", "", "\ufeff"]
)
def test_missing_values_never_become_words(missing: object) -> None:
    assert clean_text(missing) == ""
    assert prepare_sections(missing, missing).caption == ""


@given(st.text(max_size=60))
@settings(max_examples=200, deadline=None)
def test_cleaning_is_idempotent_and_storable(text: str) -> None:
    once = clean_text(text)
    assert clean_text(once) == once
    once.encode("utf-8")


def test_cleaning_survives_surrogates_control_characters_and_line_ends() -> None:
    assert clean_text("lung\ud800 a\x00b\r\n\tclear\u3000now") == "lung? ab clear now"


def test_long_reports_are_split() -> None:
    # a look-ahead per comma would be quadratic and take minutes here
    assert len(split_fragments("a, " * 50_000)) == 50_000
    assert split_fragments("(" + "a, " * 50_000 + ")") == ["(" + "a, " * 50_000 + ")"]


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="fragment_separator"):
        encode_report(TOKENIZER, ["a"], [], fragment_separator="none")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_text_len"):
        encode_report(TOKENIZER, ["a"], [], max_text_len=2)
    with pytest.raises(ValueError, match=r"\[MASK\]"):
        wordpiece_tokenizer_from_vocab(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])


def test_tokenizer_from_a_vocabulary_file(tmp_path: Path) -> None:
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "lung", "##s"]) + "\n")
    ids = wordpiece_tokenizer_from_vocab(path)("Lungs")["input_ids"]
    np.testing.assert_array_equal(ids, [2, 5, 6, 3])
