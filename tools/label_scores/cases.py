"""Score pairs of label maps: one pair, or two folders whose files are matched by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mg3d.errors import DataError
from mg3d.metrics.segmentation import mean_score, metric_names, score_label_maps
from mg3d.scans.read import SCAN_SUFFIXES
from tools.label_scores.grids import OTHER_SUFFIXES, on_grid_of, read_label_map

Scores = dict[str, dict[str, float]]
BOOTSTRAP_ROUNDS = 1000


@dataclass(frozen=True)
class Settings:
    """How maps are scored.

    Attributes:
        labels: label -> class name; None scores every label above 0 that either map holds, under its number.
        definition: ``deepmind`` or ``monai``.
        tolerances_mm: tolerances of the surface Dice.
    """

    labels: Mapping[int, str] | None
    definition: str
    tolerances_mm: tuple[float, ...]


def score_pair(truth_path: Path, pred_path: Path, settings: Settings) -> Scores:
    """Score one prediction.

    Args:
        truth_path: label map of the truth.
        pred_path: label map to judge.
        settings: classes and definition.

    Returns:
        class -> metric -> value.

    Raises:
        DataError: a map cannot be read, the grids differ, or there is no label to score.
    """
    truth = read_label_map(truth_path)
    pred = on_grid_of(read_label_map(pred_path), truth)
    labels = settings.labels
    if labels is None:
        found = np.union1d(np.unique(truth.labels_xyz), np.unique(pred.labels_xyz))
        labels = {int(label): str(label) for label in found if label > 0}
    if not labels:
        raise DataError("neither map holds a label above 0", "name the classes with --labels", path=str(truth_path))
    return score_label_maps(
        truth.labels_xyz,
        pred.labels_xyz,
        truth.spacing_mm,
        labels,
        definition=settings.definition,
        tolerances_mm=settings.tolerances_mm,
    )


def case_name(path: Path) -> str:
    """Name of a file without the ending of its format."""
    endings = sorted((*SCAN_SUFFIXES, *OTHER_SUFFIXES), key=len, reverse=True)
    ending = next((each for each in endings if path.name.lower().endswith(each)), "")
    return path.name[: len(path.name) - len(ending)]


def match_folders(truth: Path, pred: Path) -> tuple[dict[str, tuple[Path, Path]], list[str]]:
    """Pair the files of two folders that have the same name up to the format.

    Args:
        truth: folder of the truth; every map in it is a case.
        pred: folder of predictions; further maps in it are left alone.

    Returns:
        case -> (truth, prediction), and the cases without a prediction.

    Raises:
        DataError: no label map in the truth, no pair at all, or two files of one case.
    """
    truths, preds = _maps(truth), _maps(pred)
    pairs = {case: (path, preds[case]) for case, path in truths.items() if case in preds}
    if not pairs:
        names = f"{', '.join(list(truths)[:3]) or 'nothing'} against {', '.join(list(preds)[:3]) or 'nothing'}"
        raise DataError(f"no file name occurs in both folders ({names} ...)", "name both alike", path=str(pred))
    return pairs, sorted(set(truths) - set(pairs))


def _maps(folder: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        case = case_name(path)
        if path.name.startswith(".") or not path.is_file() or case == path.name:
            continue
        if case in found:
            raise DataError(f"two files for case {case}: also {found[case].name}", "keep one", path=str(path))
        found[case] = path
    return found


def rows_of(case: str, scores: Scores) -> list[dict[str, Any]]:
    """Rows of ``per_case.csv``: one per class."""
    return [{"id": case, "class": name, **values} for name, values in scores.items()]


def summarise(rows: Sequence[Mapping[str, Any]], tolerances_mm: Sequence[float]) -> dict[str, dict[str, Any]]:
    """Mean and interval of every metric of every class over cases; a file is taken for a patient.

    Args:
        rows: rows of :func:`rows_of`.
        tolerances_mm: tolerances of the surface Dice.

    Returns:
        class -> metric -> ``{"mean", "ci95", "n", "undefined", "infinite"}``.
    """
    classes = dict.fromkeys(row["class"] for row in rows)
    return {
        name: {
            metric: mean_score(
                [row[metric] for row in rows if row["class"] == name],
                [row["id"] for row in rows if row["class"] == name],
                BOOTSTRAP_ROUNDS,
            )
            for metric in metric_names(tolerances_mm)
        }
        for name in classes
    }


def table_text(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns of text, the first to the left and the others to the right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    )
