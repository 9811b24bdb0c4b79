"""Linear probe: logistic regression on frozen features, its strength chosen on training patients only."""

from __future__ import annotations

import warnings

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

INVERSE_STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0)
MIN_CASES_PER_CLASS = 5


def linear_probe_scores(
    train_features: np.ndarray,
    train_targets: np.ndarray,
    train_groups: np.ndarray,
    test_features: np.ndarray,
    seed: int = 0,
) -> np.ndarray | None:
    """Fit the probe of one finding and score held-out cases.

    Features are standardised with training statistics; the inverse regularisation strength is chosen among
    ``INVERSE_STRENGTHS`` by patient-grouped stratified cross-validation on the training cases.

    Args:
        train_features: [n, d].
        train_targets: [n], 1 present, 0 absent, other values left out.
        train_groups: [n] patient of each case.
        test_features: [m, d].
        seed: seed of the folds.

    Returns:
        [m] log-odds, or None when a class has fewer than ``MIN_CASES_PER_CLASS`` training patients.
    """
    known = np.isin(train_targets, (0, 1))
    features, targets, groups = train_features[known], train_targets[known].astype(int), train_groups[known]
    patients = [len(np.unique(groups[targets == value])) for value in (0, 1)]
    if min(patients) < MIN_CASES_PER_CLASS:
        return None
    folds = StratifiedGroupKFold(n_splits=3, shuffle=True, random_state=seed)
    search = GridSearchCV(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=300)),
        {"logisticregression__C": list(INVERSE_STRENGTHS)},
        scoring="roc_auc",
        cv=folds,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        search.fit(features, targets, groups=groups)
    return np.asarray(search.decision_function(test_features))
