"""Clinical efficacy: do the findings of a generated report agree with those of the reference?

Works on label arrays of any labeller (the 18 findings of CT-RATE, the 14 of CheXbert); n cases, L findings, R rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mg3d.metrics.bootstrap import bootstrap_weights, summary

CRG_FLOOR = 1.0 / 3.0
"""CRG of reports that name nothing, or everything; only what is worse than that falls below it, to 1/5 at the least."""

PROTOCOL = {
    "ce": "value 1 = present, everything else (absent, blank, uncertain) = not; 0/0 counts 0; macro over all findings",
    "ce_example": "mean over cases; a case without any finding on both sides counts 0",
    "crg": f"CRG (arXiv 2505.17167): {CRG_FLOOR:.3f} when nothing or everything is named, 1 at best",
}


def positives(codes: np.ndarray) -> np.ndarray:
    """Findings that are stated as present.

    Args:
        codes: [n, L]; 0/1 labels, CheXbert classes (0 blank, 1 positive, 2 negative, 3 uncertain) or CheXpert values
            (1, 0, -1, NaN): in all of them 1 alone means present.

    Returns:
        Boolean [n, L].

    Raises:
        ValueError: if the array is not two-dimensional or empty.
    """
    found = np.asarray(codes, dtype=np.float64)
    if found.ndim != 2 or found.size == 0:
        raise ValueError(f"labels must be a filled [cases, findings] array, got shape {found.shape}")
    return found == 1


def clinical_scores(truth: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Precision, recall and F1: macro over findings, micro over all label slots, and as a mean over cases.

    Args:
        truth: codes [n, L] of the references.
        predicted: codes [n, L] of the generated reports.

    Returns:
        ``ce_{precision,recall,f1}_{macro,micro,example}`` and ``ce_num_examples`` (see :data:`PROTOCOL`).

    Raises:
        ValueError: if the shapes differ.
    """
    true, found = _pair(truth, predicted)
    scores = {name: float(values[0]) for name, values in _rounds(true, found, np.ones((1, len(true)))).items()}
    return {name: value for name, value in scores.items() if name != "crg"} | {"ce_num_examples": float(len(true))}


def crg_score(truth: np.ndarray, predicted: np.ndarray) -> float | None:
    """CRG score: found and missed findings weigh (T - A) / 2A, false ones 1, with A findings in T label slots.

    Args:
        truth: codes [n, L].
        predicted: codes [n, L].

    Returns:
        A value in [1/5, 1], :data:`CRG_FLOOR` without any skill; None when the references hold no finding or nothing
        else.
    """
    true, found = _pair(truth, predicted)
    value = float(_rounds(true, found, np.ones((1, len(true))))["crg"][0])
    return value if np.isfinite(value) else None


def finding_table(truth: np.ndarray, predicted: np.ndarray, names: Sequence[str]) -> list[dict[str, Any]]:
    """Precision, recall, F1 and support of each finding.

    Args:
        truth: codes [n, L].
        predicted: codes [n, L].
        names: L names.

    Returns:
        One row per finding: ``label``, ``precision``, ``recall``, ``f1``, ``support`` (cases with it) and
        ``predicted``.
    """
    true, found = _pair(truth, predicted)
    hit, wrong, missed = _counts(true, found, np.ones((1, len(true))))
    columns = [values[0] for values in _prf(hit, wrong, missed)]
    rows = zip(names, *columns, true.sum(axis=0), found.sum(axis=0), strict=True)
    keys = ("label", "precision", "recall", "f1", "support", "predicted")
    return [dict(zip(keys, (row[0], *map(float, row[1:4]), int(row[4]), int(row[5])), strict=True)) for row in rows]


