"""Rule cascade that splits a report fragment into sentences at load time (reference behaviour: spec pretraining 3.2).

Periods that do not end a sentence are replaced by a placeholder, ends are marked, and the placeholder is put back.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Final

_DOT: Final = "\ue000"  # a protected period
_END: Final = "\ue001"  # a sentence end
_STARTER: Final = r"(Mr|Mrs|Ms|Dr|Wherever|(?:He|She|It|They|Their|Our|We|But|However|That|This)\s)"
_FIGURE_WORDS: Final = "Fig|FIG|fig|Figs|figs|Figure|FIGURE|figure|figures|Figures"
_FIGURE_REFERENCE: Final = re.compile(r"[Ff][Ii][Gg]u*r*e*\s*\.*\s*\d+\s*\.*\s*:*-*\s*")


def _rule(pattern: str, replacement: str) -> Callable[[str], str]:
    compiled = re.compile(pattern)
    return lambda text: compiled.sub(replacement, text)


def _swap(old: str, new: str) -> Callable[[str], str]:
    return lambda text: text.replace(old, new)


# order matters: each rule sees the placeholders of the earlier ones
_RULES: Final[tuple[Callable[[str], str], ...]] = (
    _rule(rf"(Mr|St|Mrs|Ms|Dr|{_FIGURE_WORDS}|al|No|[0-9])[.]", rf"\1{_DOT}"),
    _rule(r"[.](com|net|org|io|gov|[0-9])", rf"{_DOT}\1"),
    _swap("Ph.D.", f"Ph{_DOT}D{_DOT}"),
    _rule(r"\s([A-Za-z])[.] ", rf" \1{_DOT} "),
    _rule(rf"([A-Z][.][A-Z][.](?:[A-Z][.])?) {_STARTER}", rf"\1{_END} \2"),
    _rule(r"([A-Za-z])[.]([A-Za-z])[.]([A-Za-z])[.]", rf"\1{_DOT}\2{_DOT}\3{_DOT}"),
    _rule(r"([A-Za-z])[.]([A-Za-z])[.]", rf"\1{_DOT}\2{_DOT}"),
    _rule(rf" (Inc|Ltd|Jr|Sr|Co)[.] {_STARTER}", rf" \1{_END} \2"),
    _rule(r" (Inc|Ltd|Jr|Sr|Co)[.]", rf" \1{_DOT}"),
    _rule(r" ([A-Za-z])[.]", rf" \1{_DOT}"),
    _swap(".\u201d", "\u201d."),
    _swap('."', '".'),
    _swap('!"', '"!'),
    _swap('?"', '"?'),
    _rule(r"([.?!])", rf"\1{_END}"),
    _swap(_DOT, "."),
)


def split_into_sentences(fragment: str) -> list[str]:
    """Split one fragment into stripped, non-empty sentences.

    Figure references ("fig. 3") are removed. A fragment without a final stop is one sentence; blank text gives none.
    """
    text = _FIGURE_REFERENCE.sub("", fragment.replace(_DOT, "").replace(_END, ""))
    text = " " + text.replace(".)", ")").replace("\n", " ") + "  "
    for rule in _RULES:
        text = rule(text)
    return [sentence for part in text.split(_END) if (sentence := part.strip())]
