"""Bootstrap over patients, expressed as case weights so that every metric is computed in one matrix product."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

MAX_WEIGHTS_AT_ONCE = 2_000_000  # of 8 bytes; the candidates of a LUNA16 test part come to 166,225 a round


def bootstrap_weights(groups: Sequence[str], rounds: int, seed: int = 0) -> np.ndarray:
    """Draw patients with replacement and return how often each case is then counted.

    Cases of one patient are kept together, since they are not independent.

    Args:
        groups: patient of each case, length n.
        rounds: number of bootstrap rounds R, at least 1.
        seed: seed of the draws.

    Returns:
        Float array [R, n] of non-negative integer counts.

    Raises:
        ValueError: if there is no case or no round.
    """
    return np.concatenate(list(_draws(groups, rounds, seed, rounds)))


def _draws(groups: Sequence[str], rounds: int, seed: int, at_once: int) -> Iterator[np.ndarray]:
    """Weights [r, n] of successive rounds; the draws do not depend on how many are made at once."""
    if len(groups) == 0 or rounds < 1:
        raise ValueError(f"a bootstrap needs cases and rounds, got {len(groups)} cases and {rounds} rounds")
    _, patient_of_case = np.unique(np.asarray(groups), return_inverse=True)
    patients = int(patient_of_case.max()) + 1
    rng, chances = np.random.default_rng(seed), np.full(patients, 1.0 / patients)
    for first in range(0, rounds, at_once):
        counts = rng.multinomial(patients, chances, size=min(at_once, rounds - first))
        yield counts[:, patient_of_case].astype(np.float64)


def bootstrap_values(
    measure: Callable[[np.ndarray], np.ndarray], groups: Sequence[str], rounds: int, seed: int = 0
) -> np.ndarray:
    """Value of a metric in every bootstrap round, with bounded memory however many cases there are.

    Args:
        measure: case weights [r, n] -> values [r, ...].
        groups: patient of each case, length n.
        rounds: number of bootstrap rounds R, at least 1.
        seed: seed of the draws; the same as in :func:`bootstrap_weights`.

    Returns:
        [R, ...] values.
    """
    at_once = max(MAX_WEIGHTS_AT_ONCE // max(len(groups), 1), 1)
    return np.concatenate([measure(weights) for weights in _draws(groups, rounds, seed, at_once)])


def metric_entries(
    measure: Callable[[np.ndarray], Mapping[str, np.ndarray]], groups: Sequence[str], rounds: int, seed: int = 0
) -> dict[str, dict[str, Any]]:
    """Entries of ``metrics.json`` for several metrics of the same cases.

    Args:
        measure: case weights [r, n] -> name -> values [r], for example
            ``partial(weighted_multiclass, probs, targets)``.
        groups: patient of each case.
        rounds: bootstrap rounds, 0 for no interval.
        seed: seed of the draws.

    Returns:
        ``{name: {"mean", "ci95", "n"}}``.
    """
    whole = measure(np.ones((1, len(groups))))
    names = list(whole)
    drawn = np.full((1, len(names)), np.nan)
    if rounds:
        drawn = bootstrap_values(
            lambda weights: np.stack(list(measure(weights).values()), axis=1), groups, rounds, seed
        )
    return {name: summary(float(whole[name][0]), drawn[:, column], len(groups)) for column, name in enumerate(names)}


def interval(values: np.ndarray, level: float = 0.95) -> list[float] | None:
    """Percentile interval of bootstrap values, rounds without a value left out.

    Args:
        values: bootstrap values [R]; NaN marks a round in which the metric was undefined.
        level: coverage in (0, 1).

    Returns:
        ``[low, high]``, or None when no round had a value.
    """
    finite = values[np.isfinite(values)]
    if finite.size == 0:
        return None
    tail = 100.0 * (1.0 - level) / 2.0
    low, high = np.percentile(finite, [tail, 100.0 - tail])
    return [float(low), float(high)]


def summary(mean: float, rounds: np.ndarray, n: int, **extra: Any) -> dict[str, Any]:
    """Entry of ``metrics.json``: the value, its interval and the number of cases behind it.

    Args:
        mean: the metric on the cases as they are.
        rounds: its bootstrap values [R].
        n: number of cases.
        extra: further plain values, such as ``chance`` or ``per_class``.

    Returns:
        ``{"mean", "ci95", "n", ...extra}``; an undefined mean is None.
    """
    return {"mean": float(mean) if np.isfinite(mean) else None, "ci95": interval(rounds), "n": int(n), **extra}
