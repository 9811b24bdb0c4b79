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
    positive_weight: float = 1.0,
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
        positive_weight: weight of the positive cases in the cross-entropy.

    Returns:
        [m] log-odds, or None when a class has fewer than ``MIN_CASES_PER_CLASS`` training patients.
    """
    known = np.isin(train_targets, (0, 1))
    features, targets, groups = train_features[known], train_targets[known].astype(int), train_groups[known]
    patients = [len(np.unique(groups[targets == value])) for value in (0, 1)]
    if min(patients) < MIN_CASES_PER_CLASS:
        return None
    search = _search(features, targets, groups, "roc_auc", seed, {0: 1.0, 1: positive_weight})
    return np.asarray(search.decision_function(test_features))


def multiclass_probe_probabilities(
    train_features: np.ndarray,
    train_targets: np.ndarray,
    train_groups: np.ndarray,
    test_features: np.ndarray,
    num_classes: int,
    seed: int = 0,
) -> np.ndarray | None:
    """Fit the probe of several classes and give the probabilities of held-out cases.

    As `linear_probe_scores`, with the strength chosen by the likelihood of left-out patients.

    Args:
        train_features: [n, d].
        train_targets: [n] class index.
        train_groups: [n] patient of each case.
        test_features: [m, d].
        num_classes: K; a class without training cases has probability 0.
        seed: seed of the folds.

    Returns:
        [m, K], or None when a class that occurs has fewer than ``MIN_CASES_PER_CLASS`` patients, or only one occurs.
    """
    classes = np.unique(train_targets)
    patients = [len(np.unique(train_groups[train_targets == value])) for value in classes]
    if len(classes) < 2 or min(patients) < MIN_CASES_PER_CLASS:
        return None
    search = _search(train_features, train_targets, train_groups, "neg_log_loss", seed)
    found = np.zeros((len(test_features), num_classes))
    found[:, classes.astype(int)] = search.predict_proba(test_features)
    return found


def _search(
    features: np.ndarray,
    targets: np.ndarray,
    groups: np.ndarray,
    scoring: str,
    seed: int,
    class_weight: dict[int, float] | None = None,
) -> GridSearchCV:
    """Fit with every strength, patient-grouped folds deciding between them, then on all cases with the best."""
    search = GridSearchCV(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=300, class_weight=class_weight)),
        {"logisticregression__C": list(INVERSE_STRENGTHS)},
        scoring=scoring,
        cv=StratifiedGroupKFold(n_splits=3, shuffle=True, random_state=seed),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        search.fit(features, targets, groups=groups)
    return search
