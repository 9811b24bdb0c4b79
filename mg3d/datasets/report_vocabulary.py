"""Words of CTRG reports: the published cleaning, a vocabulary of frequent words, and its codes (spec downstream 8.3).

Id 0 is start, end and padding at once; the words have the ids 1 to ``size``, in alphabetical order.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

END: Final = 0
"""Start, end and padding."""
UNKNOWN: Final = "<unk>"
MIN_COUNT: Final = 3
MAX_TOKENS: Final = 150
"""Longest code, start and end included."""
_RUNS: Final = (("__", "_"), ("  ", " "), ("..", "."))
_ENUMERATED: Final = tuple(f"{before}{number}. " for before in (". ", " ") for number in range(2, 6))
_DROPPED: Final = str.maketrans("", "", ".,?;*!%^&_+():<=>@[]{}/\\\"'")


def clean_published(report: str) -> str:
    """Return a report as the published code tokenises it: lower case, sentences joined and ended by " . ".

    Newlines become blanks, runs of underscores, blanks and full stops become one, enumerators ("1. " to "5. ") go, and
    inside a sentence all punctuation is dropped, so that "0.8" becomes "08".

    Args:
        report: text as written.

    Returns:
        Tokens with one blank between them, the last one "."; "" for a report without any word.
    """
    text = report.replace("\n", " ")
    for run, single in _RUNS:
        while run in text:
            text = text.replace(run, single)
    text = text.replace("1. ", "")
    for enumerated in _ENUMERATED:
        text = text.replace(enumerated, ". ")
    sentences = [sentence.translate(_DROPPED).strip() for sentence in text.strip().lower().split(". ")]
    if not any(sentences):
        return ""
    return re.sub(r"\s+", " ", " . ".join(sentences) + " .").strip()


@dataclass(frozen=True)
class ReportVocabulary:
    """The words a report generator can write.

    Attributes:
        words: alphabetical, ``<unk>`` among them; ``words[k]`` has the id k + 1.
    """

    words: tuple[str, ...]
    _ids: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if UNKNOWN not in self.words or len(set(self.words)) != len(self.words):
            raise ValueError(f"a vocabulary holds {UNKNOWN} and every word once, got {len(self.words)} words")
        object.__setattr__(self, "_ids", {word: number for number, word in enumerate(self.words, start=1)})

    @classmethod
    def build(cls, reports: Iterable[str], min_count: int = MIN_COUNT) -> ReportVocabulary:
        """Collect the words that occur often enough.

        Args:
            reports: training reports as written; they are cleaned here.
            min_count: rarer words become ``<unk>``.
        """
        counts = Counter(word for report in reports for word in clean_published(report).split())
        return cls(tuple(sorted({word for word, count in counts.items() if count >= min_count} | {UNKNOWN})))

    @staticmethod
    def clean(report: str) -> str:
        """`clean_published`, for those who only hold a vocabulary."""
        return clean_published(report)

    @property
    def size(self) -> int:
        """Number V of words, ``<unk>`` included; codes run from 0 to V."""
        return len(self.words)

    def encode(self, report: str, max_tokens: int = MAX_TOKENS, *, keep_end: bool = True) -> list[int]:
        """Code a report: start, words, end.

        Args:
            report: text as written.
            max_tokens: longest code, start and end included.
            keep_end: cut the words, so that a long report still ends; False cuts the end away as published (D61).

        Returns:
            Ids, the first one 0.

        Raises:
            ValueError: no room for a word.
        """
        if max_tokens < 3:
            raise ValueError(
                f"max_tokens={max_tokens} leaves no room for a word between start and end; give at least 3"
            )
        unknown = self._ids[UNKNOWN]
        ids = [self._ids.get(word, unknown) for word in clean_published(report).split()]
        return [END, *ids[: max_tokens - 2], END] if keep_end else [END, *ids, END][:max_tokens]

    def decode(self, ids: Sequence[int]) -> str:
        """Turn ids into words up to the first 0; one leading 0, the start, is passed over.

        Raises:
            ValueError: an id beyond the vocabulary.
        """
        words: list[str] = []
        for position, number in enumerate(ids):
            if not 0 <= number <= self.size:
                raise ValueError(f"id {number} is not in 0..{self.size}")
            if number == END and position > 0:
                break
            if number != END:
                words.append(self.words[number - 1])
        return " ".join(words)

    def to_plain(self) -> dict[str, Any]:
        """Plain form for a config or a checkpoint."""
        return {"words": list(self.words)}
