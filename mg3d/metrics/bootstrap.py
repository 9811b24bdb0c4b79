"""Bootstrap over patients, expressed as case weights so that every metric is computed in one matrix product."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


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
    if len(groups) == 0 or rounds < 1:
        raise ValueError(f"a bootstrap needs cases and rounds, got {len(groups)} cases and {rounds} rounds")
    _, patient_of_case = np.unique(np.asarray(groups), return_inverse=True)
    patients = int(patient_of_case.max()) + 1
    counts = np.random.default_rng(seed).multinomial(patients, np.full(patients, 1.0 / patients), size=rounds)
    return counts[:, patient_of_case].astype(np.float64)


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
