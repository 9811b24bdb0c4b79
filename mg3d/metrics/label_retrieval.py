"""Volume-to-volume retrieval by shared findings: MAP@K with the label Jaccard of CT-CLIP (downstream spec 7.9).

n volumes, L findings, d latent size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

Protocol = Literal["clean", "reference"]


def label_overlap(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Jaccard |A and B| / |A or B| of label sets; two empty sets share nothing and count 0.

    Args:
        first: boolean [Q, L].
        second: boolean [K, L].

    Returns:
        [Q, K] values in [0, 1].
    """
    one, other = first.astype(np.float64), second.astype(np.float64)
    both = one @ other.T
    either = one.sum(axis=1)[:, None] + other.sum(axis=1)[None, :] - both
    return np.where(either > 0, both / np.where(either > 0, either, 1.0), 0.0)


def overlap_at_k(
    latents: np.ndarray,
    labels: np.ndarray,
    ks: Sequence[int],
    *,
    protocol: Protocol = "clean",
    groups: Sequence[str] | None = None,
) -> tuple[dict[int, np.ndarray], np.ndarray]:
    """Mean label overlap of the K nearest abnormal volumes, per query; MAP@K is its mean.

    The gallery is all volumes with a finding, ordered by cosine; ties keep the order of the gallery. ``clean`` asks
    with abnormal volumes only and takes the query (and its group, when given) out of its gallery; ``reference``
    asks with all volumes and leaves the query in, as published.

    Args:
        latents: [n, d], computed without the volumes' own reports.
        labels: [n, L], 1 present.
        ks: cut-offs, at least 1 each.
        protocol: see above.
        groups: patient or study of each volume, excluded from its own gallery too (clean only).

    Returns:
        K -> value of each query [q], and the queries [q] as row numbers. A gallery of fewer than K volumes is
        averaged over what it holds; a query whose gallery is empty is left out.

    Raises:
        ValueError: if lengths differ, a latent is not finite or zero, or nothing is left to ask.
    """
    present = np.asarray(labels) == 1
    unit = _unit(np.asarray(latents, dtype=np.float64), len(present))
    gallery = np.flatnonzero(present.any(axis=1))
    queries = gallery if protocol == "clean" else np.arange(len(present))
    if gallery.size == 0 or min(ks) < 1:
        raise ValueError("no volume has a finding, or a cut-off is below 1")
    similarity = unit[queries] @ unit[gallery].T
    if protocol == "clean":
        similarity[_own(queries, gallery, groups)] = -np.inf
    asked = np.isfinite(similarity).any(axis=1)
    queries, similarity = queries[asked], similarity[asked]
    if not queries.size:
        raise ValueError("every query's gallery is empty: too few patients with a finding")
    order = np.argsort(-similarity, axis=1, kind="stable")
    overlap = np.take_along_axis(label_overlap(present[queries], present[gallery]), order, axis=1)
    usable = np.isfinite(np.take_along_axis(similarity, order, axis=1))
    total, counted = np.cumsum(overlap * usable, axis=1), np.cumsum(usable, axis=1)
    last = gallery.size - 1
    return {k: total[:, min(k - 1, last)] / counted[:, min(k - 1, last)] for k in ks}, queries


def map_at_k(
    latents: np.ndarray,
    labels: np.ndarray,
    ks: Sequence[int],
    *,
    protocol: Protocol = "clean",
    groups: Sequence[str] | None = None,
) -> dict[int, float]:
    """MAP@K: mean over queries of :func:`overlap_at_k`, whose arguments it takes."""
    return {
        k: float(v.mean()) for k, v in overlap_at_k(latents, labels, ks, protocol=protocol, groups=groups)[0].items()
    }


def _unit(latents: np.ndarray, volumes: int) -> np.ndarray:
    norms = np.linalg.norm(latents, axis=-1, keepdims=True)
    if latents.ndim != 2 or len(latents) != volumes or not np.isfinite(latents).all() or not (norms > 0).all():
        raise ValueError(f"latents must be {volumes} finite non-zero vectors, got shape {latents.shape}")
    return latents / norms


def _own(queries: np.ndarray, gallery: np.ndarray, groups: Sequence[str] | None) -> np.ndarray:
    """Boolean [Q, K]: what may not answer a query."""
    if groups is None:
        return queries[:, None] == gallery[None, :]
    group = np.asarray(groups)
    return group[queries][:, None] == group[gallery][None, :]
