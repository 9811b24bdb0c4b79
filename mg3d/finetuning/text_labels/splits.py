"""Which reports train, stop and test the classifier; identical reports stay together."""

from __future__ import annotations

import numpy as np

from mg3d.datasets.labelled_reports import LabelledReports
from mg3d.errors import DataError
from mg3d.metrics.retrieval import group_identical


def held_out_fold(
    reports: LabelledReports, fold: int, num_folds: int, val_share: float = 0.1, seed: int = 0
) -> tuple[LabelledReports, LabelledReports, LabelledReports]:
    """Split one table into training, validation (early stopping) and test reports.

    Args:
        reports: n reports.
        fold: which part is the test set, 0 to num_folds - 1.
        num_folds: number of parts, at least 2.
        val_share: share of the remaining reports that decides when to stop, in (0, 1).
        seed: seed of the parts.

    Raises:
        DataError: a fold that does not exist, or too few different reports.
    """
    group = group_identical(reports.texts)
    groups = int(group.max()) + 1 if len(reports) else 0
    if not (num_folds >= 2 and 0 <= fold < num_folds and 0 < val_share < 1):
        raise DataError(f"fold {fold} of {num_folds}, validation share {val_share:g}", "choose a fold from 0")
    part = np.empty(groups, dtype=np.int64)
    part[np.random.default_rng(seed).permutation(groups)] = np.arange(groups) % num_folds
    rest = np.flatnonzero(part != fold)
    val_groups = np.random.default_rng((seed, fold)).permutation(rest)[: max(1, round(val_share * rest.size))]
    test, val = part[group] == fold, np.isin(group, val_groups)
    if not test.any() or not val.any() or (test | val).all():
        raise DataError(f"{groups} different reports are too few for {num_folds} folds", "give more, or fewer folds")
    chosen = (np.flatnonzero(rows) for rows in (~(test | val), val, test))
    train, validation, held_out = (reports.take(rows) for rows in chosen)
    return train, validation, held_out
