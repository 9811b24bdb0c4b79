"""ROUGE as two tools define it; their "ROUGE-L" are different numbers for the same text.

`rouge_l` is coco-caption's (tokens as given, beta 1.2, recall weighs more), `rouge_f` the F measures of rouge-score
(letters and digits only, stems, precision and recall alike).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from mg3d.metrics.porter_stemmer import stem

BETA = 1.2
_NO_WORD = re.compile(r"[^a-z0-9]+")
_STEMMED_FROM = 4


def common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence.

    One row of the dynamic programme is one integer whose bits are the columns (Crochemore et al., 2001; Hyyrö, 2004).
    """
    columns = len(first)
    places: dict[str, int] = {}
    for column, token in enumerate(first):
        places[token] = places.get(token, 0) | (1 << column)
    everything = (1 << columns) - 1
    row = everything
    for token in second:
        matched = row & places.get(token, 0)
        row = ((row + matched) | (row - matched)) & everything
    return columns - row.bit_count()


def rouge_l(references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> np.ndarray:
    """ROUGE-L of each case with beta 1.2; precision and recall are each the best over the references (coco-caption).

    Args:
        references: tokens joined by blanks, [D][>= 1], none empty.
        hypotheses: tokens joined by blanks, [D]; an empty one scores 0.

    Returns:
        [D] values in [0, 1].
    """
    return np.asarray([_case(group, text) for group, text in zip(references, hypotheses, strict=True)])


def _case(references: Sequence[str], hypothesis: str) -> float:
    words = hypothesis.split()
    split = [reference.split() for reference in references]
    common = [common_subsequence(reference, words) for reference in split]
    precision = max(common) / max(1, len(words))
    recall = max(count / len(reference) for count, reference in zip(common, split, strict=True))
    if precision == 0 or recall == 0:
        return 0.0
    return (1 + BETA**2) * precision * recall / (recall + BETA**2 * precision)


def rouge_f(references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> dict[str, np.ndarray]:
    """F measures of rouge-score with its stemmer; of several references the best one counts, for each measure.

    Args:
        references: texts, [D][>= 1].
        hypotheses: texts, [D]; an empty one scores 0.

    Returns:
        ``rouge1_f``, ``rouge2_f`` and ``rougel_f``, each [D] values in [0, 1].
    """
    pairs = zip(references, hypotheses, strict=True)
    found = np.asarray([_best_f([_stems(text) for text in group], _stems(text)) for group, text in pairs])
    return dict(zip(("rouge1_f", "rouge2_f", "rougel_f"), found.reshape(-1, 3).T, strict=True))


def _stems(text: str) -> list[str]:
    words = _NO_WORD.sub(" ", text.lower()).split()
    return [stem(word) if len(word) >= _STEMMED_FROM else word for word in words]


def _best_f(references: Sequence[Sequence[str]], words: Sequence[str]) -> np.ndarray:
    return np.max([_f_measures(reference, words) for reference in references], axis=0)


def _f_measures(reference: Sequence[str], words: Sequence[str]) -> tuple[float, float, float]:
    sizes = len(reference), len(words)
    single = (Counter(reference) & Counter(words)).total()
    double = (Counter(pairwise(reference)) & Counter(pairwise(words))).total()
    longest = common_subsequence(reference, words)
    return _f(single, *sizes), _f(double, sizes[0] - 1, sizes[1] - 1), _f(longest, *sizes)


def _f(shared: int, wanted: int, found: int) -> float:
    """Harmonic mean of shared / found and shared / wanted."""
    return 2 * shared / (wanted + found) if shared else 0.0
