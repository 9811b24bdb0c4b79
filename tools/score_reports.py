"""Score generated reports against references.

    python tools/score_reports.py PAIRS.json
    python tools/score_reports.py PAIRS.json --json --pretokenised
    python tools/score_reports.py PAIRS.json --labeller keywords --per-case scores.csv
    python tools/score_reports.py PAIRS.json --labels reference_labels.csv generated_labels.csv

PAIRS.json is a list of {"id", "ref", "hyp"}; ref may be a list of texts; .jsonl is read line by line. BLEU-1..4,
ROUGE-L and CIDEr equal pycocoevalcap on the same tokens. METEOR is named by its kind, meteor_java or meteor_nltk, and
null when it cannot be computed. --labeller adds clinical efficacy (macro, micro, per-example precision, recall and F1,
and CRG): "keywords", or the best/ folder of downstream/CT-RATE/text_classifier.py; --labels does so from two tables of
labels. The protocol is printed with the numbers. The last line of standard output (with --json the only one) is one
JSON object. Exit code 0: scored; 1: an optional scorer broke down; 2: bad input or arguments.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from contextlib import nullcontext
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from mg3d.command_line import Parser, exit_code_of, natural  # noqa: E402 - the lines above make it importable
from mg3d.files import add_encoding_option  # noqa: E402
from mg3d.locks import exclusive_output  # noqa: E402


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("pairs", type=_path, metavar="PAIRS.json", help="what was generated, beside what was wanted")
    add("--json", action="store_true", help="print nothing but one JSON object")
    add("--pretokenised", action="store_true", help="leave the text as it is: tokens are what blanks separate")
    add(
        "--meteor",
        choices=("auto", "java", "nltk", "none"),
        default="auto",
        help="auto: Java, else NLTK, else null; a kind by name must work (%(default)s)",
    )
    add("--meteor-timeout", type=_seconds, default=600.0, metavar="S", help="limit of the Java program (%(default)s)")
    add("--rounds", type=natural, default=1000, metavar="N", help="bootstrap rounds, 0: no intervals (%(default)s)")
    add("--seed", type=natural, default=0, metavar="N", help="of the bootstrap (%(default)s)")
    add(
        "--patient-pattern",
        type=_pattern,
        metavar="REGEX",
        help="its first group, found in the id, is the patient: 'valid_(\\d+)_' draws patients instead of cases",
    )
    clinical = parser.add_mutually_exclusive_group()
    clinical.add_argument("--labeller", metavar="WHAT", help="keywords, or the folder of a trained classifier")
    clinical.add_argument("--labels", nargs=2, type=_path, metavar=("TRUTH.csv", "FOUND.csv"), help="label tables")
    add("--radeval", nargs="+", metavar="NAME", help="metrics of RadEval, if installed, e.g. f1radbert_ct")
    add_encoding_option(add)
    add("--per-case", type=_path, metavar="FILE.csv", help="write the scores of every case")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Score reports.

    Args:
        arguments: command line without the program name; None takes the real one.

    Returns:
        the exit code.
    """
    options = build_parser().parse_args(arguments)
    return exit_code_of(
        lambda: _run(options),
        disk_code=1,
        disk_remedy="check space and permissions of --per-case",
        interrupted="interrupted",
    )


def _run(options: argparse.Namespace) -> int:
    from tools.report_scores.scoring import render, score, warn

    with exclusive_output(options.per_case, what="--per-case") if options.per_case else nullcontext():
        result = score(options)
    if options.json:
        warn(result)
    else:
        sys.stdout.write(render(result) + "\n")
    sys.stdout.write(json.dumps(result) + "\n")
    return 0


def _path(text: str) -> Path:
    return Path(text).expanduser()


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError(text)
    return value


def _pattern(text: str) -> re.Pattern[str]:
    try:
        found = re.compile(text)
    except re.error as problem:
        raise argparse.ArgumentTypeError(f"not a pattern: {problem}") from problem
    if found.groups < 1:
        raise argparse.ArgumentTypeError(f"{text!r} has no group")
    return found


if __name__ == "__main__":
    raise SystemExit(main())
