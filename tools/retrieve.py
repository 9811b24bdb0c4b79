"""Search a table of embeddings, or measure how well volumes and reports find each other.

    python tools/retrieve.py TABLE.parquet --text "Right pleural effusion." --weights W     texts to scans
    python tools/retrieve.py TABLE.parquet --scan SCAN --weights W                          scan to scans
    python tools/retrieve.py TABLE.parquet --id ID                                          a scan of the table
    python tools/retrieve.py TABLE.parquet --evaluate                                       table made from packed rows
    python tools/retrieve.py TABLE.parquet --evaluate --reports CSV_OR_ARROWS --weights W   table made from scans

TABLE.parquet comes from tools/embed.py. Texts need the column "embedding" (weights with a shared image-text space);
scans can also be compared by "pooled" features. --evaluate prints recall at 1, 5 and 10 in both directions with 95 %
bootstrap intervals over patients, beside chance and the same with the volumes shuffled; identical reports count as one,
ties rank last. The last line of standard output is one JSON object. Exit code 0: done; 1: the run broke down; 2: bad
input or arguments.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from mg3d.atomic import write_text_atomically  # noqa: E402
from mg3d.command_line import Parser, exit_code_of  # noqa: E402
from mg3d.errors import DataError  # noqa: E402 - the lines above make it importable
from mg3d.locks import exclusive_output  # noqa: E402
from tools.weights_options import add_weights_options, check_scan, check_weights, open_model, open_processor  # noqa: E402

if TYPE_CHECKING:
    import numpy as np

    from tools.retrieval.pairs import Pairs
    from tools.retrieval.table import EmbeddingTable


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("table", type=Path, metavar="TABLE.parquet", help="from tools/embed.py")
    query = parser.add_mutually_exclusive_group(required=True)
    query.add_argument("--text", metavar="TEXT", help="find the scans nearest to these words")
    query.add_argument("--scan", type=Path, help="find the scans nearest to this one")
    query.add_argument("--id", help="find the scans nearest to this one of the table (the end of its id is enough)")
    query.add_argument("--evaluate", action="store_true", help="measure retrieval over the whole table")
    add("--top", type=_positive, default=5, metavar="K", help="how many scans to name (%(default)s)")
    add("--out", type=Path, metavar="FILE", help="write the answers (.json or .csv) or the metrics (.json)")
    evaluation = parser.add_argument_group("--evaluate")
    evaluation.add_argument("--reports", type=Path, metavar="CSV_OR_ARROWS", help="reports by the names of scans")
    evaluation.add_argument("--bootstrap", type=_positive, default=400, metavar="N", help="rounds (%(default)s)")
    evaluation.add_argument("--seed", type=int, default=0, help="of bootstrap and shuffling (%(default)s)")
    add_weights_options(parser, required=False)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Search or evaluate.

    Args:
        arguments: command line without the program name; None takes the real one.

    Returns:
        the exit code.
    """
    options = build_parser().parse_args(arguments)
    return exit_code_of(
        lambda: _print(run(options)), disk_code=1, disk_remedy="check space and permissions", interrupted="interrupted"
    )


def _print(answer: tuple[str, dict[str, Any]]) -> int:
    sys.stdout.write(f"{answer[0]}\n{json.dumps(answer[1])}\n")
    return 0


