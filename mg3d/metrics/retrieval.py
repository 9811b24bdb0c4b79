"""Recall at K in both directions, with identical reports grouped and ties ranked last."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def group_identical(texts: Sequence[str]) -> np.ndarray:
    """Number texts so that identical ones (after collapsing blanks and case) share a number.

    Args:
        texts: n reports.

    Returns:
        Integer array [n] with values 0..m-1.
    """
    normalised = np.asarray([" ".join(text.lower().split()) for text in texts])
    return np.unique(normalised, return_inverse=True)[1].reshape(-1)


def ranks_with_ties_last(similarity: np.ndarray, relevant: np.ndarray) -> np.ndarray:
    """Rank of the best relevant candidate of every query; a tie with a wrong candidate counts against it.

    Args:
        similarity: [Q, K] scores of the candidates.
        relevant: boolean [Q, K], at least one true value in each row.

    Returns:
        Integer array [Q], 1 is best.

    Raises:
        ValueError: if shapes disagree, a score is not finite, or a query has no relevant candidate.
    """
    if similarity.shape != relevant.shape:
        raise ValueError(f"similarity {similarity.shape} and relevance {relevant.shape} do not agree")
    if not np.isfinite(similarity).all():
        raise ValueError("similarities hold NaN or infinity: the embeddings are broken")
    if not relevant.any(axis=1).all():
        raise ValueError("every query needs at least one relevant candidate")
    best = np.where(relevant, similarity, -np.inf).max(axis=1, keepdims=True)
    return 1 + ((similarity >= best) & ~relevant).sum(axis=1)


def chance_recall(relevant: np.ndarray, k: int) -> np.ndarray:
    """Probability that a random order places a relevant candidate among the first k.

    Hypergeometric: one minus the product over i < k of (n - g - i) / (n - i), with g relevant among n candidates.

    Args:
        relevant: boolean [Q, K].
        k: cut-off, at least 1.

    Returns:
        [Q] probabilities.
    """
    candidates = relevant.shape[1]
    wrong = candidates - relevant.sum(axis=1)
    draws = np.arange(min(k, candidates))
    missed = np.clip(wrong[:, None] - draws, 0, None) / (candidates - draws)
    return 1.0 - missed.prod(axis=1)
