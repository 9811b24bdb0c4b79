"""Figures of generated reports for ``metrics.json``: wording against both references, and planted or labelled findings.

n cases, L findings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mg3d.finetuning.names import CONSTANT
from mg3d.finetuning.report_baseline import best_constant, stated_table
from mg3d.metrics.captioning import PROTOCOL, score_captions
from mg3d.metrics.captioning_text import PRETOKENISED
from mg3d.metrics.clinical import PROTOCOL as CLINICAL_PROTOCOL
from mg3d.metrics.clinical import clinical_entries, clinical_scores

if TYPE_CHECKING:
    from mg3d.finetuning.benchmark import ReportTask
    from mg3d.finetuning.config import FinetuneConfig

__all__ = ["REFERENCES", "best_constant", "definitions", "finding_table", "score_reports"]

REFERENCES = {"full": "reference", "reference": "reference_published"}
"""Protocol of the references -> column of the case rows."""


def score_reports(
    rows: Sequence[Mapping[str, Any]], task: ReportTask, cfg: FinetuneConfig
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Score the case rows of a run.

    Args:
        rows: of `ReportGenerationModule.case_rows`; each receives its own scores against the run's own references.
        task: its ``findings`` reads what a report states, where there is such a reader.
        cfg: protocol, bootstrap rounds, seed; ``extra["meteor"]``.

    Returns:
        metric -> mean, ci95, n: ``full/<metric>`` against whole cleaned references, ``reference/<metric>`` against
        those that passed through vocabulary and length limit as published (D61), the run's own protocol again without
        prefix, clinical figures and the best constant report's beside them; and notes.
    """
    hypotheses = [str(row["hypothesis"]) for row in rows]
    patients = [str(row["patient"]) for row in rows]
    entries: dict[str, dict[str, Any]] = {}
    notes: list[str] = []
    own = "full" if cfg.protocol == "clean" else "reference"
    for name, column in REFERENCES.items():
        scores = score_captions(
            [str(row[column]) for row in rows],
            hypotheses,
            ids=[str(row["id"]) for row in rows],
            pretokenised=True,
            meteor=cfg.extra.get("meteor", "auto") if name == own else "none",
            rounds=cfg.bootstrap_rounds,
            groups=patients,
            seed=cfg.seed,
        )
        found = {key: value for key, value in scores.entries().items() if name == own or "meteor" not in key}
        entries |= {f"{name}/{key}": value for key, value in found.items()}
        if name == own:
            entries |= found
            for number, row in enumerate(rows):
                if isinstance(row, dict):
                    row |= {key: float(column[number]) for key, column in scores.per_case.items()}
            notes += [*scores.notes, f"references: {own}; {scores.protocol['text']}"]
    if task.findings is not None:
        truth, stated = (finding_table(rows, task, column) for column in ("reference", "hypothesis"))
        clinical, more = clinical_entries(
            truth, stated, task.finding_names, rounds=cfg.bootstrap_rounds, groups=patients, seed=cfg.seed
        )
        constant = clinical_scores(truth, np.tile(best_constant(truth), (len(truth), 1)))["ce_f1_micro"]
        entries |= clinical | {f"{CONSTANT}/ce_f1_micro": {"mean": constant, "ci95": None, "n": len(rows)}}
        reader = getattr(task.findings, "__name__", "a reader")
        notes += [*more, f"findings of both texts are read by {reader}"]
    return entries, notes


def definitions(cfg: FinetuneConfig, task: ReportTask) -> dict[str, str]:
    """What each number of a run means, for a reader of ``metrics.json``."""
    own = "whole, cleaned" if cfg.protocol == "clean" else "through the vocabulary and the length limit"
    found = {"references": own, "text": PRETOKENISED, **PROTOCOL}
    found["ci95"] = f"percentile bootstrap over patients, {cfg.bootstrap_rounds} rounds, seed {cfg.seed}"
    return found if task.findings is None else found | CLINICAL_PROTOCOL


def finding_table(rows: Sequence[Mapping[str, Any]], task: ReportTask, column: str) -> np.ndarray:
    """Findings that the texts of a column state, 0 or 1, [n, L]."""
    return stated_table([str(row[column]) for row in rows], task.findings, task.finding_names)
