"""One packing job: the command line's options become a reader, cases with splits, and a call of the writer."""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path
from typing import Any

from mg3d.datasets.arrow_schema import INT16
from mg3d.errors import DataError
from mg3d.scans.geometry import WHOLE, Geometry
from prepro import splits
from prepro.dry_run import dry_run
from prepro.engines import create_engine
from prepro.exclusion_list import apply_exclusion_list, read_exclusion_list
from prepro.make_arrow import PackOptions, PackSummary, pack
from prepro.publish import MAX_LISTED_OVERLAPS, leak_list
from prepro.readers.base import Reader
from prepro.tokens import make_counter

logger = logging.getLogger(__name__)
MAX_AUTOMATIC_WORKERS = 8
SCANS_WORTH_A_WORKER = 16
RUN_ONLY = {"out", "workers", "scheduler", "shard", "on_bad", "dry_run", "caption_separator", "fragments"} | {
    "image_size",
    "target_spacing",
    "crop_fractions",
    "window_hu",
    "store",
}
"""Options that leave no trace in the result, or are recorded under another name."""
DATA_SET_ONLY = {
    *("root", "annotation", "table", "follow_links", "exclude", "limit", "rows_per_shard"),
    *("seed", "val_fraction", "tokenizer", "max_text_len", "encoding"),
}
"""Options that choose scans or describe them: part of the data set's manifest, not of what a row holds."""


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Find the cases, assign splits, check for leakage, pack.

    Args:
        options: parsed command line.

    Returns:
        what the last line of standard output shows.

    Raises:
        MG3DError: bad input, or a run that broke down.
    """
    if options.root is None:
        options.root = options.table.parent
    if not options.root.is_dir():
        raise DataError("folder not found", "give the root of the download", path=str(options.root))
    geometry = make_geometry(options)
    counter = make_counter(options.tokenizer)
    reader = make_reader(options, geometry)
    found = reader.find_cases()
    for name, encoding in found.notes.get("encodings", {}).items():
        if not encoding.startswith("utf-8"):
            logger.warning("%s was read as %s", name, encoding)
    if options.exclude:
        found = apply_exclusion_list(found, read_exclusion_list(options.exclude, options.encoding))
    cases, unused = splits.assign_splits(
        found, reader.corpus, options.split_protocol, options.seed, options.val_fraction
    )
    clean = options.split_protocol == "clean"
    patients = splits.patient_overlaps(cases)
    if clean:
        splits.refuse_overlaps(patients, "patients", None if options.dry_run else leak_list(options.out, reader.corpus))
    cases = splits.limit_splits(cases, options.limit)
    exclusions = found.exclusions + unused
    if options.dry_run:
        return dry_run(reader, cases, exclusions, geometry, options.workers or automatic_workers(len(cases)))
    patients_shared = {"count": len(patients), "pairs": patients[:MAX_LISTED_OVERLAPS]}
    recorded = {key: _plain(value) for key, value in vars(options).items() if key not in RUN_ONLY}
    pack_options = PackOptions(
        out=options.out,
        geometry=geometry,
        engine=create_engine(options.workers or automatic_workers(len(cases)), options.scheduler),
        rows_per_shard=options.rows_per_shard,
        shard=options.shard,
        on_bad=options.on_bad,
        clean=clean,
        caption_separator=" " if options.caption_separator == "blank" else "",
        fragments=options.fragments,
        counter=counter,
        max_text_len=options.max_text_len,
        row_config={key: value for key, value in recorded.items() if key not in DATA_SET_ONLY},
        about={"config": recorded, "notes": found.notes, "patients_in_two_splits": patients_shared},
    )
    return _summary(options.out, reader.corpus, pack(reader, cases, exclusions, pack_options), len(exclusions))


def _summary(out: Path, corpus: str, packed: PackSummary, excluded: int) -> dict[str, Any]:
    text = packed.text.values()
    return {
        "corpus": corpus,
        "rows": packed.rows,
        "excluded": excluded,
        "failed": packed.failed,
        "warned": packed.warned,
        "truncated": {split: figures["truncated"] for split, figures in packed.text.items()},
        "truncated_is_exact": bool(packed.text) and all(figures["tokens_are_exact"] for figures in text),
        "files": [str(out / name) for name in packed.digests],
        "sha256": packed.digests,
        "published": not packed.missing,
        "missing": packed.missing,
        "out": str(out),
    }


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def make_geometry(options: argparse.Namespace) -> Geometry:
    """Return the grid the options ask for.

    Args:
        options: parsed command line.

    Returns:
        the geometry of every row.

    Raises:
        DataError: a geometry option makes no sense, or ``--store native`` has no spacing to resample to.
    """
    size = tuple(options.image_size) if options.image_size else Geometry.size
    crop = Geometry.crop_fractions
    if options.crop_fractions:
        crop = _three_or_none("--crop-fractions", options.crop_fractions, (0.05, 1), "a crop") or WHOLE
    if options.dataset == "ctrg":
        if options.store == "native":
            message = "--store native resamples to a voxel size, and the slices of CTRG carry none"
            raise DataError(message, "pack CTRG with --store crop")
        return Geometry(size=size, target_spacing_mm=None, crop_fractions=crop)
    if options.store == "native" and options.image_size:
        raise DataError("--image-size has no meaning for --store native", "leave it out: training resizes such rows")
    spacing = Geometry.target_spacing_mm
    if options.target_spacing:
        spacing = _three_or_none("--target-spacing", options.target_spacing, (0.05, 20), "a spacing")
    return Geometry(size, spacing, crop, options.store, _window(options.window_hu))


def _window(limits: list[int]) -> tuple[int, int]:
    low, high = limits
    if not INT16.min <= low < high <= INT16.max:
        remedy = f"give two whole numbers of HU between {INT16.min} and {INT16.max}, the lower first"
        raise DataError(f"--window-hu {low} {high} is no window", remedy)
    return low, high


def _three_or_none(
    flag: str, words: list[str], limits: tuple[float, float], kind: str
) -> tuple[float, float, float] | None:
    if [word.lower() for word in words] == ["none"]:
        return None
    try:
        values = [float(word) for word in words]
    except ValueError:
        values = []
    if len(values) != 3 or not all(limits[0] <= value <= limits[1] for value in values):
        remedy = f"give three numbers between {limits[0]:g} and {limits[1]:g} (z y x), or none"
        raise DataError(f"{flag} {' '.join(words)} is not {kind}", remedy)
    return values[0], values[1], values[2]


def make_reader(options: argparse.Namespace, geometry: Geometry) -> Reader:
    """Return the reader of the chosen data set.

    Args:
        options: parsed command line.
        geometry: the grid to end on.

    Returns:
        a reader, nothing read yet.
    """
    common: dict[str, Any] = {"empty_report": options.empty_report, "max_volume_gib": options.max_volume_gib}
    common["encoding"] = options.encoding
    if options.assume_spacing:
        common["assumed_spacing_mm"] = tuple(options.assume_spacing)
    if options.dataset == "ct_rate":
        from prepro.readers.ct_rate import CtRateReader

        common["follow_links"] = "follow_links" in options
        return CtRateReader(options.root, geometry, options.rescale, options.orientation, **common)
    if options.dataset == "own":
        from prepro.readers.own_data import OwnDataReader

        values = {"rescale": options.rescale, "orientation": options.orientation}
        values["series"] = getattr(options, "series", "")
        return OwnDataReader(options.table, options.root, geometry, options.corpus, **values, **common)
    from prepro.readers.ctrg import CtrgReader

    return CtrgReader(options.root, options.annotation, geometry, options.nifti_order, **common)


def automatic_workers(scans: int) -> int:
    """Return how many processes suit this machine and this many scans."""
    return max(1, min(MAX_AUTOMATIC_WORKERS, len(os.sched_getaffinity(0)), scans // SCANS_WORTH_A_WORKER))
