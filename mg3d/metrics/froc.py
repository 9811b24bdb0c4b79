"""Free-response ROC of nodule candidates, after the rules of the LUNA16 challenge.

* A candidate hits a nodule when it lies closer to its centre than half its diameter.
* A nodule is found with the highest score among the candidates that hit it; the others of these count as nothing.
* A candidate that hits no nodule but an excluded finding (too small, marked by few readers) counts as nothing.
* Every other candidate is a false positive; a nodule without a candidate stays missed at every threshold.
* Sensitivity at a rate of false positives per scan is read off the curve with linear interpolation; the competition
  performance metric (CPM) is its mean over the seven rates.

Scans without candidates or nodules count in the number of scans, so all scans must be named.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mg3d.metrics.bootstrap import bootstrap_values, interval

LUNA16_RATES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)


@dataclass(frozen=True)
class Findings:
    """Marked findings in world coordinates.

    Attributes:
        scan: [m] scan of each finding.
        centre_mm: [m, 3].
        diameter_mm: [m], above 0.
    """

    scan: Sequence[str]
    centre_mm: np.ndarray
    diameter_mm: np.ndarray


@dataclass(frozen=True)
class Candidates:
    """Proposed places with a score.

    Attributes:
        scan: [n] scan of each candidate.
        position_mm: [n, 3] in the frame of the findings.
        score: [n], higher is more likely a nodule.
    """

    scan: Sequence[str]
    position_mm: np.ndarray
    score: np.ndarray


@dataclass(frozen=True)
class FrocResult:
    """What the curve says and what it was counted from.

    Attributes:
        sensitivity: false positives per scan -> sensitivity in [0, 1].
        cpm: mean of these.
        sensitivity_ci95: the same rates -> interval over scans, None without bootstrap.
        cpm_ci95: interval of the mean.
        fp_per_scan: [G + 1] curve, rising from 0.
        sensitivities: [G + 1] curve.
        scans: number of scans.
        nodules: number of nodules.
        found: nodules that at least one candidate hits.
        false_positives: candidates that hit nothing.
        ignored: candidates that hit an excluded finding alone.
        repeated: further candidates on a nodule already found with a higher score.
    """

    sensitivity: Mapping[float, float]
    cpm: float
    sensitivity_ci95: Mapping[float, list[float] | None]
    cpm_ci95: list[float] | None
    fp_per_scan: np.ndarray
    sensitivities: np.ndarray
    scans: int
    nodules: int
    found: int
    false_positives: int
    ignored: int
    repeated: int

    def entries(self) -> dict[str, dict[str, Any]]:
        """Entries of ``metrics.json``: ``cpm`` and ``froc@RATE``, with intervals over scans."""
        pairs = {"cpm": (self.cpm, self.cpm_ci95)}
        pairs |= {f"froc@{rate:g}": (value, self.sensitivity_ci95[rate]) for rate, value in self.sensitivity.items()}
        return {
            name: {"mean": float(value) if np.isfinite(value) else None, "ci95": ci95, "n": self.scans}
            for name, (value, ci95) in pairs.items()
        }


@dataclass(frozen=True)
class _Events:
    """Scores with what they are, plus nodules that no candidate hits; scans by number."""

    found_score: np.ndarray
    found_scan: np.ndarray
    false_score: np.ndarray
    false_scan: np.ndarray
    nodule_scan: np.ndarray
    ignored: int
    repeated: int


def froc(
    candidates: Candidates,
    nodules: Findings,
    scans: Sequence[str],
    *,
    excluded: Findings | None = None,
    rates: Sequence[float] = LUNA16_RATES,
    rounds: int = 0,
    seed: int = 0,
) -> FrocResult:
    """Sensitivity against false positives per scan.

    Args:
        candidates: what the system proposes, in any order.
        nodules: what it should find.
        scans: every scan that was searched, without repeats.
        excluded: findings that are neither right nor wrong to propose.
        rates: false positives per scan at which to read the curve.
        rounds: bootstrap rounds over scans, 0 for no interval.
        seed: seed of the bootstrap.

    Returns:
        the curve, the sensitivities and the counts; sensitivities are NaN when there is no nodule.

    Raises:
        ValueError: arrays that disagree, scores or places that are not finite, or a scan that is not listed.
    """
    number = {name: index for index, name in enumerate(scans)}
    if not number or len(number) < len(scans):
        raise ValueError(f"the scans must be named once each, got {len(scans)} names, {len(number)} distinct")
    events = _match(candidates, nodules, excluded, number)
    ones = np.ones((1, len(scans)))
    fp_per_scan, sensitivities = _curve(events, ones[0])
    at_rates = _read(events, ones, rates)[0]
    drawn = bootstrap_values(lambda weights: _read(events, weights, rates), scans, rounds, seed) if rounds else None
    return FrocResult(
        sensitivity=dict(zip(rates, map(float, at_rates), strict=True)),
        cpm=float(at_rates.mean()),
        sensitivity_ci95={r: None if drawn is None else interval(drawn[:, k]) for k, r in enumerate(rates)},
        cpm_ci95=None if drawn is None else interval(drawn.mean(axis=1)),
        fp_per_scan=fp_per_scan,
        sensitivities=sensitivities,
        scans=len(scans),
        nodules=len(events.nodule_scan),
        found=len(events.found_score),
        false_positives=len(events.false_score),
        ignored=events.ignored,
        repeated=events.repeated,
    )


def _match(candidates: Candidates, nodules: Findings, excluded: Findings | None, number: Mapping[str, int]) -> _Events:
    scan = _numbers(candidates.scan, number, "candidate")
    place = _places(candidates.position_mm, len(scan), "candidate")
    score = np.asarray(candidates.score, dtype=np.float64)
    if score.shape != scan.shape or not np.isfinite(score).all():
        raise ValueError(f"{len(scan)} candidates need as many finite scores, got shape {score.shape}")
    nodule_scan, hits = _hits(scan, place, nodules, number)
    _, hits_excluded = _hits(scan, place, excluded, number) if excluded is not None else (None, [])
    on_nodule, on_excluded = (np.zeros(len(scan), dtype=bool) for _ in range(2))
    for indices in hits:
        on_nodule[indices] = True
    for indices in hits_excluded:
        on_excluded[indices] = True
    best = [int(indices[np.argmax(score[indices])]) for indices in hits if len(indices)]
    found = np.array([bool(len(indices)) for indices in hits], dtype=bool)
    false = ~on_nodule & ~on_excluded
    return _Events(
        found_score=score[best],
        found_scan=nodule_scan[found],
        false_score=score[false],
        false_scan=scan[false],
        nodule_scan=nodule_scan,
        ignored=int((on_excluded & ~on_nodule).sum()),
        repeated=int(on_nodule.sum()) - len(set(best)),
    )


def _numbers(names: Sequence[str], number: Mapping[str, int], what: str) -> np.ndarray:
    unknown = next((name for name in names if name not in number), None)
    if unknown is not None:
        raise ValueError(f"{what} of scan {unknown!r}, which is not among the {len(number)} scans given")
    return np.array([number[name] for name in names], dtype=np.int64)


def _places(points: np.ndarray, count: int, what: str) -> np.ndarray:
    places = np.asarray(points, dtype=np.float64).reshape(-1, 3)
    if len(places) != count or not np.isfinite(places).all():
        raise ValueError(f"{count} {what}s need as many finite places [n, 3], got {len(places)}")
    return places


def _hits(
    scan: np.ndarray, place: np.ndarray, findings: Findings, number: Mapping[str, int]
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Scan of each finding, and the candidates that lie inside its radius."""
    finding_scan = _numbers(findings.scan, number, "finding")
    centre = _places(findings.centre_mm, len(finding_scan), "finding")
    radius = np.asarray(findings.diameter_mm, dtype=np.float64) / 2.0
    if radius.shape != finding_scan.shape or not (np.isfinite(radius) & (radius > 0)).all():
        raise ValueError(f"{len(finding_scan)} findings need as many diameters above 0 mm")
    order = np.argsort(scan, kind="stable")
    starts = np.searchsorted(scan[order], np.arange(len(number) + 1))
    hits = []
    for index, where in enumerate(finding_scan):
        members = order[starts[where] : starts[where + 1]]
        squared = ((place[members] - centre[index]) ** 2).sum(axis=1)
        hits.append(members[squared < radius[index] ** 2])
    return finding_scan, hits


def _curve(events: _Events, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """False positives per scan and sensitivity at every distinct score, from "nothing proposed" on."""
    score = np.concatenate([events.found_score, events.false_score])
    order = np.argsort(-score, kind="stable")
    found = np.concatenate([weight[events.found_scan], np.zeros(len(events.false_scan))])[order]
    false = np.concatenate([np.zeros(len(events.found_scan)), weight[events.false_scan]])[order]
    last = np.flatnonzero(np.diff(score[order], append=-np.inf))  # the last event of each distinct score
    nodules = weight[events.nodule_scan].sum()
    fp_per_scan = np.concatenate([[0.0], np.cumsum(false)[last]]) / weight.sum()
    hits = np.concatenate([[0.0], np.cumsum(found)[last]])
    return fp_per_scan, hits / nodules if nodules > 0 else np.full(len(hits), np.nan)


def _read(events: _Events, weights: np.ndarray, rates: Sequence[float]) -> np.ndarray:
    """Sensitivity [R, rates] read off the curve of each row of weights."""
    curves = (_curve(events, weight) for weight in weights)
    return np.stack([np.interp(rates, fp_per_scan, sensitivity) for fp_per_scan, sensitivity in curves])
