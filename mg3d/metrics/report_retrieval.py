"""Report-to-volume retrieval: Recall@K over a named pool of volumes, because the pool moves the number.

n reports, each with its own volume; K candidates in the pool.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any, Literal

import numpy as np

from mg3d.metrics.bootstrap import bootstrap_weights, summary
from mg3d.metrics.retrieval import chance_recall, group_identical, ranks_with_ties_last

Pool = Literal["volumes", "corrected", "studies", "unique_reports"]
POOLS: dict[Pool, str] = {
    "volumes": "all volumes; CT-RATE's validation set has 3,039",
    "corrected": "all volumes but those on a given list; with CT-RATE's list of wrong ones 3,002 are left",
    "studies": "the first reconstruction of each study; 1,564 in CT-RATE's validation set",
    "unique_reports": "the first volume of each distinct report text",
}
_VOLUME = re.compile(r"(?P<study>.+_\d+_[a-z]+)_(?P<reconstruction>\d+)(?:\.nii\.gz)?(?:\.npz)?")


def study_of(name: str) -> str:
    """Study of a CT-RATE volume name: ``valid_53_a_1.nii.gz`` belongs to ``valid_53_a``; other names are their own."""
    match = _VOLUME.fullmatch(name)
    return match["study"] if match else name


def select_pool(names: Sequence[str], reports: Sequence[str], pool: Pool, excluded: Collection[str] = ()) -> np.ndarray:
    """Rows that belong to a pool, in the order given.

    Args:
        names: volume names [n].
        reports: report of each volume [n].
        pool: see :data:`POOLS`.
        excluded: volume names that ``corrected`` leaves out; the other pools hold them.

    Returns:
        Row numbers, ascending.

    Raises:
        ValueError: an unknown pool, ``corrected`` without a list, unequal lengths, or nothing left.
    """
    if pool not in POOLS or len(names) != len(reports):
        raise ValueError(f"pool {pool!r} of {len(names)} names and {len(reports)} reports; pools: {', '.join(POOLS)}")
    if pool == "corrected" and not excluded:
        raise ValueError("the corrected pool needs the list of volumes to leave out")
    left_out = excluded if pool == "corrected" else ()
    rows = np.asarray([row for row, name in enumerate(names) if name not in left_out], dtype=np.int64)
    if not rows.size:
        raise ValueError("no volume is left in the pool")
    if pool == "studies":
        keys = np.unique([study_of(names[row]) for row in rows], return_inverse=True)[1].reshape(-1)
    elif pool == "unique_reports":
        keys = group_identical([reports[row] for row in rows])
    else:
        return rows
    return rows[np.sort(np.unique(keys, return_index=True)[1])]


def recall_entries(
    similarity: np.ndarray,
    ks: Sequence[int],
    *,
    pool: str,
    groups: Sequence[str] | None = None,
    same: np.ndarray | None = None,
    rounds: int = 1000,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Recall@K of reports asking for their volumes, with intervals and the value of a random order.

    Args:
        similarity: [n, n] scores, row = report, column = volume, own pair on the diagonal. A tie with a wrong volume
            counts against the report.
        ks: cut-offs.
        pool: name of the pool, kept beside each number.
        groups: patient of each report for the bootstrap; each report its own when None.
        same: [n] number per report: volumes of the same number are right answers too (identical reports).
        rounds: bootstrap rounds.
        seed: seed of the bootstrap.

    Returns:
        ``recall@K`` -> mean, ci95, n, chance, pool; and ``median_rank``.

    Raises:
        ValueError: if the matrix is not square or not finite.
    """
    scores = np.asarray(similarity, dtype=np.float64)
    if scores.ndim != 2 or scores.shape[0] != scores.shape[1]:
        raise ValueError(f"similarity must be [reports, volumes] of one pool, got {scores.shape}")
    reports = len(scores)
    number = np.arange(reports) if same is None else np.asarray(same)
    relevant = number[:, None] == number[None, :]
    ranks = ranks_with_ties_last(scores, relevant)
    weights = bootstrap_weights(list(groups or [str(row) for row in range(reports)]), rounds, seed)
    entries: dict[str, dict[str, Any]] = {}
    for k in ks:
        hits = (ranks <= k).astype(np.float64)
        chance = float(chance_recall(relevant, k).mean())
        drawn = weights @ hits / weights.sum(axis=1)
        entries[f"recall@{k}"] = summary(hits.mean(), drawn, reports, chance=chance, pool=f"{pool} ({reports})")
    entries["median_rank"] = {
        "mean": float(np.median(ranks)),
        "ci95": None,
        "n": reports,
        "pool": f"{pool} ({reports})",
    }
    return entries
