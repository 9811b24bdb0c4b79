"""The baselines of a report-generation run, from the run's own label head or from a probe of its features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mg3d.errors import DataError
from mg3d.finetuning.names import LABEL_TO_REPORT
from mg3d.finetuning.report_baseline import (
    DEFAULT_THRESHOLD,
    LEAST_POSITIVES,
    Beside,
    best_threshold,
    probe_probabilities,
    score_beside,
    stated_table,
)
from mg3d.models.finetune.report_generation import LABEL_COLUMN

if TYPE_CHECKING:
    import torch

    from mg3d.finetuning.benchmark import Case, ReportTask
    from mg3d.finetuning.config import FinetuneConfig

__all__ = ["beside_run"]


@dataclass(frozen=True)
class _Predicted:
    """What is known of training and reported cases.

    Attributes:
        findings: L names.
        train: ids of the training cases.
        train_labels: [m, L].
        probabilities: of the reported cases [n, L].
        threshold: chosen on the selection cases.
        notes: where the probabilities come from.
    """

    findings: tuple[str, ...]
    train: list[str]
    train_labels: np.ndarray
    probabilities: np.ndarray
    threshold: float
    notes: list[str]


def beside_run(
    cfg: FinetuneConfig,
    task: ReportTask,
    module: Any,
    data: Any,
    rows: Sequence[dict[str, Any]],
    device: torch.device,
) -> Beside:
    """Score the baselines beside a run, on its own kind of references.

    The label head gives the probabilities where it learned the findings that are read from reports (or where there is
    no reader); otherwise a linear probe on the features of the training cases does.

    Args:
        cfg: protocol, bootstrap rounds, seed; ``extra["meteor"]``.
        task: reports, labels, and the reader of findings.
        module: the trained module (`ReportGenerationModule`).
        data: its data module.
        rows: of the reported cases; each receives the column ``label_to_report`` with that report.
        device: where to compute.

    Returns:
        Entries, notes and texts; only a note where neither labels nor a reader are there.
    """
    if task.findings is None and not _head_learned(task, task.labels):
        return Beside(notes=[f"{LABEL_TO_REPORT}: not computed, there are neither labels nor a reader of findings"])
    try:
        known = _from_head(task, module, data, rows, device) if _uses_head(task) else None
        known = known or _from_probe(cfg, task, module, data, rows, device)
    except DataError as error:
        return Beside(notes=[f"{LABEL_TO_REPORT}: not computed, {error.message}"])
    column = "reference" if cfg.protocol == "clean" else "reference_published"
    found = score_beside(
        [str(row[column]) for row in rows],
        known.probabilities,
        known.findings,
        [task.reports[name] for name in known.train],
        known.train_labels,
        labels=_table_labels(task, data.splits.test, rows) if task.findings is None else None,
        threshold=known.threshold,
        reader=task.findings,
        clean=task.vocabulary.clean if task.vocabulary is not None else None,
        ids=[str(row["id"]) for row in rows],
        patients=[str(row["patient"]) for row in rows],
        pretokenised=True,
        meteor=cfg.extra.get("meteor", "auto"),
        rounds=cfg.bootstrap_rounds,
        seed=cfg.seed,
    )
    found.notes = [*known.notes, *found.notes]
    for row, text in zip(rows, found.texts[LABEL_TO_REPORT], strict=True):
        row[LABEL_TO_REPORT] = text
    return found


def _uses_head(task: ReportTask) -> bool:
    return _head_learned(task, task.labels if task.findings is None else task.finding_names)


def _head_learned(task: ReportTask, findings: Sequence[str]) -> bool:
    return bool(task.label_loss and task.labels) and tuple(task.labels) == tuple(findings)


def _from_head(
    task: ReportTask, module: Any, data: Any, rows: Sequence[Mapping[str, Any]], device: torch.device
) -> _Predicted:
    columns = [LABEL_COLUMN.format(name) for name in task.labels]
    train = list(data.splits.train)
    held = module.look(data, "val", device) if data.splits.val else None
    truth = _targets(data.splits.val, held.ids) if held is not None else None
    threshold = best_threshold(truth, held.labels) if held is not None and truth is not None else DEFAULT_THRESHOLD
    return _Predicted(
        tuple(task.labels),
        [case.id for case in train],
        np.asarray([case.targets for case in train]),
        np.asarray([[row[column] for column in columns] for row in rows], dtype=np.float64),
        threshold,
        [f"{LABEL_TO_REPORT}: probabilities of the run's own label head; {_selection(held, data, truth)}"],
    )


def _from_probe(
    cfg: FinetuneConfig,
    task: ReportTask,
    module: Any,
    data: Any,
    rows: Sequence[Mapping[str, Any]],
    device: torch.device,
) -> _Predicted:
    findings = task.finding_names
    parts = [part for part in ("train", "val", "test") if getattr(data.splits, part)]
    views = {part: module.look(data, part, device) for part in parts}
    labels = {
        part: stated_table([task.reports[name] for name in view.ids], task.findings, findings)
        for part, view in views.items()
    }
    patients = {case.id: case.patient for case in data.splits.train}
    train = views.pop("train")
    groups = [patients[name] for name in train.ids]
    found, rare = probe_probabilities(
        train.features, labels["train"], groups, [view.features for view in views.values()], cfg.seed
    )
    held = dict(zip(views, found, strict=True))
    threshold = best_threshold(labels["val"], held["val"]) if "val" in held else DEFAULT_THRESHOLD
    place = {name: number for number, name in enumerate(views["test"].ids)}
    notes = [f"{LABEL_TO_REPORT}: probabilities of a linear probe on the run's features of {len(train.ids)} cases"]
    notes[0] += f"; {_selection(views.get('val'), data, labels.get('val'))}"
    if rare:
        notes.append(f"{LABEL_TO_REPORT}: never written, too few cases: {', '.join(findings[k] for k in rare)}")
    chosen = held["test"][[place[str(row["id"])] for row in rows]]
    return _Predicted(findings, list(train.ids), labels["train"], chosen, threshold, notes)


def _selection(held: Any, data: Any, labels: np.ndarray | None) -> str:
    if held is None or labels is None or labels.sum() < LEAST_POSITIVES:
        return f"threshold {DEFAULT_THRESHOLD}, as the selection cases hold too few findings to choose one"
    reported = {case.id for case in data.splits.test} & set(held.ids)
    return f"threshold chosen on {len(held.ids)} selection cases" + (" (those reported)" if reported else "")


def _targets(cases: Sequence[Case], ids: Sequence[str]) -> np.ndarray:
    """Labels of the cases with these ids, in this order."""
    targets = {case.id: case.targets for case in cases}
    return np.asarray([targets[name] for name in ids])


def _table_labels(task: ReportTask, cases: Sequence[Case], rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
    return _targets(cases, [str(row["id"]) for row in rows])
