"""Counts of n-grams as sparse matrices, and BLEU and CIDEr from them (coco-caption's definitions).

D cases, M references in all, G distinct n-grams of one order, R bootstrap rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import csr_matrix

MAX_ORDER = 4
_SMALL, _TINY = 1e-9, 1e-15  # coco-caption's guards against 0/0: an empty side scores about 0 instead of nothing


@dataclass(frozen=True)
class NgramCounts:
    """Counts of all n-grams of a set of pairs.

    Attributes:
        hypotheses: per order 1..4 a sparse matrix [D, G].
        references: per order 1..4 a sparse matrix [M, G].
        case: case of each reference [M], ascending.
        hypothesis_lengths: tokens [D].
        reference_lengths: tokens [M].
    """

    hypotheses: tuple[csr_matrix, ...]
    references: tuple[csr_matrix, ...]
    case: np.ndarray
    hypothesis_lengths: np.ndarray
    reference_lengths: np.ndarray

    @property
    def cases(self) -> int:
        """Number of cases D."""
        return len(self.hypothesis_lengths)


def count_ngrams(references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> NgramCounts:
    """Count the n-grams of order 1 to 4.

    Args:
        references: tokens joined by blanks, [D][>= 1].
        hypotheses: tokens joined by blanks, [D].
    """
    texts = [*hypotheses, *(text for group in references for text in group)]
    split = [text.split() for text in texts]
    lengths = np.asarray([len(words) for words in split])
    numbers: dict[str, int] = {}
    token = np.asarray([numbers.setdefault(word, len(numbers)) for words in split for word in words], dtype=np.int64)
    cases = len(hypotheses)
    matrices = _matrices(token, np.repeat(np.arange(len(texts)), lengths), len(texts))
    return NgramCounts(
        hypotheses=tuple(matrix[:cases] for matrix in matrices),
        references=tuple(matrix[cases:] for matrix in matrices),
        case=np.repeat(np.arange(cases), [len(group) for group in references]),
        hypothesis_lengths=lengths[:cases],
        reference_lengths=lengths[cases:],
    )


def _matrices(token: np.ndarray, text: np.ndarray, texts: int) -> list[csr_matrix]:
    """One matrix [texts, G] per order; an n-gram is numbered by its first n - 1 tokens' number and its last token."""
    vocabulary = int(token.max()) + 1 if token.size else 1
    start, gram = np.arange(token.size), token
    found = []
    for order in range(1, MAX_ORDER + 1):
        if order > 1:
            last = start + order - 1
            inside = last < token.size
            inside[inside] = text[last[inside]] == text[start[inside]]
            start, gram = start[inside], gram[inside]
            gram = np.unique(gram * vocabulary + token[start + order - 1], return_inverse=True)[1].reshape(-1)
        columns = int(gram.max()) + 1 if gram.size else 1
        found.append(csr_matrix((np.ones(gram.size), (text[start], gram)), shape=(texts, columns)))
    return found


def bleu_statistics(counts: NgramCounts) -> np.ndarray:
    """What corpus BLEU sums over cases.

    Returns:
        [D, 2 + 2 * 4]: length of the hypothesis, closest reference length (the shorter one of a tie), n-grams of order
        1..4 in the hypothesis, and how many of them are matched (clipped by the largest count in one reference).
    """
    length = counts.hypothesis_lengths
    possible = np.maximum(0, length[:, None] - np.arange(MAX_ORDER))
    matched = [_clipped(counts, order) for order in range(MAX_ORDER)]
    return np.column_stack([length, _closest_lengths(counts), possible, *matched]).astype(np.float64)


