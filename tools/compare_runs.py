"""Is run B better than run A on the same test cases?

    python tools/compare_runs.py RUN_A RUN_B
    python tools/compare_runs.py scratch/per_case.csv pretrained/per_case.csv --metric dice hd95 --json

RUN_A and RUN_B are run folders or their per_case.csv. Segmentations are compared score by score and class by class
(--metric chooses columns; default: dice, iou, hd95, every nsd@ and assd); classifications by AUROC, average precision
and accuracy of each binary output, or accuracy, macro F1 and macro AUROC of classes. Cases are matched by id; those of
only one run, or without a finite value in both, are left out and counted.

Intervals and p (boot) come from drawing patients with replacement, the same for both runs; p (rank) is the signed-rank
test over patients' mean differences, for scores that are means over cases. p values are not corrected for the number of
rows. The last line of standard output is one JSON object. Exit code 0: compared; 2: bad input or arguments.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from mg3d.command_line import Parser, exit_code_of, natural  # noqa: E402
from mg3d.errors import DataError  # noqa: E402 - the lines above make it importable


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("run_a", type=Path, metavar="RUN_A", help="run folder or per_case.csv, for example trained from scratch")
    add("run_b", type=Path, metavar="RUN_B", help="the run that should be better")
    add("--metric", nargs="+", metavar="NAME", help="segmentation: columns to compare")
    add("--rounds", type=natural, default=2000, metavar="N", help="bootstrap rounds (%(default)s)")
    add("--seed", type=natural, default=0, metavar="N", help="seed of the draws (%(default)s)")
    add("--json", action="store_true", help="print the JSON line alone, without the table")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Compare two runs.

    Args:
        arguments: command line without the program name; None takes the real one.

    Returns:
        the exit code.
    """
    options = build_parser().parse_args(arguments)
    return exit_code_of(
        lambda: _run(options),
        disk_code=2,
        disk_remedy="check the paths of RUN_A and RUN_B",
        interrupted="interrupted",
    )


def _run(options: argparse.Namespace) -> int:
    files = [_rows_file(path) for path in (options.run_a, options.run_b)]
    from tools.run_comparison import compare, read_rows

    if options.rounds < 1:
        raise DataError("--rounds 0 leaves nothing to compare with", "give at least 1, better 1000 or more")
    rows = [read_rows(path) for path in files]
    found = compare(rows[0], rows[1], options.metric, options.rounds, options.seed)
    answer = {name: comparison.entry() for name, comparison in found.items()}
    if not options.json:
        sys.stdout.write(_table(answer) + "\n")
    sys.stdout.write(json.dumps(answer) + "\n")
    return 0


def _rows_file(path: Path) -> Path:
    file = path / "per_case.csv" if path.is_dir() else path
    if not file.is_file():
        raise DataError("no such file", "name a finished run's folder or its per_case.csv", path=str(file))
    return file


def _table(answer: Mapping[str, Mapping[str, Any]]) -> str:
    from tools.label_scores.cases import table_text

    header = ["score", "A", "B", "B - A", "95 % interval", "p (boot)", "p (rank)", "cases", "left out"]
    rows = []
    for name, entry in answer.items():
        low, high = entry["ci95"] or (None, None)
        numbers = [_number(entry[key]) for key in ("mean_a", "mean_b")] + [_number(entry["difference"], sign=True)]
        interval = f"[{_number(low, sign=True)}, {_number(high, sign=True)}]"
        tests = [_number(entry[key]) for key in ("p_bootstrap", "p_wilcoxon")]
        rows.append([name, *numbers, interval, *tests, str(entry["n"]), str(entry["left_out"])])
    return table_text(header, rows)


def _number(value: float | None, *, sign: bool = False) -> str:
    return "-" if value is None else f"{value:+.4f}" if sign else f"{value:.4f}"


if __name__ == "__main__":
    sys.exit(main())
