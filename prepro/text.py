"""Report text on its way into a row: cleaning, what counts as a word, and the pieces a section is cut into."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

from mg3d.datasets.report_text import clean_text, split_fragments

MAX_NESTED_TAGS: Final = 3
"""A tag inside a tag is damage; deeper ones lose their brackets only, so that the time stays linear."""
_ATTRIBUTE: Final = r"""\s+[\w-]+\s*=\s*(?:"[^"<>]*"|'[^'<>]*'|[^\s"'<>]+)"""
_MARKUP: Final = re.compile(
    r"</?(?:a|b|br|div|em|font|h[1-6]|hr|i|li|ol|p|pre|span|strong|sub|sup|table|tbody|td|th|tr|u|ul)"
    rf"(?:{_ATTRIBUTE})*\s*/?>",
    re.IGNORECASE,
)
_LETTER: Final = re.compile(r"[^\W\d_]")
# scripts written without blanks between words: Thai to Khmer, kana, Han
_UNSPACED: Final = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")
_CUT: Final = re.compile(r"(?<=[.!?] )|(?<=[。！？])")
_ENUMERATOR: Final = re.compile(r"\(?\d{1,2}[.)]* ?")
_ABBREVIATION: Final = re.compile(r"\b(?:Dr|Mr|Mrs|Ms|Prof|approx|vs|resp|e\.g|i\.e|[Ff]ig)\. $")


def clean_report(value: object) -> str:
    """Return the normalised text of a section: no HTML tags, otherwise :func:`~mg3d.datasets.report_text.clean_text`.

    Only tags that word processors write (``<br>``, ``<p class="x">`` ...) go; "<5 mm" stays. Idempotent.

    Args:
        value: cell of a table or entry of a JSON; None and words for a missing value give "".
    """
    text = clean_text(value)
    for _ in range(MAX_NESTED_TAGS):
        bare = _MARKUP.sub(" ", text)
        if bare == text:
            return text
        text = clean_text(bare)
    return clean_text(text.replace("<", " ")) if _MARKUP.search(text) else text


def count_words(text: str) -> int:
    """Count the words that can carry a finding: pieces between blanks that hold a letter.

    Numbers and punctuation alone are none; in scripts written without blanks every character counts.

    Args:
        text: cleaned text.
    """
    return sum(max(1, len(_UNSPACED.findall(piece))) for piece in text.split() if _LETTER.search(piece))


def split_sentences(section: str) -> list[str]:
    """Cut a normalised section behind every sentence; the pieces joined give the section back.

    Enumerators ("1. ") and titles ("Dr. ") stay with what follows.

    Args:
        section: cleaned text.
    """
    sentences: list[str] = []
    pending = ""
    for piece in filter(None, _CUT.split(section)):
        pending += piece
        if not (_ENUMERATOR.fullmatch(pending) or _ABBREVIATION.search(pending)):
            sentences.append(pending)
            pending = ""
    return [*sentences, pending] if pending else sentences


FRAGMENT_RULES: Final[dict[str, Callable[[str], list[str]]]] = {"comma": split_fragments, "sentence": split_sentences}
"""How a section becomes fragments: ``comma`` as published (spec pretraining 3.1), or whole sentences."""
