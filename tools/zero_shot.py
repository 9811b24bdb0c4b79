"""Score scans against texts, without training anything.

    python tools/zero_shot.py SCAN_OR_FOLDER --weights W --findings "Pleural effusion" "Cardiomegaly"
    python tools/zero_shot.py SCAN_OR_FOLDER --weights W --findings-file findings.txt --out scores.csv
    python tools/zero_shot.py SCAN_OR_FOLDER --weights W --prompts "A normal chest." "A chest with an effusion."

--findings judges each finding alone: "X is present." against "No X."; --findings-file has one finding per line, or a
positive and a negative prompt separated by a tab. --prompts lets free texts compete: a softmax over those given.
SCAN_OR_FOLDER is a scan, a DICOM folder, a folder searched for both, or a table of tools/embed.py (.parquet), whose
vectors are then used. Scores are differences of cosines (pairs) or cosines; probabilities follow from them with the
temperature of the training and are not calibrated. The last line of standard output is one JSON object. Exit code 0:
all scored; 1: some scans cannot be used (named on standard error); 2: bad input or arguments.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from mg3d.command_line import Parser, exit_code_of  # noqa: E402
from mg3d.errors import CheckpointError, DataError, MG3DError  # noqa: E402 - the lines above make it importable
from mg3d.files import read_text  # noqa: E402
from mg3d.locks import exclusive_output  # noqa: E402
from mg3d.scans.folders import FOLLOW_LINKS  # noqa: E402
from tools.weights_options import add_weights_options, check_scan, check_weights, open_model, open_processor  # noqa: E402

if TYPE_CHECKING:
    from torch import Tensor

    from mg3d.inference.model import MG3DModel

POSITIVE, NEGATIVE = "{finding} is present.", "No {finding}."
MAX_PROMPTS = 1000
SHOWN_SCANS = 20


@dataclass(frozen=True)
class Questions:
    """What scans are compared with.

    Attributes:
        names: K short names.
        prompts: K texts.
        negatives: K texts that say the opposite; None: the prompts compete with each other.
    """

    names: tuple[str, ...]
    prompts: tuple[str, ...]
    negatives: tuple[str, ...] | None


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("path", type=Path, metavar="SCAN_OR_FOLDER", help="scan, folder, or .parquet of tools/embed.py")
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--findings", nargs="+", metavar="X", help="each alone, present against absent")
    asked.add_argument("--findings-file", type=Path, metavar="FILE", help="the same, one per line")
    asked.add_argument("--prompts", nargs="+", metavar="TEXT", help="free texts that compete with each other")
    add("--positive", default=POSITIVE, metavar="TEMPLATE", help='prompt of a finding ("%(default)s")')
    add("--negative", default=NEGATIVE, metavar="TEMPLATE", help='prompt against it ("%(default)s")')
    add("--mode", choices=("resize", "crops"), default="resize", help="one volume as in training, or averaged crops")
    add("--out", type=Path, metavar="FILE", help="write one row per scan and text (.json or .csv)")
    add(FOLLOW_LINKS, action="store_true", help="also search linked folders that lie outside the folder given")
    add_weights_options(parser)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Score scans.

    Args:
        arguments: command line without the program name; None takes the real one.

    Returns:
        the exit code.
    """
    options = build_parser().parse_args(arguments)
    return exit_code_of(
        lambda: _run_and_print(options),
        disk_code=1,
        disk_remedy="check space and permissions of --out",
        interrupted="interrupted; nothing was written",
    )


def _run_and_print(options: argparse.Namespace) -> int:
    text, summary = run(options)
    sys.stdout.write(f"{text}\n{json.dumps(summary)}\n")
    return 1 if summary["failed"] else 0


