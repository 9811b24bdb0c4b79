"""What a metadata table says about scans whose own header is not enough, such as the first release of CT-RATE.

Columns: ``VolumeName``, ``RescaleSlope``, ``RescaleIntercept``, and optionally ``XYSpacing`` (one number or a pair) and
``ZSpacing``, in mm.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mg3d.files import read_csv
from mg3d.scans.read import SCAN_SUFFIXES

NEEDED = ("VolumeName", "RescaleSlope", "RescaleIntercept")
SPACING = ("XYSpacing", "ZSpacing")

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class TableRow:
    """One scan of the table.

    Attributes:
        rescale: slope and intercept to HU, None where the table has none.
        spacing_mm: (z, y, x), None where the table has none.
    """

    rescale: tuple[float, float] | None = None
    spacing_mm: Triple | None = None


def read_scan_table(paths: Iterable[str | Path], encoding: str = "") -> dict[str, TableRow]:
    """Read metadata tables.

    Args:
        paths: CSV files with the columns above.
        encoding: of files that are not UTF-8, see :func:`mg3d.files.decode_text`.

    Returns:
        name of the scan without its ending -> row.

    Raises:
        DataError: a file is missing, is no CSV, or lacks a column.
    """
    rows: dict[str, TableRow] = {}
    for path in map(Path, paths):
        for entry in read_csv(path, NEEDED, encoding=encoding).rows:
            rows[scan_name(entry["VolumeName"])] = _row(entry)
    return rows


def scan_name(file_name: str) -> str:
    """Name of a scan file without folders and ending."""
    name = Path(file_name).name
    ending = next((suffix for suffix in SCAN_SUFFIXES if name.lower().endswith(suffix)), "")
    return name[: len(name) - len(ending)]


def _row(entry: Mapping[str, str | None]) -> TableRow:
    scale = _numbers(entry.get("RescaleSlope"), entry.get("RescaleIntercept"))
    in_plane, between = _numbers(entry.get("XYSpacing")), _numbers(entry.get("ZSpacing"))
    rescale = (scale[0], scale[1]) if len(scale) == 2 and scale[0] else None
    known = len(between) == 1 and len(in_plane) in (1, 2) and min(*between, *in_plane) > 0
    return TableRow(rescale, (between[0], in_plane[-1], in_plane[0]) if known else None)


def _numbers(*cells: str | None) -> list[float]:
    """Finite numbers of some cells, a pair written with brackets and comma included; empty if one is none."""
    try:
        found = [float(part) for cell in cells for part in (cell or "").strip("[]() ").replace(",", " ").split()]
    except ValueError:
        return []
    return found if all(map(math.isfinite, found)) else []