def clinical_entries(
    truth: np.ndarray,
    predicted: np.ndarray,
    names: Sequence[str],
    *,
    rounds: int = 1000,
    groups: Sequence[str] | None = None,
    seed: int = 0,
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Entries of ``metrics.json`` with bootstrap intervals over patients, and notes.

    Args:
        truth: codes [n, L].
        predicted: codes [n, L].
        names: L names of the findings.
        rounds: bootstrap rounds R, at least 1.
        groups: patient of each case; each case its own when None.
        seed: seed of the bootstrap.

    Returns:
        metric -> mean, ci95, n (``ce_f1_macro`` with ``per_class``, ``crg`` with ``floor``, and
        ``ce_f1_macro_present``, the mean over findings that occur in the references); and notes.
    """
    true, found = _pair(truth, predicted)
    weights = bootstrap_weights(list(groups or [str(case) for case in range(len(true))]), rounds, seed)
    point, drawn = _rounds(true, found, np.ones((1, len(true)))), _rounds(true, found, weights)
    for scores, case_weights in ((point, np.ones((1, len(true)))), (drawn, weights)):
        scores["ce_f1_macro_present"] = _macro_of_present(true, found, case_weights)
    entries = {name: summary(scores[0], drawn[name], len(true)) for name, scores in point.items()}
    entries["crg"]["floor"] = CRG_FLOOR
    entries["ce_f1_macro"]["per_class"] = {row["label"]: row["f1"] for row in finding_table(truth, predicted, names)}
    return entries, _notes(true, names)


def _macro_of_present(true: np.ndarray, found: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Mean F1 [R] over the findings that the references hold at all; NaN when they hold none."""
    kept = true.any(axis=0)
    if not kept.any():
        return np.full(len(weights), np.nan)
    return _prf(*_counts(true[:, kept], found[:, kept], weights))[2].mean(axis=1)


def _notes(true: np.ndarray, names: Sequence[str]) -> list[str]:
    absent = [name for name, support in zip(names, true.sum(axis=0), strict=True) if support == 0]
    notes = []
    if absent and len(absent) < len(names):
        notes.append(f"{len(absent)} findings in no reference count F1 0 in the macro mean: {', '.join(absent)}")
    if len(absent) == len(names):
        notes.append("no reference holds any finding: recall and F1 are 0 by definition and CRG is undefined")
    return notes


def _pair(truth: np.ndarray, predicted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    true, found = positives(truth), positives(predicted)
    if true.shape != found.shape:
        raise ValueError(f"labels of the references {true.shape} and of the generated reports {found.shape} differ")
    return true, found


def _counts(true: np.ndarray, found: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Right, wrong and missed findings [R, L] under case weights [R, n]."""
    return weights @ (true & found), weights @ (~true & found), weights @ (true & ~found)


def _prf(hit: np.ndarray, wrong: np.ndarray, missed: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Precision, recall and F1, 0/0 as 0."""
    return (
        _ratio(hit, hit + wrong),
        _ratio(hit, hit + missed),
        _ratio(hit, hit + 0.5 * (wrong + missed)),
    )


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.where(whole > 0, part / np.where(whole > 0, whole, 1.0), 0.0)


def _rounds(true: np.ndarray, found: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Every score [R] under case weights [R, n]."""
    by_finding = _counts(true, found, weights)
    by_slot = tuple(count.sum(axis=1) for count in by_finding)
    by_case = _prf((true & found).sum(1), (~true & found).sum(1), (true & ~found).sum(1))
    scores = {}
    kinds = zip(("precision", "recall", "f1"), _prf(*by_finding), _prf(*by_slot), by_case, strict=True)
    for kind, macro, micro, example in kinds:
        scores[f"ce_{kind}_macro"] = macro.mean(axis=1)
        scores[f"ce_{kind}_micro"] = micro
        scores[f"ce_{kind}_example"] = weights @ example / weights.sum(axis=1)
    hit, wrong, missed = by_slot
    return scores | {"crg": _crg(hit, wrong, missed, weights.sum(axis=1) * true.shape[1])}


def _crg(hit: np.ndarray, wrong: np.ndarray, missed: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """CRG [R]; NaN where the references hold no finding, or nothing but findings."""
    findings = hit + missed
    weight = (slots - findings) / np.where(findings > 0, 2 * findings, 1.0)
    best = findings * weight
    score = weight * (hit - missed) - wrong
    return np.where(best > 0, best / np.where(best > 0, 2 * best - score, 1.0), np.nan)