def run(options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Do what the options say.

    Args:
        options: parsed command line.

    Returns:
        text for a reader, and what the last line of standard output shows.

    Raises:
        MG3DError: bad input.
    """
    from tools.retrieval.search import check_out
    from tools.retrieval.table import read_embeddings

    check_out(options.out)
    needs_weights = options.text is not None or options.scan is not None or options.reports is not None
    if needs_weights and not options.weights:
        raise DataError("this question needs the model", "give the --weights that the table was made with")
    if needs_weights:
        check_weights(options.weights)
    if options.reports is not None and not options.evaluate:
        raise DataError("--reports is for --evaluate", "leave one out")
    table = read_embeddings(options.table)
    with exclusive_output(options.out) if options.out else nullcontext():
        return evaluate(options, table) if options.evaluate else search(options, table)


def search(options: argparse.Namespace, table: EmbeddingTable) -> tuple[str, dict[str, Any]]:
    """Name the nearest scans of one query.

    Raises:
        MG3DError: weights, scan or text that do not fit the table.
    """
    from tools.retrieval.search import nearest, render_answers, write_rows

    row = table.row_of(options.id) if options.id is not None else None
    query_P = table.vectors[row] if row is not None else _query(options, table)
    answers = nearest(table, query_P, options.top, leave_out=row)
    if options.out:
        write_rows(options.out, answers)
    shown = [{key: answer[key] for key in ("rank", "similarity", "id")} for answer in answers]
    asked = options.text or (table.ids[row] if row is not None else str(options.scan))
    return render_answers(answers), {"query": asked, "scans": len(table), "compared_by": table.kind, "answers": shown}


def _query(options: argparse.Namespace, table: EmbeddingTable) -> np.ndarray:
    """Vector of ``--text`` or ``--scan`` with the weights the table was made with."""
    if options.text is not None:
        table.need_shared_space()
    scan = check_scan(options.scan) if options.scan is not None else None
    model = open_model(options)
    table.need_weights(model.digest)
    if scan is None:
        return model.encode_text([options.text])[0].numpy()
    mode = "crops" if table.config.get("mode") == "crops" else "resize"
    return model.vectors(open_processor(options, model)(scan, mode=mode), table.kind)[0].numpy()  # type: ignore[arg-type]


def evaluate(options: argparse.Namespace, table: EmbeddingTable) -> tuple[str, dict[str, Any]]:
    """Recall in both directions, see the head of this file.

    Raises:
        MG3DError: no reports, or weights that do not fit.
    """
    from tools.retrieval.pairs import pairs_of_table, pairs_with_reports

    if options.out is not None and options.out.suffix != ".json":
        raise DataError("metrics are written as JSON", "name it --out FILE.json", path=str(options.out))
    if options.reports is None:
        pairs = pairs_of_table(table)
    else:
        pairs = pairs_with_reports(table, options.reports, open_model(options), options.encoding)
    metrics = measure(pairs, options.bootstrap, options.seed)
    if options.out:
        write_text_atomically(options.out, json.dumps(metrics, indent=1) + "\n")
    from mg3d.evaluation.table import render_retrieval

    head = f"{len(pairs.reports)} pairs of {len(set(pairs.patients))} patients (known from {pairs.patients_from})."
    if pairs.left_out:
        head += f" {pairs.left_out} scans of the table have no report and are left out."
    brackets = "Brackets hold 95 % bootstrap intervals over patients."
    text = "\n".join([head, brackets, "", *render_retrieval(metrics)])
    counts = {"pairs": len(pairs.reports), "patients": len(set(pairs.patients)), "left_out": pairs.left_out}
    recalls = {key: value for key, value in metrics.items() if "_recall_at_" in key}
    return text, {**counts, "distinct_reports": metrics["distinct_reports"], **recalls}


def measure(pairs: Pairs, rounds: int, seed: int) -> dict[str, Any]:
    """Entries of the evaluation that concern retrieval, as a run's ``metrics.json`` has them.

    Args:
        pairs: volumes and reports.
        rounds: bootstrap rounds.
        seed: of bootstrap and shuffling.
    """
    import numpy as np

    from mg3d.evaluation.report import Cases, SharedSpace, permuted_entries, retrieval_entries
    from mg3d.metrics.bootstrap import bootstrap_weights
    from mg3d.metrics.retrieval import group_identical

    groups = group_identical(pairs.reports)
    weights = bootstrap_weights(pairs.patients, rounds, seed)
    entries = retrieval_entries(pairs.text @ pairs.image.T, groups, weights)
    no_findings = Cases(np.zeros((len(groups), 0), int), pairs.patients, pairs.reports)
    space = SharedSpace(pairs.image, pairs.text, np.zeros((0, pairs.image.shape[1])), "")
    shuffled = permuted_entries(space, groups, no_findings, [], seed)
    entries["permuted_images"] = {key: value for key, value in shuffled.items() if "_recall_at_" in key}
    return entries | {"distinct_reports": len(np.unique(groups))}


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


if __name__ == "__main__":
    raise SystemExit(main())
