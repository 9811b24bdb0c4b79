"""How many directions a set of embeddings really uses."""

from __future__ import annotations

import numpy as np


def effective_rank(embeddings: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Exponential of the entropy of the normalised singular values (Roy and Vetterli, EUSIPCO 2007).

    The weighted mean is removed first, so a collapsed space gives a value near 1.

    Args:
        embeddings: [n, d].
        weights: [n] case weights; all one when None.

    Returns:
        A value in [1, min(n, d)]; 1.0 when all embeddings are equal.

    Raises:
        ValueError: if the array is not two-dimensional or holds non-finite values.
    """
    if embeddings.ndim != 2 or not np.isfinite(embeddings).all():
        raise ValueError(f"embeddings must be a finite [n, d] array, got shape {embeddings.shape}")
    weight = np.ones(len(embeddings)) if weights is None else weights
    centred = embeddings - (weight[:, None] * embeddings).sum(0) / weight.sum()
    singular = np.linalg.svd(np.sqrt(weight)[:, None] * centred, compute_uv=False)
    total = singular.sum()
    if total <= 1e-12:
        return 1.0
    share = singular[singular > 0] / total
    return float(np.exp(-(share * np.log(share)).sum()))
