"""Is run B better than run A on the same cases? Differences with intervals, and the signed-rank test.

Cases of one patient are not independent: intervals draw patients, and the test sees one mean difference per patient.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from mg3d.metrics.bootstrap import bootstrap_values, interval

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Comparison:
    """Difference B - A of one metric on the cases that both runs have.

    Attributes:
        mean_a: metric of A on these cases.
        mean_b: metric of B.
        difference: B - A.
        ci95: bootstrap interval of the difference over patients; None when no round had a value.
        p_bootstrap: two-sided; twice the smaller share of rounds on either side of 0, never 0.
        p_wilcoxon: two-sided signed-rank test over patients' mean differences; NaN for metrics that are no mean over
            cases and when no patient differs.
        n: cases compared.
        patients: patients behind them.
        left_out: cases of either run without a partner or without a finite value in both.
    """

    mean_a: float
    mean_b: float
    difference: float
    ci95: list[float] | None
    p_bootstrap: float
    p_wilcoxon: float
    n: int
    patients: int
    left_out: int = 0

    def entry(self) -> dict[str, Any]:
        """Plain values for JSON; undefined numbers are None."""
        return {
            name: None if isinstance(value, float) and not np.isfinite(value) else value
            for name, value in vars(self).items()
        }


def paired_difference(
    measure_a: Callable[[np.ndarray], np.ndarray],
    measure_b: Callable[[np.ndarray], np.ndarray],
    patients: Sequence[str],
    rounds: int = 2000,
    seed: int = 0,
) -> Comparison:
    """Compare any metric of two runs on the same cases; both see the same draws.

    Args:
        measure_a: case weights [R, n] -> values [R] of run A, for example
            ``lambda weights: weighted_auroc(scores, targets, weights)``.
        measure_b: the same of run B.
        patients: patient of each case, length n.
        rounds: bootstrap rounds.
        seed: seed of the draws.

    Returns:
        the comparison, without a signed-rank test.
    """
    ones = np.ones((1, len(patients)))
    mean_a, mean_b = float(measure_a(ones)[0]), float(measure_b(ones)[0])
    drawn = bootstrap_values(lambda weights: measure_b(weights) - measure_a(weights), patients, rounds, seed)
    return Comparison(
        mean_a,
        mean_b,
        mean_b - mean_a,
        interval(drawn),
        _two_sided(drawn),
        float("nan"),
        len(patients),
        len(set(patients)),
    )


def compare_values(
    values_a: Sequence[float] | np.ndarray,
    values_b: Sequence[float] | np.ndarray,
    patients: Sequence[str],
    rounds: int = 2000,
    seed: int = 0,
) -> Comparison:
    """Compare the per-case values of two runs.

    Args:
        values_a: [n] of run A; NaN and infinite values leave the case out.
        values_b: [n] of run B, in the same order.
        patients: patient of each case.
        rounds: bootstrap rounds.
        seed: seed of the draws.

    Returns:
        the comparison of the means over cases; NaN everywhere when no case has two finite values.

    Raises:
        ValueError: lengths that differ.
    """
    a, b = np.asarray(values_a, dtype=np.float64), np.asarray(values_b, dtype=np.float64)
    if not len(a) == len(b) == len(patients):
        raise ValueError(f"{len(a)} and {len(b)} values and {len(patients)} patients do not agree")
    known = np.isfinite(a) & np.isfinite(b)
    if not known.any():
        nothing = float("nan")
        return Comparison(nothing, nothing, nothing, None, nothing, nothing, 0, 0, len(a))
    members = [patient for patient, used in zip(patients, known, strict=True) if used]
    a, b = a[known], b[known]
    found = paired_difference(_weighted_mean_of(a), _weighted_mean_of(b), members, rounds, seed)
    return Comparison(**vars(found) | {"p_wilcoxon": _signed_rank(b - a, members), "left_out": int((~known).sum())})


def compare_rows(
    rows_a: Rows,
    rows_b: Rows,
    metric: str,
    key: Sequence[str] = ("id", "class"),
    rounds: int = 2000,
    seed: int = 0,
) -> Comparison:
    """Compare two runs' rows of ``per_case.csv``.

    Args:
        rows_a: rows of run A, values as numbers or text; ``patient`` falls back to ``id``.
        rows_b: rows of run B, in any order.
        metric: column to compare, for example ``dice``.
        key: columns that name a case; those that the rows do not have are passed over.
        rounds: bootstrap rounds.
        seed: seed of the draws.

    Returns:
        the comparison over the cases that both runs have.

    Raises:
        ValueError: the column is missing, a case occurs twice, or the runs share no case.
    """
    table_a, table_b = (_by_key(rows, metric, key) for rows in (rows_a, rows_b))
    shared = sorted(set(table_a) & set(table_b), key=repr)
    if not shared:
        raise ValueError(f"the runs share no case: {len(table_a)} and {len(table_b)} cases, named by {', '.join(key)}")
    values = [[table[case][0] for case in shared] for table in (table_a, table_b)]
    found = compare_values(values[0], values[1], [table_a[case][1] for case in shared], rounds, seed)
    alone = len(set(table_a) ^ set(table_b))
    return Comparison(**vars(found) | {"left_out": found.left_out + alone})


def _by_key(rows: Rows, metric: str, key: Sequence[str]) -> dict[Hashable, tuple[float, str]]:
    table: dict[Hashable, tuple[float, str]] = {}
    for row in rows:
        if metric not in row:
            raise ValueError(f"no column {metric!r} among {', '.join(map(str, row))}")
        case = tuple(str(row[column]) for column in key if column in row)
        if case in table:
            raise ValueError(f"case {' '.join(case)} occurs twice: name further columns that tell cases apart")
        text = row[metric]
        table[case] = (float(text) if text not in ("", None) else float("nan"), str(row.get("patient") or row["id"]))
    return table


def _weighted_mean_of(values: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    return lambda weights: weights @ values / weights.sum(axis=1)


def _two_sided(drawn: np.ndarray) -> float:
    finite = drawn[np.isfinite(drawn)]
    if not len(finite):
        return float("nan")
    beyond = min(int((finite <= 0).sum()), int((finite >= 0).sum()))
    return min(2.0 * (beyond + 1) / (len(finite) + 1), 1.0)


def _signed_rank(differences: np.ndarray, patients: Sequence[str]) -> float:
    _, index = np.unique(np.asarray(patients), return_inverse=True)
    means = np.bincount(index, weights=differences) / np.bincount(index)
    if not means.any():
        return float("nan")
    return float(stats.wilcoxon(means).pvalue)
