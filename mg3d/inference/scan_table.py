"""What a metadata table says about scans whose own header is not enough, such as the first release of CT-RATE.

Columns: ``VolumeName``, ``RescaleSlope``, ``RescaleIntercept``, and optionally ``XYSpacing`` (one number or a pair) and
``ZSpacing``, in mm, and the voxels ``NumberofSlices``, ``Rows`` and ``Columns``.
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
COUNTS = ("NumberofSlices", "Rows", "Columns")

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class TableRow:
    """One scan of the table.

    Attributes:
        rescale: slope and intercept to HU, None where the table has none.
        spacing_mm: (z, y, x), NaN where a cell is empty; None where the table has none.
        shape: voxels (z, y, x), None where the table does not count them.
    """

    rescale: tuple[float, float] | None = None
    spacing_mm: Triple | None = None
    shape: tuple[int, int, int] | None = None


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
            rows[scan_name(entry["VolumeName"])] = table_row(entry)
    return rows


def scan_name(file_name: str) -> str:
    """Name of a scan file without folders and ending."""
    name = Path(file_name).name
    ending = next((suffix for suffix in SCAN_SUFFIXES if name.lower().endswith(suffix)), "")
    return name[: len(name) - len(ending)]


def table_row(entry: Mapping[str, str | None]) -> TableRow:
    """Read the cells of one row; what is no usable number counts as absent.

    Args:
        entry: cell by column.
    """
    scale = _numbers(entry.get("RescaleSlope"), entry.get("RescaleIntercept"))
    in_plane, between = ([size for size in _numbers(entry.get(name)) if size > 0] for name in SPACING)
    counts = [int(count) for count in _numbers(*(entry.get(name) for name in COUNTS)) if count > 0]
    rescale = (scale[0], scale[1]) if len(scale) == 2 and scale[0] else None
    x, y = (in_plane[0], in_plane[-1]) if len(in_plane) in (1, 2) else (math.nan, math.nan)
    z = between[0] if len(between) == 1 else math.nan
    spacing = None if math.isnan(x) and math.isnan(z) else (z, y, x)
    return TableRow(rescale, spacing, (counts[0], counts[1], counts[2]) if len(counts) == 3 else None)


def _numbers(*cells: str | None) -> list[float]:
    """Finite numbers of some cells, a pair written with brackets and comma included; empty if one is none."""
    try:
        found = [float(part) for cell in cells for part in (cell or "").strip("[]() ").replace(",", " ").split()]
    except ValueError:
        return []
    return found if all(map(math.isfinite, found)) else []
