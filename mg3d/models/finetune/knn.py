"""Nearest neighbours of frozen features as a classifier: cosine similarity, neighbours weighted by a temperature.

n training cases, m test cases, F features, T targets, K outputs. (Wu et al., CVPR 2018; k and temperature as in DINO.)
"""

from __future__ import annotations

import numpy as np

__all__ = ["knn_probabilities", "neighbour_weights"]

_ROWS_AT_ONCE = 1024


def neighbour_weights(similarity: np.ndarray, neighbours: int, temperature: float) -> np.ndarray:
    """Weights [m, n] of training cases: softmax of similarity / temperature over the nearest, 0 elsewhere.

    Args:
        similarity: [m, n] cosine similarities.
        neighbours: how many training cases count; all of them when there are fewer.
        temperature: above 0; the smaller, the more the nearest counts.

    Raises:
        ValueError: a value out of range.
    """
    if neighbours < 1 or temperature <= 0:
        raise ValueError(f"need neighbours >= 1 and temperature > 0, got {neighbours} and {temperature}")
    count = min(neighbours, similarity.shape[1])
    # a stable sort, so that ties are always broken by the order of the training cases
    nearest = np.argsort(-similarity, axis=1, kind="stable")[:, :count]
    close = np.take_along_axis(similarity, nearest, axis=1)
    votes = np.exp((close - close[:, :1]) / temperature)
    weights = np.zeros_like(similarity)
    np.put_along_axis(weights, nearest, votes / votes.sum(axis=1, keepdims=True), axis=1)
    return weights


def knn_probabilities(
    train_features: np.ndarray,
    train_targets: np.ndarray,
    test_features: np.ndarray,
    *,
    num_classes: int = 0,
    neighbours: int = 20,
    temperature: float = 0.07,
) -> np.ndarray:
    """Probabilities of test cases from their nearest training cases.

    Args:
        train_features: [n, F].
        train_targets: [n, T]: class index, or 0/1 for each binary output (other values are unknown and do not vote).
        test_features: [m, F].
        num_classes: K of a class index; 0 for binary outputs (K = T).
        neighbours: training cases that vote.
        temperature: see `neighbour_weights`.

    Returns:
        [m, K] in [0, 1]; 0.5 for a binary output of which no training case is known.
    """
    train, test = _unit(train_features), _unit(test_features)
    parts = [train_targets[:, 0]] if num_classes else list(train_targets.T)
    wanted = list(range(num_classes)) if num_classes else [1]
    columns = []
    for values in parts:
        known = np.isin(values, wanted if num_classes else (0, 1))
        votes = (values[known, None] == np.asarray(wanted)).astype(np.float64)
        columns.append(_vote(train[known], votes, test, neighbours, temperature))
    return np.clip(np.concatenate(columns, axis=1), 0.0, 1.0)


def _vote(train: np.ndarray, votes: np.ndarray, test: np.ndarray, neighbours: int, temperature: float) -> np.ndarray:
    if not len(train):
        return np.full((len(test), votes.shape[1]), 0.5)
    starts = range(0, len(test), _ROWS_AT_ONCE)
    blocks = (test[start : start + _ROWS_AT_ONCE] @ train.T for start in starts)
    found = [neighbour_weights(block, neighbours, temperature) @ votes for block in blocks]
    return np.concatenate(found) if found else np.zeros((0, votes.shape[1]))


def _unit(features: np.ndarray) -> np.ndarray:
    wide = np.asarray(features, dtype=np.float64)
    return wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-12)
