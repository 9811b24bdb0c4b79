"""Report text: cleaning, words, fragments, sentences, and counting tokens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mg3d.errors import EnvironmentProblem
from prepro.text import FRAGMENT_RULES, clean_report, count_words, split_sentences
from prepro.text_statistics import TextStatistics, text_statistics
from prepro.tokens import WordCounter, make_counter

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "lungs", "clear", "no", "nodule", "##s", ",", ".", "(", ")"]


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        ("", ""),
        (" \t\n ", ""),
        (None, ""),
        (float("nan"), ""),
        ("nan", ""),
        ("NA", ""),
        ("Not given.", ""),
        ("x", "x"),
        ("...!?", "...!?"),
        ("12 345", "12 345"),
        ("肺 纹理 清晰", "肺 纹理 清晰"),
        ("normal \U0001fac1", "normal \U0001fac1"),
        ("الرئتان سليمتان", "الرئتان سليمتان"),
        ("lung\0s clear", "lungs clear"),
        ("a\r\nb\rc", "a b c"),
        ('says "none", then', 'says "none", then'),
        ("\ufeffclear", "clear"),
        ("Cafe\u0301", "Café"),
        ("lone \ud800 half", "lone ? half"),
        ("no nodule<br/>heart <B>normal</B>", "no nodule heart normal"),
        ('<p class="x" id=3>clear</p>', "clear"),
        ("nodules <5 mm and >3 mm", "nodules <5 mm and >3 mm"),
        ("a <b and b> c", "a <b and b> c"),
        ("<b<br>>NA</b>", ""),
        ("(img117) stays", "(img117) stays"),
    ],
)
def test_cleaning(cell: object, text: str) -> None:
    assert clean_report(cell) == text


def test_a_very_long_cell_is_cleaned_in_linear_time() -> None:
    text = "No nodule, clear. " * 6000
    cleaned = clean_report(text)
    assert len(cleaned) > 100_000
    assert "".join(FRAGMENT_RULES["comma"](cleaned)) == cleaned
    assert len(split_sentences(cleaned)) == 6000
    assert clean_report("<" * 100_000) == "<" * 100_000
    nested = clean_report("<b" * 50_000 + ">" * 50_000)
    assert nested.startswith("b b b") and clean_report(nested) == nested


@given(st.text(max_size=80) | st.text(alphabet="<>/bpr= \"'nNaA.\x00\r\n\ufeffe\u0301", max_size=40))
@settings(max_examples=300, deadline=None)
def test_cleaning_twice_changes_nothing(text: str) -> None:
    once = clean_report(text)
    assert clean_report(once) == once
    assert once == " ".join(once.split())
    once.encode()


@given(st.text(alphabet="abZ 12.!?,;()肺。drDr\u00e9", max_size=60).map(clean_report))
@settings(max_examples=300, deadline=None)
def test_sentences_joined_give_the_section_back(section: str) -> None:
    sentences = split_sentences(section)
    assert "".join(sentences) == section
    assert all(sentence.strip() for sentence in sentences)


@given(st.text(alphabet="abZ 12.!?,;()肺", max_size=60).map(clean_report))
@settings(max_examples=300, deadline=None)
def test_comma_fragments_lose_only_blanks_and_repeated_delimiters(section: str) -> None:
    kept = "".join(FRAGMENT_RULES["comma"](section))
    assert _bare(kept) == _bare(section)
    if not any(doubled in section for doubled in (",,", ";;", ",;", ";,", " ,", " ;", ", ,", "; ;", ", ;", "; ,")):
        tidy = section.lstrip(",; ")
        assert kept.endswith(tidy) or kept.rstrip(" ,;") == tidy.rstrip(" ,;")


def _bare(text: str) -> str:
    return "".join(char for char in text if char not in " ,;")


def test_sentences_keep_enumerators_and_titles_with_their_text() -> None:
    section = "1. Lungs are normal. 2. No nodule, no mass! Seen by Dr. No. Size 0.8 cm? (img117) 肺清晰。无结节。"
    assert split_sentences(section) == [
        "1. Lungs are normal. ",
        "2. No nodule, no mass! ",
        "Seen by Dr. No. ",
        "Size 0.8 cm? ",
        "(img117) 肺清晰。",
        "无结节。",
    ]
    assert split_sentences("") == []
    assert split_sentences("3. ") == ["3. "]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", 0),
        ("Normal CT, no nodule.", 4),
        ("12 3.4 5", 0),
        ("... - ?", 0),
        ("双肺清晰", 4),
        ("5 cm", 1),
        ("ปอดปกติ", 7),
    ],
)
def test_words_hold_a_letter(text: str, words: int) -> None:
    assert count_words(text) == words


@pytest.fixture
def tokenizer_folder(tmp_path: Path) -> Path:
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY))
    return tmp_path


def test_exact_count_is_that_of_training(tokenizer_folder: Path) -> None:
    from mg3d.datasets.report_text import encode_report, wordpiece_tokenizer_from_vocab

    fragments = ["Lungs clear, ", "no nodules (img117). ", "nan", "", "XYZ"]
    counter = make_counter(str(tokenizer_folder))
    encoded = encode_report(wordpiece_tokenizer_from_vocab(VOCABULARY), fragments, [], sent_level=False)
    assert counter.count(fragments) == (int(encoded.attention_mask.sum()), 2)
    assert counter.exact


@pytest.mark.realdata
def test_count_agrees_with_transformers_on_reports(shared_dir: Path, tmp_path: Path) -> None:
    lines = (
        (shared_dir / "data" / "text" / "radlabels_synthetic_reports_700.jsonl")
        .read_text(encoding="utf-8")
        .splitlines()[:60]
    )
    found = [json.loads(line).values() for line in lines]
    texts = [max(each, key=lambda value: len(value) if isinstance(value, str) else 0) for each in found]
    check_counts(shared_dir / "data" / "tokenizer", tmp_path, texts)


def test_count_agrees_with_transformers_for_every_kind_of_file(
    real_bert: Path, reference_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "vocabulary alone"
    folder.mkdir()
    for name in ("vocab.txt", "tokenizer_config.json"):
        shutil.copy(real_bert / name, folder)
    pairs = json.loads((reference_dir / "expected" / "caption_metrics.json").read_text("utf-8"))["pairs"]
    check_counts(folder, tmp_path / "whole", [pair["ref"].capitalize() for pair in pairs[:60]])


def check_counts(folder: Path, saved: Path, texts: list[str]) -> None:
    """Counts by a folder with ``vocab.txt`` and by one with ``tokenizer.json`` are those of the tokenizer."""
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    reference.save_pretrained(saved)
    (saved / "vocab.txt").unlink(missing_ok=True)
    assert (saved / "tokenizer.json").is_file() and not (folder / "tokenizer.json").is_file()
    counters = [make_counter(str(place)) for place in (folder, saved)]
    bound = WordCounter()
    for text in texts:
        fragments = FRAGMENT_RULES["comma"](clean_report(text))
        whole = len(reference(text.lower())["input_ids"])
        first, second = (counter.count(fragments) for counter in counters)
        assert first == second
        assert abs(first[0] - whole) <= 2
        assert bound.count(fragments)[0] <= first[0]


@given(st.lists(st.text(max_size=30).map(clean_report), max_size=5))
@settings(max_examples=200, deadline=None)
def test_words_are_a_lower_bound(fragments: list[str]) -> None:
    counter = _character_counter()
    assert WordCounter().count(fragments)[0] <= counter.count(fragments)[0]


def _character_counter():
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    from prepro.tokens import ExactCounter

    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return ExactCounter("letters", tokenizer, 0)


@pytest.mark.parametrize("name", ["no/such-model", "StanfordAIMI/NoSuch", "not a repo id!"])
def test_a_tokenizer_that_is_not_here_is_refused_offline(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(EnvironmentProblem, match="not on this machine"):
        make_counter(name)


def test_a_damaged_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(EnvironmentProblem, match="cannot be read"):
        make_counter(str(tmp_path))


def test_statistics_of_a_split(tokenizer_folder: Path) -> None:
    rows = [
        ("Lungs clear. No nodule.", "Clear."),
        ("lungs clear. No nodules, no nodules.", ""),
        ("", ""),
        ("肺 肺 肺", ""),
    ]
    figures = text_statistics(iter(rows), make_counter(str(tokenizer_folder)), max_len=9)
    assert (figures["reports"], figures["empty"]) == (4, 1)
    assert figures["words"]["total"] == 5 + 6 + 3
    assert figures["sentences"] == {"total": 6, "mean": 1.5, "median": 1.5, "p95": 2.85, "max": 3}
    assert figures["distinct_sentences"] == 5
    assert figures["distinct_sentence_share"] == round(5 / 6, 4)
    assert figures["tokens"]["max"] == 2 + 3 + 8
    assert (figures["truncated"], figures["truncated_share"]) == (2, 0.5)
    assert figures["tokens_are_exact"] is True
    assert figures["mostly_unknown_tokens"] == 1
    json.dumps(figures)


def test_statistics_without_tokenizer_say_that_they_are_a_bound() -> None:
    figures = text_statistics([("one two three.", "four")], max_len=6)
    assert figures["tokens"]["total"] == 7
    assert figures["truncated"] == 1
    assert figures["tokens_are_exact"] is False
    assert text_statistics([])["truncated_share"] == 0.0


def test_fragment_rule_is_the_one_asked_for() -> None:
    rows = [("a, b, c. d", "")]
    assert text_statistics(rows, fragments="comma")["fragments"]["total"] == 4
    assert text_statistics(rows, fragments="sentence")["fragments"]["total"] == 2


def test_distinct_sentences_are_counted_across_merges(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prepro.text_statistics.DIGESTS_BEFORE_MERGE", 8)
    statistics = TextStatistics()
    for number in range(100):
        statistics.add(f"Sentence {number % 7} here. The same again. ", "")
    figures = statistics.result()
    assert figures["distinct_sentences"] == 8
    assert statistics.result() == figures
