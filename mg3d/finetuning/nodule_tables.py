"""The tables of LUNA16: candidates, marked nodules, and the free-response ROC of scored candidates."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mg3d.errors import DataError
from mg3d.files import read_csv

if TYPE_CHECKING:
    from mg3d.metrics.froc import Findings, FrocResult

__all__ = ["ScanCandidates", "read_candidates", "read_nodules", "score_candidates", "table_path"]

PLACE = ("seriesuid", "coordX", "coordY", "coordZ")
NO_DIAMETER_MM = 10.0  # of excluded findings without one, as in the challenge's own script


@dataclass(frozen=True)
class ScanCandidates:
    """Candidates of one scan, in the order of ``candidates.csv``.

    Attributes:
        world_mm: [n, 3] places x, y, z in left-posterior-superior millimetres.
        classes: 1 for a nodule, else 0.
    """

    world_mm: np.ndarray
    classes: tuple[int, ...]


def table_path(root: Path, name: str) -> Path:
    """A table lies beside the scans, or in the folder ``CSVFILES`` of the published archive."""
    places = (root / name, root / "CSVFILES" / name)
    return next((place for place in places if place.is_file()), places[0])


def read_candidates(root: Path) -> dict[str, ScanCandidates]:
    """Series uid -> its candidates.

    Raises:
        DataError: no ``candidates.csv``, a column is missing, or a value is no number.
    """
    path = table_path(root, "candidates.csv")
    places: dict[str, list[tuple[float, float, float]]] = {}
    classes: dict[str, list[int]] = {}
    for line, row in read_csv(path, (*PLACE, "class"), whole_rows=True).numbered():
        try:
            places.setdefault(row["seriesuid"], []).append(_xyz(row))
            classes.setdefault(row["seriesuid"], []).append(("0", "1").index(row["class"]))
        except ValueError as error:
            raise DataError(f"row {line}: {error}", "download the table again", path=str(path)) from None
    return {uid: ScanCandidates(np.asarray(places[uid]), tuple(classes[uid])) for uid in places}


def _xyz(row: dict[str, str]) -> tuple[float, float, float]:
    return float(row["coordX"]), float(row["coordY"]), float(row["coordZ"])


def read_nodules(path: Path) -> Findings:
    """Findings of ``annotations.csv`` or ``annotations_excluded.csv``.

    Raises:
        DataError: no such table, a column is missing, or a value is no number.
    """
    from mg3d.metrics.froc import Findings

    rows = read_csv(path, (*PLACE, "diameter_mm"), whole_rows=True).rows
    try:
        places = np.asarray([_xyz(row) for row in rows]).reshape(-1, 3)
        diameters = np.asarray([float(row["diameter_mm"]) for row in rows])
    except ValueError as error:
        raise DataError(str(error), "download the table again", path=str(path)) from None
    return Findings([row["seriesuid"] for row in rows], places, np.where(diameters > 0, diameters, NO_DIAMETER_MM))


def score_candidates(root: Path, ids: Sequence[str], scores: np.ndarray, rounds: int = 0, seed: int = 0) -> FrocResult:
    """Free-response ROC over the scans that the ids belong to.

    ``annotations_excluded.csv`` counts where it is there: what hits only such a finding is neither right nor wrong.

    Args:
        root: folder of the tables.
        ids: ``<seriesuid>_<number of the candidate in its scan>``.
        scores: [n], higher is more likely a nodule.
        rounds: bootstrap rounds over scans, 0 for no interval.
        seed: seed of the bootstrap.
    """
    from mg3d.metrics.froc import Candidates, froc

    candidates = read_candidates(root)
    named = [name.rpartition("_")[::2] for name in ids]
    places = np.asarray([candidates[uid].world_mm[int(row)] for uid, row in named])
    scans = sorted({uid for uid, _ in named})
    excluded = table_path(root, "annotations_excluded.csv")
    return froc(
        Candidates([uid for uid, _ in named], places, scores),
        _of_scans(read_nodules(table_path(root, "annotations.csv")), scans),
        scans,
        excluded=_of_scans(read_nodules(excluded), scans) if excluded.is_file() else None,
        rounds=rounds,
        seed=seed,
    )


def _of_scans(findings: Findings, scans: Collection[str]) -> Findings:
    wanted = set(scans)
    chosen = [index for index, uid in enumerate(findings.scan) if uid in wanted]
    places, diameters = findings.centre_mm[chosen], findings.diameter_mm[chosen]
    return replace(findings, scan=[findings.scan[k] for k in chosen], centre_mm=places, diameter_mm=diameters)
