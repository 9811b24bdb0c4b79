"""Score label maps against the truth: Dice, IoU, HD95, surface Dice and mean surface distance for every class.

    python tools/score_segmentation.py TRUTH PRED --labels 1=RV 2=MYO 3=LV
    python tools/score_segmentation.py TRUTH PRED --definition monai --tolerance-mm 1 2 --json
    python tools/score_segmentation.py labelsTs/ predictions/ --out per_case.csv

TRUTH and PRED are two label maps (NIfTI, NRRD, MetaImage, or what nibabel or SimpleITK open), or two folders whose
files are matched by name. Both maps must lie on one grid: nothing is resampled; another order or direction of the axes
is undone exactly, and decimals within 0.001 of a whole number are rounded. Distances are in mm, from the voxel size of
the truth.

--definition deepmind   surfaces as triangles between voxels, weighted by area, as DeepMind's surface-distance (default)
--definition monai      surfaces as voxels at the border, each counting the same, as MONAI's metrics

The two give different HD95, surface Dice and ASSD, most of all for small structures: name the one you used. A class in
neither map has no scores; one that is missing in the truth alone has no Dice; one that is missing in the prediction
alone has Dice 0 and no distances. --json prints {class: {dice, iou, hd95, nsd, assd}} on one line, null for what is
undefined or infinite; nsd is a number for one tolerance and {mm: number} for several. For folders it prints
{class: {metric: {mean, ci95, n}}}. Exit code 0: all scored; 1: some cases cannot be scored (named on standard error);
2: bad input or arguments.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from mg3d.command_line import Parser, exit_code_of  # noqa: E402
from mg3d.errors import DataError, MG3DError  # noqa: E402 - the lines above make it importable
from mg3d.files import write_csv  # noqa: E402
from mg3d.locks import exclusive_output  # noqa: E402

MAX_PROBLEMS = 20


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("truth", type=Path, metavar="TRUTH", help="label map, or folder of label maps")
    add("pred", type=Path, metavar="PRED", help="label map, or folder with the same file names")
    add("--definition", choices=("deepmind", "monai"), default="deepmind", help="whose surface scores (%(default)s)")
    add("--tolerance-mm", nargs="+", type=_tolerance, default=[1.0, 2.0], metavar="MM", help="of nsd (1 2)")
    add("--labels", nargs="+", type=_label, metavar="N=NAME", help="classes to score; default: every label above 0")
    add("--out", type=Path, metavar="FILE.csv", help="write one row per case and class")
    add("--subset", action="store_true", help="folders: leave out truths without a prediction instead of naming them")
    add("--json", action="store_true", help="print the JSON line alone, without the table")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Score label maps.

    Args:
        arguments: command line without the program name; None takes the real one.

    Returns:
        the exit code.
    """
    options = build_parser().parse_args(arguments)
    return exit_code_of(
        lambda: _run(options),
        disk_code=2,
        disk_remedy="check the paths and permissions of TRUTH, PRED and --out",
        interrupted="interrupted; nothing was written",
    )


def _run(options: argparse.Namespace) -> int:
    _check(options)
    from tools.label_scores.cases import Settings

    tolerances = tuple(dict.fromkeys(options.tolerance_mm))
    settings = Settings(dict(options.labels) if options.labels else None, options.definition, tolerances)
    with exclusive_output(options.out) if options.out else nullcontext():
        return _score_folders(options, settings) if options.truth.is_dir() else _score_files(options, settings)


def _score_files(options: argparse.Namespace, settings: Any) -> int:
    from tools.label_scores.cases import case_name, rows_of, score_pair, table_text

    scores = score_pair(options.truth, options.pred, settings)
    if options.out:
        _write(options.out, rows_of(case_name(options.truth), scores))
    if not options.json:
        header = ["class", *next(iter(scores.values()))]
        cells = [[name, *(f"{value:.4f}" for value in row.values())] for name, row in scores.items()]
        sys.stdout.write(f"{settings.definition} definition, distances in mm\n{table_text(header, cells)}\n")
    answer = {name: _five_keys(row) for name, row in scores.items()}
    sys.stdout.write(json.dumps(answer) + "\n")
    return 0


def _score_folders(options: argparse.Namespace, settings: Any) -> int:
    from tools.label_scores.cases import match_folders, rows_of, score_pair, summarise, table_text

    pairs, alone = match_folders(options.truth, options.pred)
    rows: list[dict[str, Any]] = []
    problems = [] if options.subset else [f"{case}: no prediction" for case in alone]
    for case, (truth, pred) in pairs.items():
        try:
            rows += rows_of(case, score_pair(truth, pred, settings))
        except MG3DError as problem:
            problems.append(f"{case}: {problem.message}")
    if not rows:
        raise DataError(
            f"none of {len(pairs)} pairs can be scored; {problems[-1]}", "see the other files' messages too"
        )
    if options.out:
        _write(options.out, rows)
    summary = summarise(rows, settings.tolerances_mm)
    if not options.json:
        header = ["class", *next(iter(summary.values()))]
        cells = [[name, *map(_mean_text, row.values())] for name, row in summary.items()]
        scored = len({row["id"] for row in rows})
        title = f"{scored} cases, {settings.definition} definition, distances in mm, mean [95 % interval] (n)"
        sys.stdout.write(f"{title}\n{table_text(header, cells)}\n")
    sys.stdout.write(json.dumps(summary) + "\n")
    sys.stderr.writelines(f"not scored: {problem}\n" for problem in problems[:MAX_PROBLEMS])
    if len(problems) > MAX_PROBLEMS:
        sys.stderr.write(f"not scored: {len(problems) - MAX_PROBLEMS} more\n")
    return 1 if problems else 0


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    """One row per case and class; numbers keep all their digits, undefined ones are ``nan``."""
    write_csv(path, list(rows[0]), rows)


def _five_keys(row: Mapping[str, float]) -> dict[str, Any]:
    """One class for JSON: the surface Dice of all tolerances under one key, undefined and infinite values as null."""
    plain = {name: value if math.isfinite(value) else None for name, value in row.items()}
    surface = {name.removeprefix("nsd@"): value for name, value in plain.items() if name.startswith("nsd@")}
    nsd = surface if len(surface) > 1 else next(iter(surface.values()))
    return {"dice": plain["dice"], "iou": plain["iou"], "hd95": plain["hd95"], "nsd": nsd, "assd": plain["assd"]}


def _mean_text(entry: Mapping[str, Any]) -> str:
    if entry["mean"] is None:
        return "- (0)"
    interval = entry["ci95"]
    shown = f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""
    return f"{entry['mean']:.3f}{shown} ({entry['n']})"


def _check(options: argparse.Namespace) -> None:
    for path in (options.truth, options.pred):
        if not path.exists():
            raise DataError("no such file or folder", "check the path", path=str(path))
    if options.truth.is_dir() != options.pred.is_dir():
        raise DataError("one is a folder and the other is not", "give two files or two folders", path=str(options.pred))
    if options.out and not options.out.parent.is_dir():
        raise DataError("the folder of --out does not exist", "make it first", path=str(options.out))
    names = dict(options.labels or [])
    if len(set(names.values())) < len(options.labels or []):
        raise DataError("--labels names a label or a class twice", "give each label a name of its own")


def _tolerance(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(text)
    return value


def _label(text: str) -> tuple[int, str]:
    number, _, name = text.partition("=")
    if int(number) < 1:
        raise ValueError(text)
    return int(number), name or number


if __name__ == "__main__":
    sys.exit(main())
