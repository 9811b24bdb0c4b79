"""Tables of scans kept as slices (CC-CCII form): one row a scan with class, patient, scan and number of slices."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mg3d.errors import DataError
from mg3d.files import read_csv
from mg3d.finetuning.benchmark import Case
from mg3d.finetuning.scan_checks import problem, problem_of
from mg3d.paths import is_plain_name
from mg3d.scans.slice_series import SliceSeries, read_slices

__all__ = ["COLUMNS", "cases_of_list", "check_series", "read_scan_list", "scan_name", "vote_entries"]

COLUMNS = ("zip_file", "target", "label", "patient_id", "scan_id", "n_slice")
_AGAIN = "download the table again"


def scan_name(patient: str, scan: str) -> str:
    """Name of a scan's array and id of its case."""
    return f"p{patient}-s{scan}"


def read_scan_list(path: Path, classes: Sequence[str]) -> dict[str, dict[str, str]]:
    """Scan name -> row.

    Raises:
        DataError: no such table, a column is missing, or a class that does not exist.
    """
    rows = {}
    for line, row in read_csv(path, COLUMNS, whole_rows=True).numbered():
        if not row["target"].isdecimal() or int(row["target"]) >= len(classes) or not row["n_slice"].isdecimal():
            what = f"row {line}: target {row['target']!r} or n_slice {row['n_slice']!r} is wrong"
            raise DataError(what, _AGAIN, path=str(path))
        name = scan_name(row["patient_id"], row["scan_id"])
        if not is_plain_name(name):
            raise DataError(f"row {line}: patient or scan id {name!r} is a path", _AGAIN, path=str(path))
        rows[name] = row
    return rows


def cases_of_list(path: Path, folder: Path, classes: Sequence[str]) -> tuple[list[Case], int]:
    """Cases of a table, and how many rows were left out for want of an array in the folder."""
    rows = read_scan_list(path, classes)
    cases = [
        Case(
            name,
            f"p{row['patient_id']}",
            folder / f"{name}.npy",
            targets=(float(row["target"]),),
            stratum=classes[int(row["target"])],
        )
        for name, row in rows.items()
        if (folder / f"{name}.npy").is_file()
    ]
    return cases, len(rows) - len(cases)


def check_series(
    root: Path, scans: Mapping[str, SliceSeries], rows: Mapping[str, dict[str, str]], *, full: bool
) -> list[str]:
    """Problems of the scans that tables name.

    Args:
        root: folder of the download, for the messages.
        scans: what was found, by name.
        rows: rows of all tables.
        full: also decode every slice of every scan.
    """
    lines = []
    for name, row in sorted(rows.items()):
        count = len(scans[name].slices) if name in scans else 0
        if count != int(row["n_slice"]):
            what = f"{count} slices of {name} ({row['label']}), the table says {row['n_slice']}"
            lines.append(problem(root / row["zip_file"], what, "download the zip file again"))
        elif scans[name].parts[0] != row["label"]:
            what = f"{name} lies under {scans[name].parts[0]}, the table says {row['label']}"
            lines.append(problem(scans[name].container, what, "download the zip file again"))
    return lines + (_unreadable(scans.values()) if full else [])


def _unreadable(scans: Iterable[SliceSeries]) -> list[str]:
    lines = []
    for scan in scans:
        try:
            for _ in read_slices(scan, range(len(scan.slices))):
                pass
        except DataError as error:
            lines.append(problem_of(error))
    return lines


def vote_entries(
    ids: Sequence[str], probs: np.ndarray, targets: np.ndarray, rounds: int, seed: int
) -> dict[str, dict[str, Any]]:
    """Accuracy when the scans of a patient decide together, by mean probability and by majority.

    Args:
        ids: names from `scan_name`.
        probs: [n, C].
        targets: [n, 1] class index, the same for all scans of a patient.
        rounds: bootstrap rounds over patients, 0 for no interval.
        seed: seed of the bootstrap.
    """
    from mg3d.metrics.bootstrap import metric_entries
    from mg3d.metrics.patients import patient_vote

    entries: dict[str, dict[str, Any]] = {}
    for how in ("mean", "majority"):
        vote = patient_vote(probs, targets[:, 0], [name.partition("-")[0] for name in ids], how)
        right, name = (vote.probs.argmax(axis=1) == vote.targets).astype(np.float64), f"patient_accuracy_{how}"
        entries |= metric_entries(_weighted_mean(name, right), vote.patients, rounds, seed)
    return entries


def _weighted_mean(name: str, values: np.ndarray) -> Callable[[np.ndarray], dict[str, np.ndarray]]:
    return lambda weights: {name: weights @ values / weights.sum(axis=1)}
