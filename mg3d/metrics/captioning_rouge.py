"""ROUGE-L from longest common subsequences, found a machine word of columns at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

BETA = 1.2


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
