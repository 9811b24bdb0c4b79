"""What a run would do and cost: counts, reasons against scans, and an estimate from a few scans that are read."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from mg3d.scans.geometry import Geometry
from prepro.disk import ROW_OVERHEAD, estimated_row_bytes
from prepro.engines import Failure
from prepro.engines.base import load_case
from prepro.readers.base import Case, Exclusion, Reader
from prepro.splits import SPLITS

SAMPLED_SCANS = 5
MAX_SHOWN_REASONS = 20


def dry_run(
    reader: Reader, cases: Sequence[Case], exclusions: Iterable[Exclusion], geometry: Geometry, workers: int
) -> dict[str, Any]:
    """Describe a run on standard error without writing anything.

    Args:
        reader: loads the voxels of a case.
        cases: cases with splits.
        exclusions: what is left out.
        geometry: the grid of every row.
        workers: processes to estimate for.

    Returns:
        the figures, for the last line of standard output.
    """
    rows = {split: sum(split in case.splits for case in cases) for split in SPLITS}
    reasons = Counter(item.reason for item in exclusions)
    sample = cases[:: max(1, -(-len(cases) // SAMPLED_SCANS))]
    seconds, row_bytes, failed = _time_sample(reader, sample, compressed=geometry.store == "native")
    row_bytes = row_bytes or estimated_row_bytes(geometry, reader.window)
    scans = sum(rows.values())
    figures = {
        "corpus": reader.corpus,
        "dry_run": True,
        "rows": rows,
        "excluded": reasons.total(),
        "exclusion_reasons": dict(reasons.most_common(MAX_SHOWN_REASONS)),
        "sampled": len(sample),
        "failed": failed,
        "seconds_per_scan": round(seconds, 3),
        "workers": workers,
        "estimated_hours": round(scans * seconds / workers / 3600, 5),
        "estimated_bytes": scans * row_bytes,
    }
    _show(figures)
    return figures


def _time_sample(reader: Reader, sample: Sequence[Case], compressed: bool) -> tuple[float, int, int]:
    """Seconds per scan, bytes per row (0 if no scan could be read) and the number of unreadable scans."""
    started = time.perf_counter()
    results = []
    for case in sample:
        result = load_case(reader, case)
        results.append(0 if isinstance(result, Failure) else _stored_bytes(result.voxels, compressed))
    seconds = (time.perf_counter() - started) / max(1, len(sample))
    sizes = [size for size in results if size]
    return seconds, (sum(sizes) // len(sizes) + ROW_OVERHEAD) if sizes else 0, len(results) - len(sizes)


def _stored_bytes(voxels: np.ndarray, compressed: bool) -> int:
    return pa.compress(np.ascontiguousarray(voxels).data, codec="zstd").size if compressed else voxels.nbytes


def _duration(hours: float) -> str:
    return f"{hours:.3g} h" if hours >= 1 else f"{60 * hours:.2g} min"


def _show(figures: dict[str, Any]) -> None:
    counts = ", ".join(f"{split} {count:,}" for split, count in figures["rows"].items())
    lines = [f"{figures['corpus']}: {counts} rows; {figures['excluded']:,} scans left out"]
    lines += [f"  {count:,} x {reason}" for reason, count in figures["exclusion_reasons"].items()]
    lines.append(
        f"{figures['sampled']} scans read: {figures['seconds_per_scan']:g} s each, {figures['failed']} unreadable"
    )
    lines.append(
        f"about {_duration(figures['estimated_hours'])} with {figures['workers']} workers, "
        f"{figures['estimated_bytes'] / 2**30:.3g} GiB of arrows; nothing was written"
    )
    sys.stderr.write("\n".join(lines) + "\n")