def run(options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Score what the options name.

    Args:
        options: parsed command line.

    Returns:
        the table for a reader, and what the last line of standard output shows.

    Raises:
        MG3DError: bad input, or weights without a shared image-text space.
    """
    from tools.retrieval.search import check_out

    check_scan(options.path)
    check_out(options.out)
    questions = read_questions(options)
    check_weights(options.weights)
    with exclusive_output(options.out) if options.out else nullcontext():
        return _score_all(options, questions)


def _score_all(options: argparse.Namespace, questions: Questions) -> tuple[str, dict[str, Any]]:
    from tools.retrieval.search import write_rows

    model = open_model(options)
    if not model.has_shared_space:
        from mg3d.inference.model import NO_SPACE, NO_SPACE_MEND

        raise CheckpointError(f"{model.name}: {NO_SPACE}", NO_SPACE_MEND)
    rows: list[dict[str, Any]] = []
    failures: list[tuple[str, MG3DError]] = []
    counts: dict[str, int] = {}
    for name, vector in _vectors(options, model, counts):
        if isinstance(vector, MG3DError):
            failures.append((name, vector))
        else:
            rows += score(model, name, vector, questions)
    if not rows:
        raise failures[0][1]
    for name, problem in failures:
        sys.stderr.write(f"left out {name}: {problem.message}\n")
    if options.out:
        write_rows(options.out, rows)
    scans = len(rows) // len(questions.names)
    summary = {
        "scans": scans,
        "failed": len(failures),
        **counts,
        "kind": "pairs" if questions.negatives else "competing prompts",
        "prompts": len(questions.names),
        "out": str(options.out) if options.out else None,
    }
    return render(rows, questions), summary | ({"results": rows} if scans == 1 else {})


def read_questions(options: argparse.Namespace) -> Questions:
    """Prompts of the command line.

    Raises:
        DataError: none, too many, empty or repeated ones, or a template without ``{finding}``.
    """
    if options.prompts:
        prompts = tuple(prompt.strip() for prompt in options.prompts)
        if len(prompts) < 2:
            raise DataError("one prompt has nothing to compete with", "give two or more, or use --findings")
        return _checked(Questions(prompts, prompts, None))
    for name in ("positive", "negative"):
        template = getattr(options, name)
        if template.count("{finding}") != 1 or template.replace("{finding}", "").count("{"):
            raise DataError(f"--{name} {template!r} has no place for the finding", f'write it as in "{POSITIVE}"')
    entries = _read_lines(options.findings_file, options.encoding) if options.findings_file else options.findings
    pairs = [_pair(entry, options) for entry in entries if entry.strip()]
    if not pairs:
        raise DataError("no finding is given", "write one per line", path=str(options.findings_file or ""))
    names, prompts, negatives = zip(*pairs, strict=True)
    return _checked(Questions(names, prompts, negatives))


def _pair(entry: str, options: argparse.Namespace) -> tuple[str, str, str]:
    if "\t" in entry.strip():
        positive, _, negative = entry.strip().partition("\t")
        return positive.strip(), positive.strip(), negative.strip()
    finding = entry.strip()
    texts = (template.replace("{finding}", finding.lower()) for template in (options.positive, options.negative))
    positive, negative = texts
    return finding, positive, negative


def _checked(questions: Questions) -> Questions:
    everything = (*questions.prompts, *(questions.negatives or ()))
    if not all(everything):
        raise DataError("a prompt is empty", "write words")
    if len(set(questions.names)) < len(questions.names):
        raise DataError("a prompt is there twice", "give each once")
    if len(questions.names) > MAX_PROMPTS:
        raise DataError(f"{len(questions.names)} prompts", f"give at most {MAX_PROMPTS}")
    return questions


def _read_lines(path: Path, encoding: str) -> list[str]:
    return [line for line in read_text(path, encoding).splitlines() if not line.startswith("#")]


def _vectors(
    options: argparse.Namespace, model: MG3DModel, counts: dict[str, int]
) -> Iterator[tuple[str, Tensor | MG3DError]]:
    """Name and image vector [P] of every scan, or why there is none; ``counts`` takes what the search left out."""
    if options.path.suffix == ".parquet":
        yield from _table_vectors(options.path, model)
        return
    from tqdm import tqdm

    from mg3d.scans.find import find_scans

    processor = open_processor(options, model)
    scans = find_scans(options.path, follow_links=options.follow_links)
    for line in scans.passed_over.lines():
        sys.stderr.write(f"{line}\n")
    counts.update(scans.passed_over.counts())
    for scan in tqdm(scans, desc="score", unit="scan", disable=len(scans) < 2, dynamic_ncols=True):
        try:
            yield scan.name, model.vectors(processor(scan.path, mode=options.mode))[0]
        except MG3DError as problem:
            yield scan.name, problem


def _table_vectors(path: Path, model: MG3DModel) -> Iterator[tuple[str, Tensor]]:
    import torch

    from tools.retrieval.table import read_embeddings

    table = read_embeddings(path)
    table.need_shared_space()
    table.need_weights(model.digest)
    yield from zip(table.ids, torch.from_numpy(table.vectors), strict=True)


def score(model: MG3DModel, name: str, vector_P: Tensor, questions: Questions) -> list[dict[str, Any]]:
    """One row per prompt: scan, text, score and probability."""
    found = model.compare(vector_P[None], questions.prompts, questions.negatives)
    key = "finding" if questions.negatives else "prompt"
    figures = zip(questions.names, found.scores[0].tolist(), found.probabilities[0].tolist(), strict=True)
    return [
        {"scan": name, key: text, "score": round(value, 6), "probability": round(chance, 6)}
        for text, value, chance in figures
    ]


def render(rows: Sequence[dict[str, Any]], questions: Questions) -> str:
    """The table for a terminal: of one scan its texts, best first; of many one line per scan."""
    key = "finding" if questions.negatives else "prompt"
    per_scan = len(questions.names)
    if len(rows) == per_scan:
        width = max(len(name) for name in questions.names)
        lines = [f"{key.ljust(width)}  {'score':>8}  probability"]
        ranked = sorted(rows, key=lambda row: -row["score"])
        return "\n".join(
            [*lines, *(f"{r[key]:<{width}}  {r['score']:>+8.4f}  {r['probability']:>11.3f}" for r in ranked)]
        )
    scans = [rows[start : start + per_scan] for start in range(0, len(rows), per_scan)]
    width = max(len(part[0]["scan"]) for part in scans[:SHOWN_SCANS])
    lines = [f"{'scan'.ljust(width)}  most probable"]
    for part in scans[:SHOWN_SCANS]:
        best = sorted(part, key=lambda row: -row["probability"])[:3]
        lines.append(f"{part[0]['scan']:<{width}}  " + ", ".join(f"{r[key]} {r['probability']:.2f}" for r in best))
    return "\n".join([*lines, *([f"... and {len(scans) - SHOWN_SCANS} more"] if len(scans) > SHOWN_SCANS else [])])


if __name__ == "__main__":
    raise SystemExit(main())
