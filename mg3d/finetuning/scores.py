"""From the rows of ``per_case.csv`` to the entries of ``metrics.json``, with intervals over patients.

Rows of a segmentation have one line a case and class, those of a classification one line a case. Every figure is given
for all cases, and as ``figure/tag=value`` for every sub-group that the cases are tagged with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from mg3d.finetuning.benchmark import ClassificationTask, ReportTask, SegmentationTask, Task, VocabularyTask
from mg3d.metrics.bootstrap import metric_entries
from mg3d.metrics.classification import multiclass_report, weighted_binary, weighted_multiclass
from mg3d.models.finetune.case_rows import rows_to_arrays

if TYPE_CHECKING:
    from mg3d.finetuning.config import FinetuneConfig

__all__ = ["METRICS_NOT_SCORED", "score_rows"]

Row = Mapping[str, Any]
METRICS_NOT_SCORED = ("volume_ml", "truth_volume_ml")
"""Numbers of a segmentation row that describe the case."""

OWN_METRIC_ROUNDS = 200
OWN_METRIC_WORK = 2_000_000
"""Most cases x rounds for a benchmark's own figures, which are computed draw by draw."""


def score_rows(
    rows: Sequence[Row], task: Task, cfg: FinetuneConfig, arrays: Mapping[str, Any] | None = None
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Entries of ``metrics.json``.

    Args:
        rows: of the reported cases, as in ``per_case.csv``.
        task: what was predicted.
        cfg: reads ``bootstrap_rounds``, ``seed`` and, for reports, the protocol.
        arrays: what a module leaves besides its rows (``case_arrays``).

    Returns:
        ``{metric: {"mean", "ci95", "n", "per_class"?}}``, where an undefined mean is None; and remarks on them.
    """
    if not rows:
        return {}, []
    if isinstance(task, ReportTask):
        from mg3d.finetuning.report_scores import score_reports

        return score_reports(rows, task, cfg)
    if isinstance(task, VocabularyTask):
        from mg3d.finetuning.vocabulary_scores import score_vocabulary

        return score_vocabulary(rows, arrays or {}, task, cfg)
    score: Callable[[Sequence[Row]], dict[str, dict[str, Any]]]
    if isinstance(task, SegmentationTask):
        score = partial(_segmentation, classes=task.classes, rounds=cfg.bootstrap_rounds, seed=cfg.seed)
    else:
        score = partial(_classification, task=task, rounds=cfg.bootstrap_rounds, seed=cfg.seed)
    found = score(rows)
    for tag, value in _subgroups(rows):
        part = score([row for row in rows if row.get(tag) == value])
        found |= {f"{name}/{tag}={value}": entry for name, entry in part.items() if "mean" in entry}
    return found, [] if isinstance(task, SegmentationTask) else _remarks(rows, task)


def _remarks(rows: Sequence[Row], task: ClassificationTask) -> list[str]:
    """How many binary outputs the means are over, where some have no figure."""
    if task.kind == "multiclass":
        return []
    _, _, probabilities, targets = rows_to_arrays(rows, task)
    left_out = [task.outputs[k] for k in _unscored(probabilities, targets)]
    if not left_out:
        return []
    scored = len(task.outputs) - len(left_out)
    return [
        f"means over {scored} of {len(task.outputs)} outputs; without probabilities or positives: {', '.join(left_out)}"
    ]


def _subgroups(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """(tag, value) of every sub-group that is not all cases; a tag of many values describes cases, not groups."""
    fixed = ("id", "patient", "class", "reference", "reference_published", "hypothesis")
    tags = [name for name, value in rows[0].items() if isinstance(value, str) and name not in fixed]
    cases = len({row["id"] for row in rows})
    found = []
    for tag in tags:
        values = sorted({str(row.get(tag, "")) for row in rows})
        if 1 < len(values) <= max(2, cases // 2):
            found += [(tag, value) for value in values if value]
    return found


def _segmentation(rows: Sequence[Row], *, classes: Sequence[str], rounds: int, seed: int) -> dict[str, dict[str, Any]]:
    """Mean over the classes of each class's mean over the cases where the figure is finite."""
    numbers = [name for name, value in rows[0].items() if isinstance(value, int | float)]
    names = [name for name in numbers if name not in METRICS_NOT_SCORED]
    ids = sorted({str(row["id"]) for row in rows})
    place = {case_id: index for index, case_id in enumerate(ids)}
    patient = {str(row["id"]): str(row["patient"]) for row in rows}
    values = {name: np.full((len(ids), len(classes)), np.nan) for name in names}
    for row in rows:
        for name in names:
            values[name][place[str(row["id"])], classes.index(row["class"])] = float(row.get(name, np.nan))
    groups = [patient[case_id] for case_id in ids]
    return {name: _over_classes(table, classes, groups, rounds, seed) for name, table in values.items()}


def _over_classes(
    table: np.ndarray, classes: Sequence[str], groups: Sequence[str], rounds: int, seed: int
) -> dict[str, Any]:
    """Entry of one figure from its table [cases, classes]."""
    known = np.isfinite(table)
    filled = np.where(known, table, 0.0)

    def measure(weights: np.ndarray) -> dict[str, np.ndarray]:
        total, count = weights @ filled, weights @ known
        means = np.where(count > 0, total / np.where(count > 0, count, 1.0), np.nan)
        defined = np.isfinite(means)
        whole = np.where(defined, means, 0.0).sum(1) / np.maximum(defined.sum(1), 1)
        overall = np.where(defined.any(1), whole, np.nan)
        return {"": overall, **{name: means[:, k] for k, name in enumerate(classes)}}

    entries = metric_entries(measure, groups, rounds, seed)
    per_class = {name: {**entries[name], "n": int(known[:, k].sum())} for k, name in enumerate(classes)}
    return {**entries[""], "n": int(known.any(axis=1).sum()), "per_class": per_class}


def _classification(
    rows: Sequence[Row], *, task: ClassificationTask, rounds: int, seed: int
) -> dict[str, dict[str, Any]]:
    ids, patients, probabilities, targets = rows_to_arrays(rows, task)
    if task.kind == "multiclass":
        measure = partial(weighted_multiclass, probabilities, targets[:, 0], names=task.outputs)
        found = _nested(metric_entries(measure, patients, rounds, seed))
        report = multiclass_report(probabilities, targets[:, 0], task.outputs)
        found["confusion"] = {"counts": report["confusion"], "classes": list(task.outputs)}
    else:
        found = _nested(metric_entries(partial(_binary, probabilities, targets, task.outputs), patients, rounds, seed))
    if task.metrics is not None:
        found |= _own_metrics(task, ids, patients, probabilities, targets, rounds, seed)
    if task.entries is not None:
        found |= task.entries(list(ids), probabilities, targets, rounds, seed)
    return found


def _binary(probs: np.ndarray, targets: np.ndarray, outputs: Sequence[str], weights: np.ndarray) -> dict[str, Any]:
    """Figures of every output, and their means over the outputs where they are defined.

    Of several outputs one that has no probability, or no positive case, has no figure.
    """
    each: list[dict[str, np.ndarray]] = [{}] * len(outputs)
    unscored = _unscored(probs, targets)
    for k in set(range(len(outputs))) - set(unscored):
        each[k] = weighted_binary(probs[:, k], targets[:, k], weights)
    nothing = weighted_binary(np.zeros(0), np.zeros(0), np.zeros((len(weights), 0)))
    for k in unscored:
        each[k] = {name: np.full(len(weights), np.nan) for name in nothing}
    found: dict[str, np.ndarray] = {}
    for name in each[0]:
        stacked = np.stack([scores[name] for scores in each], axis=1)
        defined = np.isfinite(stacked)
        total = np.where(defined, stacked, 0.0).sum(1)
        found[name] = np.where(defined.any(1), total / np.maximum(defined.sum(1), 1), np.nan)
        if len(outputs) > 1:
            found |= {f"{name}/{output}": stacked[:, k] for k, output in enumerate(outputs)}
    return found


def _unscored(probs: np.ndarray, targets: np.ndarray) -> list[int]:
    """Of several binary outputs those without probabilities or without positive cases."""
    if probs.shape[1] == 1:
        return []
    return [int(k) for k in np.flatnonzero(np.isnan(probs).all(axis=0) | ~(targets == 1).any(axis=0))]


def _nested(entries: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """``figure/CLASS`` becomes an item of ``per_class``; a figure that only classes have keeps its mean over them."""
    found: dict[str, dict[str, Any]] = {name: dict(entry) for name, entry in entries.items() if "/" not in name}
    for name, entry in entries.items():
        figure, _, label = name.partition("/")
        if label:
            whole = found.setdefault(figure, {"mean": None, "ci95": None, "n": entry["n"]})
            whole.setdefault("per_class", {})[label] = entry
    mean_of = {name: f"macro_{name}" for name in found} | {"recall": "balanced_accuracy"}
    for name in [name for name in found if name not in entries and mean_of[name] in entries]:
        found[mean_of[name]]["per_class"] = found.pop(name)["per_class"]
    return found


def _own_metrics(
    task: ClassificationTask,
    ids: Sequence[str],
    patients: Sequence[str],
    probabilities: np.ndarray,
    targets: np.ndarray,
    rounds: int,
    seed: int,
) -> dict[str, dict[str, Any]]:
    """The benchmark's own figures; their intervals redraw the cases, in fewer rounds where there are many."""
    compute = task.metrics
    if compute is None:
        return {}

    def measure(weights: np.ndarray) -> dict[str, np.ndarray]:
        drawn = []
        for row in weights:
            index = np.repeat(np.arange(len(ids)), row.astype(int))
            drawn.append(dict(compute([ids[k] for k in index.tolist()], probabilities[index], targets[index])))
        return {name: np.asarray([values.get(name, np.nan) for values in drawn], dtype=float) for name in drawn[0]}

    affordable = min(rounds, OWN_METRIC_ROUNDS, OWN_METRIC_WORK // max(len(ids), 1))
    return metric_entries(measure, patients, affordable, seed)
