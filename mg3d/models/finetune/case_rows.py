"""One dictionary a case: what classification writes to ``per_case.csv``, and back to arrays for the metrics.

Columns: ``id``, ``patient``, the tags, ``target`` (``target_<output>`` with several binary outputs) and
``prob_<output>`` for every output. n cases, T targets, K outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from mg3d.models.distributed import is_distributed

if TYPE_CHECKING:
    from mg3d.finetuning.benchmark import ClassificationTask

__all__ = ["case_row", "gather_rows", "probability_columns", "rows_to_arrays", "target_columns"]


def target_columns(task: ClassificationTask) -> list[str]:
    """Names of the T target columns: one class index, or 0/1 (-1 unknown) for every binary output."""
    if task.kind == "multiclass" or len(task.outputs) == 1:
        return ["target"]
    return [f"target_{name}" for name in task.outputs]


def probability_columns(task: ClassificationTask) -> list[str]:
    """Names of the K probability columns."""
    return [f"prob_{name}" for name in task.outputs]


def case_row(
    task: ClassificationTask,
    case_id: str,
    patient: str,
    tags: Mapping[str, str],
    targets: Sequence[float],
    probabilities: Sequence[float],
) -> dict[str, Any]:
    """Row of a case.

    Args:
        task: names the outputs.
        case_id: the case.
        patient: its patient.
        tags: its sub-groups.
        targets: [T] class index, or 0/1/-1 for every binary output.
        probabilities: [K].
    """
    named = zip(target_columns(task), (int(value) for value in targets), strict=True)
    scored = zip(probability_columns(task), (float(value) for value in probabilities), strict=True)
    return {**tags, "id": case_id, "patient": patient, **dict(named), **dict(scored)}


def rows_to_arrays(
    rows: Sequence[Mapping[str, Any]], task: ClassificationTask
) -> tuple[list[str], list[str], np.ndarray, np.ndarray]:
    """Ids, patients, probabilities [n, K] and targets [n, T] of rows."""
    probabilities = np.asarray([[row[name] for name in probability_columns(task)] for row in rows], dtype=np.float64)
    targets = np.asarray([[row[name] for name in target_columns(task)] for row in rows], dtype=np.int64)
    width = len(task.outputs)
    ids, patients = [str(row["id"]) for row in rows], [str(row["patient"]) for row in rows]
    return ids, patients, probabilities.reshape(len(rows), width), targets.reshape(len(rows), -1)


def gather_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of all processes, one for each id (and ``class``), sorted by id; the same on every process (collective)."""
    parts: list[Any] = [list(rows)]
    if is_distributed():
        parts = [None] * dist.get_world_size()
        dist.all_gather_object(parts, list(rows))
    found = {(row["id"], row.get("class")): dict(row) for part in parts for row in part}
    return sorted(found.values(), key=lambda row: row["id"])


def rows_of_batch(task: ClassificationTask, batch: Mapping[str, Any], probs_BK: torch.Tensor) -> list[dict[str, Any]]:
    """Rows of a batch of the classification data module."""
    targets = batch["target"].reshape(len(probs_BK), len(target_columns(task))).tolist()
    people = zip(batch["id"], batch["patient"], batch["tags"], targets, probs_BK.tolist(), strict=True)
    return [case_row(task, *values) for values in people]
