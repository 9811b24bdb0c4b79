"""One packing job: the command line's options become a reader, cases with splits, and a call of the writer."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from mg3d.errors import DataError
from mg3d.scans.geometry import Geometry
from prepro import splits
from prepro.make_arrow import PackOptions, pack
from prepro.readers.base import Reader

MAX_AUTOMATIC_WORKERS = 8
SCANS_WORTH_A_WORKER = 16


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Find the cases, assign splits, check for leakage, pack.

    Args:
        options: parsed command line.

    Returns:
        what the last line of standard output shows.

    Raises:
        MG3DError: bad input, or a run that broke down.
    """
    if not options.root.is_dir():
        raise DataError("folder not found", "give the root of the download", path=str(options.root))
    geometry = make_geometry(options)
    reader = make_reader(options, geometry)
    found = reader.find_cases()
    cases, unused = splits.assign_splits(
        found, reader.corpus, options.split_protocol, options.seed, options.val_fraction
    )
    clean = options.split_protocol == "clean"
    patients = splits.patient_overlaps(cases)
    if clean:
        splits.refuse_overlaps(patients, "patients")
    cases = splits.limit_splits(cases, options.limit)
    recorded = {key: value for key, value in vars(options).items() if key not in ("workers", "image_size", "out")}
    config = {key: str(value) if isinstance(value, Path) else value for key, value in recorded.items()}
    pack_options = PackOptions(
        out=options.out,
        geometry=geometry,
        workers=options.workers or automatic_workers(len(cases)),
        on_bad=options.on_bad,
        clean=clean,
        caption_separator=" " if options.caption_separator == "blank" else "",
        config=config | {"notes": found.notes, "patients_in_two_splits": len(patients)},
    )
    summary = pack(reader, cases, found.exclusions + unused, pack_options)
    counts = {"excluded": summary.excluded, "failed": summary.failed, "warned": summary.warned}
    return {"corpus": reader.corpus, "rows": summary.rows, **counts, "out": str(options.out)}


def make_geometry(options: argparse.Namespace) -> Geometry:
    """Return the grid the options ask for.

    Args:
        options: parsed command line.

    Returns:
        the geometry of every row.

    Raises:
        DataError: ``--target-spacing`` is no spacing.
    """
    size = tuple(options.image_size) if options.image_size else Geometry.size
    spacing = Geometry.target_spacing_mm
    if options.target_spacing:
        spacing = _target_spacing(options.target_spacing)
    if options.dataset == "ctrg":
        spacing = None  # slices carry no spacing, the published path has no intermediate resampling
    return Geometry(size=size, target_spacing_mm=spacing, store=options.store)


def _target_spacing(words: list[str]) -> tuple[float, float, float] | None:
    if [word.lower() for word in words] == ["none"]:
        return None
    try:
        values = [float(word) for word in words]
    except ValueError:
        values = []
    if len(values) != 3 or not all(0.05 <= value <= 20 for value in values):
        remedy = "give three millimetre values between 0.05 and 20 (z y x), or none"
        raise DataError(f"--target-spacing {' '.join(words)} is not a spacing", remedy)
    return values[0], values[1], values[2]


def make_reader(options: argparse.Namespace, geometry: Geometry) -> Reader:
    """Return the reader of the chosen data set.

    Args:
        options: parsed command line.
        geometry: the grid to end on.

    Returns:
        a reader, nothing read yet.
    """
    common = {"empty_report": options.empty_report, "max_volume_gib": options.max_volume_gib}
    if options.dataset == "ct_rate":
        from prepro.readers.ct_rate import CtRateReader

        return CtRateReader(options.root, geometry, options.rescale, options.orientation, **common)
    from prepro.readers.ctrg import CtrgReader

    return CtrgReader(options.root, options.annotation, geometry, options.nifti_order, **common)


def automatic_workers(scans: int) -> int:
    """Return how many processes suit this machine and this many scans."""
    return max(1, min(MAX_AUTOMATIC_WORKERS, len(os.sched_getaffinity(0)), scans // SCANS_WORTH_A_WORKER))
