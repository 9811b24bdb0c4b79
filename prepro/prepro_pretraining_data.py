"""Pack CT-RATE or CTRG-Chest into the Arrow files that pre-training reads.

    python prepro/prepro_pretraining_data.py ct_rate --root DIR --out data/pretrain_arrows
    python prepro/prepro_pretraining_data.py ctrg --root DIR --annotation JSON --out data/pretrain_arrows

Works from any folder and needs no installation. The last line of standard output is one JSON object. Exit code 0:
all packed; 1: packed, but some scans were unreadable and left out, or the run broke down; 2: bad input or arguments.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from mg3d.errors import DataError, MG3DError  # noqa: E402 - the line above makes it importable

if TYPE_CHECKING:
    from mg3d.scans.geometry import Geometry
    from prepro.readers.base import Reader

MAX_AUTOMATIC_WORKERS = 8
SCANS_WORTH_A_WORKER = 16


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n  mend: see {Path(sys.argv[0]).name} --help\n")


def build_parser() -> argparse.ArgumentParser:
    """Return the command line: one sub-command per data set."""
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="dataset", required=True, metavar="{ct_rate,ctrg}")
    ct_rate = commands.add_parser("ct_rate", help="CT-RATE: NIfTI volumes with report, label and metadata tables")
    ctrg = commands.add_parser("ctrg", help="CTRG-Chest: slice images or NIfTI volumes with an annotation JSON")
    for command in (ct_rate, ctrg):
        _add_common_arguments(command)
    ct_rate.add_argument(
        "--rescale",
        choices=("auto", "apply", "skip"),
        default="auto",
        help="stored values to HU: look at the voxels, apply the metadata table, or leave them",
    )
    ct_rate.add_argument(
        "--orientation",
        choices=("canonical", "snap"),
        default="canonical",
        help="axes tilted by more than 1 degree: resample, or only reorder as published",
    )
    ctrg.add_argument("--annotation", type=Path, required=True, help="JSON with id, report, result, image_path")
    ctrg.add_argument(
        "--nifti-order",
        choices=("published", "header"),
        default="published",
        help="axes of NIfTI volumes: stored order with z reversed, or as their header says",
    )
    return parser


def _add_common_arguments(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--root", type=Path, required=True, help="folder of the download")
    add("--out", type=Path, required=True, help="folder of the arrows and manifests; made if absent")
    add("--split-protocol", choices=("clean", "reference"), default="clean", help="see data/README.md")
    add(
        "--val-fraction",
        type=_fraction,
        default=None,
        metavar="F",
        help="share of training patients drawn for validation (0.02 CT-RATE, 0.10 CTRG)",
    )
    add("--image-size", type=_positive_int, nargs=3, metavar=("D", "H", "W"), help="stored voxels (128 96 128)")
    add(
        "--target-spacing",
        nargs="+",
        metavar="MM",
        help="intermediate spacing z y x in mm (1.5 0.75 0.75), or none; CT-RATE only",
    )
    add("--store", choices=("crop",), default="crop", help="what a row holds: the pre-training crop")
    add("--workers", type=_natural, default=0, help="processes that read scans; 0 chooses")
    add(
        "--on-bad", choices=("skip", "stop"), default="skip", help="a scan that cannot be used: list it, or end the run"
    )
    add("--empty-report", choices=("skip", "keep"), default="skip", help="reports of fewer than three words")
    add(
        "--caption-separator",
        choices=("blank", "none_reference"),
        default="blank",
        help="between findings and impression; the published files have nothing there",
    )
    add("--max-volume-gib", type=_positive_float, default=4.0, help="refuse volumes whose header claims more")
    add("--seed", type=int, default=0, help="seed of the validation draw")
    add("--limit", type=_positive_int, default=None, metavar="N", help="first N scans of each split, for a trial")


def main(arguments: list[str] | None = None) -> int:
    """Run one packing job.

    Args:
        arguments: command line without the program name; None takes the real one.

    Returns:
        the exit code.
    """
    options = build_parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers are the parallelism
    started = time.monotonic()
    try:
        summary = run(options)
    except MG3DError as problem:
        sys.stderr.write(f"error: {problem}\n")
        return problem.exit_code
    except OSError as problem:
        sys.stderr.write(f"error: {problem}\n  mend: nothing was changed in --out; check space and permissions there\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; nothing was changed in --out\n")
        return 130
    summary["seconds"] = round(time.monotonic() - started, 2)
    sys.stdout.write(json.dumps(summary) + "\n")
    return 1 if summary["failed"] else 0


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Find the cases, assign splits, check for leakage, pack.

    Args:
        options: parsed command line.

    Returns:
        what the last line of standard output shows.

    Raises:
        MG3DError: bad input, or a run that broke down.
    """
    from prepro import splits
    from prepro.make_arrow import PackOptions, pack

    if not options.root.is_dir():
        raise DataError("folder not found", "give the root of the download", path=str(options.root))
    geometry = _geometry(options)
    reader = _reader(options, geometry)
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
        workers=options.workers or _automatic_workers(len(cases)),
        on_bad=options.on_bad,
        clean=clean,
        caption_separator=" " if options.caption_separator == "blank" else "",
        config=config | {"notes": found.notes, "patients_in_two_splits": len(patients)},
    )
    summary = pack(reader, cases, found.exclusions + unused, pack_options)
    counts = {"excluded": summary.excluded, "failed": summary.failed, "warned": summary.warned}
    return {"corpus": reader.corpus, "rows": summary.rows, **counts, "out": str(options.out)}


def _geometry(options: argparse.Namespace) -> Geometry:
    from mg3d.scans.geometry import Geometry

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


def _reader(options: argparse.Namespace, geometry: Geometry) -> Reader:
    common = {"empty_report": options.empty_report, "max_volume_gib": options.max_volume_gib}
    if options.dataset == "ct_rate":
        from prepro.readers.ct_rate import CtRateReader

        return CtRateReader(options.root, geometry, options.rescale, options.orientation, **common)
    from prepro.readers.ctrg import CtrgReader

    return CtrgReader(options.root, options.annotation, geometry, options.nifti_order, **common)


def _automatic_workers(scans: int) -> int:
    return max(1, min(MAX_AUTOMATIC_WORKERS, len(os.sched_getaffinity(0)), scans // SCANS_WORTH_A_WORKER))


def _natural(text: str) -> int:
    value = int(text)
    if value < 0:
        raise ValueError(text)
    return value


def _positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def _positive_float(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError(text)
    return value


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise ValueError(text)
    return value


if __name__ == "__main__":
    raise SystemExit(main())
