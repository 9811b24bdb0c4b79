"""The table of a comparison: every start of every benchmark over folds and seeds, and its difference to scratch.

A figure is the mean over the runs (fold, seed). Intervals draw patients, the same ones in both of two compared runs and
in all runs of a start, so that a patient who is in several of them counts once.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mg3d.atomic import write_text_atomically
from mg3d.files import csv_text, read_csv
from mg3d.finetuning.comparison.measures import Measure, Row, headline, measure_rows, row_key
from mg3d.finetuning.comparison.plan import SCRATCH, Task
from mg3d.metrics.bootstrap import metric_entries
from mg3d.metrics.paired import paired_difference

log = logging.getLogger(__name__)

__all__ = ["Line", "collect", "write_tables"]


@dataclasses.dataclass
class Line:
    """One line of the table; undefined numbers are None.

    Attributes:
        benchmark: name.
        encoder: name.
        weights: label of the start.
        metric: figure that is compared.
        runs: finished runs behind it.
        planned: runs that were planned.
        cases: rows of these runs.
        mean: the figure.
        low: lower end of its 95 % interval.
        high: upper end.
        difference: figure minus that of scratch, on the cases and runs that both have.
        difference_low: lower end of its 95 % interval.
        difference_high: upper end.
        p: two-sided bootstrap p-value of the difference.
        protocol: of the runs.
        folders: run folders.
    """

    benchmark: str
    encoder: str
    weights: str
    metric: str = ""
    runs: int = 0
    planned: int = 0
    cases: int = 0
    mean: float | None = None
    low: float | None = None
    high: float | None = None
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None
    p: float | None = None
    protocol: str = ""
    folders: str = ""


@dataclasses.dataclass(frozen=True)
class _Run:
    rows: list[Row]
    metrics: dict[str, Any]
    folder: Path


def collect(plan: Sequence[Task], rounds: int = 1000, metric: str = "") -> list[Line]:
    """Lines of the table from what is finished, scratch first in its group.

    Args:
        plan: the runs.
        rounds: bootstrap rounds.
        metric: figure to compare; empty: the headline figure of each benchmark.
    """
    groups: dict[tuple[str, str], dict[str, list[Task]]] = {}
    for task in plan:
        groups.setdefault((task.benchmark, task.encoder), {}).setdefault(task.label, []).append(task)
    lines = []
    for (benchmark, encoder), starts in groups.items():
        found = {label: _finished(tasks) for label, tasks in starts.items()}
        base = found.get(SCRATCH, {})
        for label, tasks in starts.items():
            line = Line(benchmark, encoder, label, planned=len(tasks), runs=len(found[label]))
            _fill(line, found[label], base if label != SCRATCH else {}, rounds, metric)
            lines.append(line)
    return lines


def _finished(tasks: Sequence[Task]) -> dict[tuple[int, int], _Run]:
    """(fold, seed) -> what the run left."""
    runs = {}
    for task in tasks:
        folder = task.finished()
        if folder is None:
            continue
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        runs[task.fold, task.seed] = _Run(list(read_csv(folder / "per_case.csv").rows), metrics, folder)
    return runs


def _fill(
    line: Line, runs: dict[tuple[int, int], _Run], base: dict[tuple[int, int], _Run], rounds: int, metric: str
) -> None:
    if not runs:
        return
    ordered = [runs[key] for key in sorted(runs)]
    first = ordered[0]
    line.metric = metric or headline(line.benchmark, first.metrics)
    line.protocol = str(first.metrics.get("protocol", ""))
    line.folders = " ".join(str(run.folder) for run in ordered)
    line.cases = sum(len(run.rows) for run in ordered)
    found = _joined([run.rows for run in ordered], line.metric)
    if found is None:  # the rows do not give this figure: its values alone
        values = [run.metrics[line.metric]["mean"] for run in ordered if line.metric in run.metrics]
        known = [value for value in values if value is not None]
        line.mean = float(np.mean(known)) if known else None
        return
    measure, patients = found
    entry = metric_entries(lambda weights: {"": measure(weights)}, patients, rounds)[""]
    line.mean, (line.low, line.high) = entry["mean"], entry["ci95"] or (None, None)
    _compare(line, runs, base, rounds)


def _joined(tables: Sequence[list[Row]], metric: str) -> tuple[Measure, list[str]] | None:
    """Mean of a figure over runs, as a function of the weights of all their rows, and the patients of these rows."""
    measures = [measure_rows(rows, metric) for rows in tables]
    if not measures or any(measure is None for measure in measures):
        return None
    ends = np.cumsum([0, *(len(rows) for rows in tables)])

    def measure(weights: np.ndarray) -> np.ndarray:
        parts = [
            compute(weights[:, start:end])
            for compute, start, end in zip(measures, ends, ends[1:], strict=False)
            if compute is not None
        ]
        return np.asarray(np.mean(parts, axis=0))

    return measure, [row.get("patient") or row["id"] for rows in tables for row in rows]


def _compare(line: Line, runs: dict[tuple[int, int], _Run], base: dict[tuple[int, int], _Run], rounds: int) -> None:
    shared = sorted(set(runs) & set(base))
    mine, theirs = [], []
    for key in shared:
        own, other = ({row_key(row): row for row in run.rows} for run in (runs[key], base[key]))
        common = sorted(set(own) & set(other))
        mine.append([own[name] for name in common])
        theirs.append([other[name] for name in common])
    first, second = _joined(theirs, line.metric), _joined(mine, line.metric)
    if first is None or second is None:
        return
    found = paired_difference(first[0], second[0], first[1], rounds)
    line.difference = found.difference
    line.difference_low, line.difference_high = found.ci95 or (None, None)
    line.p = found.p_bootstrap


def write_tables(lines: Sequence[Line], folder: Path) -> list[Path]:
    """Write ``comparison.csv``, ``comparison.md`` and ``comparison.png``; returns their paths."""
    from mg3d.finetuning.comparison.forest import draw_forest

    folder.mkdir(parents=True, exist_ok=True)
    table, page = folder / "comparison.csv", folder / "comparison.md"
    columns = [field.name for field in dataclasses.fields(Line)]
    write_text_atomically(table, csv_text(columns, map(dataclasses.asdict, lines)))
    write_text_atomically(page, markdown(lines))
    return [table, page, draw_forest(lines, folder / "comparison.png")]


def markdown(lines: Sequence[Line]) -> str:
    """The table for people; intervals are 95 %, over patients."""
    head = ("benchmark", "encoder", "weights", "runs", "figure", "mean [95 % interval]", "difference to scratch", "p")
    rows = [head, tuple("---" for _ in head)]
    for line in lines:
        rows.append(
            (
                line.benchmark,
                line.encoder,
                line.weights,
                f"{line.runs}/{line.planned}",
                line.metric or "-",
                _interval(line.mean, line.low, line.high),
                _interval(line.difference, line.difference_low, line.difference_high, "+"),
                "" if line.p is None else f"{line.p:.3f}",
            )
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def _interval(value: float | None, low: float | None, high: float | None, sign: str = "") -> str:
    if value is None:
        return ""
    text = f"{value:{sign}.3f}"
    return text if low is None or high is None else f"{text} [{low:{sign}.3f}, {high:{sign}.3f}]"
