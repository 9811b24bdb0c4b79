"""What a split's reports look like: lengths, repeats, and how many do not fit into the text encoder.

Four fifths of the CT-RATE reports exceed 250 tokens (one in fourteen of CTRG): the packer says so for every data set.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable
from typing import Any

import numpy as np

from prepro.text import FRAGMENT_RULES, count_words, split_sentences
from prepro.tokens import TokenCounter, WordCounter

MAX_TEXT_LEN = 250
DIGESTS_BEFORE_MERGE = 1 << 16
MOSTLY_UNKNOWN = 0.5


class TextStatistics:
    """Running figures over reports; keeps five small numbers a report and eight bytes a distinct sentence, no text.

    Args:
        counter: counts tokens, from :func:`prepro.tokens.make_counter`; None gives the lower bound.
        max_text_len: tokens a model reads of a report, [CLS] and [SEP] included.
        fragments: how sections are cut, a key of :data:`~prepro.text.FRAGMENT_RULES`.
    """

    def __init__(
        self, counter: TokenCounter | None = None, max_text_len: int = MAX_TEXT_LEN, fragments: str = "comma"
    ) -> None:
        self._counter = counter or WordCounter()
        self._max_text_len = max_text_len
        self._split = FRAGMENT_RULES[fragments]
        self._lengths = {name: array("I") for name in ("words", "sentences", "fragments", "tokens")}
        self._empty = self._mostly_unknown = 0
        self._fresh = array("Q")
        self._distinct = np.empty(0, np.uint64)

    def add(self, findings: str, impression: str) -> None:
        """Count one report.

        Args:
            findings: cleaned findings, may be empty.
            impression: cleaned impression, may be empty.
        """
        sentences = [sentence for section in (findings, impression) for sentence in split_sentences(section)]
        fragments = [fragment for section in (findings, impression) for fragment in self._split(section)]
        tokens, unknown = self._counter.count(fragments)
        self._empty += not fragments
        self._mostly_unknown += unknown > MOSTLY_UNKNOWN * tokens
        counts = (count_words(findings) + count_words(impression), len(sentences), len(fragments), tokens)
        for values, count in zip(self._lengths.values(), counts, strict=True):
            values.append(count)
        self._fresh.extend(_digest(sentence) for sentence in sentences)
        if len(self._fresh) >= DIGESTS_BEFORE_MERGE:
            self._merge()

    def _merge(self) -> None:
        self._distinct = np.union1d(self._distinct, np.array(self._fresh, np.uint64))
        self._fresh = array("Q")

    def result(self) -> dict[str, Any]:
        """Return the figures as plain JSON; ``truncated`` is a lower bound unless ``tokens_are_exact``."""
        self._merge()
        tokens = np.array(self._lengths["tokens"])
        truncated = int(np.count_nonzero(tokens > self._max_text_len))
        sentences = sum(self._lengths["sentences"])
        return {
            "reports": len(tokens),
            "empty": self._empty,
            **{name: _summary(np.array(values)) for name, values in self._lengths.items()},
            "distinct_sentences": len(self._distinct),
            "distinct_sentence_share": _share(len(self._distinct), sentences),
            "tokenizer": self._counter.name,
            "tokens_are_exact": self._counter.exact,
            "max_text_len": self._max_text_len,
            "truncated": truncated,
            "truncated_share": _share(truncated, len(tokens)),
            "mostly_unknown_tokens": self._mostly_unknown,
        }


def text_statistics(
    rows: Iterable[tuple[str, str]],
    tokenizer: TokenCounter | None = None,
    max_len: int = MAX_TEXT_LEN,
    fragments: str = "comma",
) -> dict[str, Any]:
    """Return the figures of one split.

    Args:
        rows: (findings, impression) of every report, cleaned; read once, not kept.
        tokenizer: token counter; None gives a lower bound.
        max_len: tokens a model reads of a report.
        fragments: ``comma`` or ``sentence``.

    Returns:
        see :meth:`TextStatistics.result`.
    """
    statistics = TextStatistics(tokenizer, max_len, fragments)
    for findings, impression in rows:
        statistics.add(findings, impression)
    return statistics.result()


def _digest(sentence: str) -> int:
    return int.from_bytes(hashlib.blake2b(sentence.strip().lower().encode(), digest_size=8).digest(), "little")


def _summary(values: np.ndarray) -> dict[str, float]:
    if not values.size:
        return {"total": 0}
    median, high = np.percentile(values, (50, 95))
    mean = round(float(values.mean()), 2)
    return {
        "total": int(values.sum()),
        "mean": mean,
        "median": round(float(median), 2),
        "p95": round(float(high), 2),
        "max": int(values.max()),
    }


def _share(part: int, whole: int) -> float:
    return round(part / whole, 4) if whole else 0.0