def bleu(statistics: np.ndarray) -> np.ndarray:
    """BLEU-1..4 from summed statistics.

    Args:
        statistics: [..., 2 + 2 * 4], sums over the cases of a corpus (or one case).

    Returns:
        [..., 4] values in [0, 1], brevity penalty included.
    """
    length, reference_length = statistics[..., 0], statistics[..., 1]
    possible, matched = statistics[..., 2 : 2 + MAX_ORDER], statistics[..., 2 + MAX_ORDER :]
    precision = (matched + _TINY) / (possible + _SMALL)
    mean = np.cumprod(precision, axis=-1) ** (1.0 / np.arange(1, MAX_ORDER + 1))
    ratio = (length + _TINY) / (reference_length + _SMALL)
    return mean * np.where(ratio < 1, np.exp(1 - 1 / ratio), 1.0)[..., None]


def _clipped(counts: NgramCounts, order: int) -> np.ndarray:
    """Matched n-grams of each case [D]."""
    references, case = counts.references[order], counts.case
    rank = np.arange(len(case)) - np.searchsorted(case, case)
    largest = csr_matrix((counts.cases, references.shape[1]))
    for number in range(int(rank.max()) + 1):
        chosen = np.flatnonzero(rank == number)
        largest = largest.maximum(_membership(case[chosen], counts.cases) @ references[chosen])
    return np.asarray(counts.hypotheses[order].minimum(largest).sum(axis=1)).ravel()


def _closest_lengths(counts: NgramCounts) -> np.ndarray:
    away = np.abs(counts.reference_lengths - counts.hypothesis_lengths[counts.case])
    order = np.lexsort((counts.reference_lengths, away, counts.case))
    return counts.reference_lengths[order][np.searchsorted(counts.case, np.arange(counts.cases))]


def _membership(case: np.ndarray, cases: int) -> csr_matrix:
    """Matrix [cases, M] with a one where a reference belongs to a case."""
    return csr_matrix((np.ones(len(case)), (case, np.arange(len(case)))), shape=(cases, len(case)))


def cider(counts: NgramCounts, *, sigma: float | None = 6.0) -> np.ndarray:
    """CIDEr of each case (Vedantam et al., CVPR 2015), document frequencies taken from these references.

    With ``sigma`` it is CIDEr-D, which coco-caption calls CIDEr: counts clipped, a Gaussian penalty on the difference
    in length. With None it is the plain cosine. One document alone gives 0: every n-gram is in all documents.

    Args:
        counts: n-grams of all cases.
        sigma: width of the length penalty in tokens.

    Returns:
        [D] values in [0, 10].
    """
    delta = _bigrams(counts.hypothesis_lengths)[counts.case] - _bigrams(counts.reference_lengths)
    penalty = np.exp(-(delta**2) / (2 * sigma**2)) if sigma is not None else np.ones(len(delta))
    similar = np.stack([_similarity(counts, order, clip=sigma is not None) for order in range(MAX_ORDER)])
    per_reference = similar.mean(axis=0) * penalty
    references_of_case = np.bincount(counts.case, minlength=counts.cases)
    return 10.0 * np.bincount(counts.case, weights=per_reference, minlength=counts.cases) / references_of_case


def _bigrams(lengths: np.ndarray) -> np.ndarray:
    """Length in the sense of the penalty: coco-caption counts bigrams."""
    return np.maximum(lengths - 1, 0).astype(np.float64)


def _similarity(counts: NgramCounts, order: int, *, clip: bool) -> np.ndarray:
    """Cosine of tf-idf vectors of each reference and its hypothesis [M]."""
    references = counts.references[order]
    present = _membership(counts.case, counts.cases) @ references
    frequency = np.bincount(present.indices, minlength=references.shape[1])
    weight = np.log(counts.cases) - np.log(np.maximum(1.0, frequency))
    reference = references.multiply(weight).tocsr()
    hypothesis = counts.hypotheses[order].multiply(weight).tocsr()
    norms = _norms(hypothesis)[counts.case] * _norms(reference)
    paired = hypothesis[counts.case]
    shared = (paired.minimum(reference) if clip else paired).multiply(reference).sum(axis=1)
    return np.asarray(shared).ravel() / np.where(norms > 0, norms, 1.0)


def _norms(matrix: csr_matrix) -> np.ndarray:
    return np.sqrt(np.asarray(matrix.multiply(matrix).sum(axis=1)).ravel())
