"""Draw the report gallery of a run: slices, reference, generated text, and which findings agree, on one page.

    python tools/report_gallery.py RUN_DIR
    python tools/report_gallery.py RUN_DIR --out PAGE.html --cases 24 --order-by rouge_l
    python tools/report_gallery.py RUN_DIR --volumes DIR --labeller keywords

RUN_DIR holds generated.json: a list of {"filename", "ground_truth", "prediction"} or of {"id", "ref", "hyp"}. A third
of the cases are the worst, a third the best, a third random ones. Pictures come from the run's own benchmark (its
config.json names the data) or from --volumes, a folder with ID.npy, [D, H, W] in [0, 1]; without either the page has
texts alone. It needs no network. The last line of standard output is one JSON object. Exit code 0: written; 1: the
page cannot be written; 2: bad input or arguments.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from mg3d.command_line import Parser, exit_code_of, natural, print_json_line  # noqa: E402
from mg3d.errors import DataError, MG3DError  # noqa: E402 - the lines above make it importable
from mg3d.files import read_csv  # noqa: E402
from mg3d.locks import exclusive_output  # noqa: E402

GENERATED = "generated.json"
LABELLERS = ("auto", "keywords", "phantom", "none")
Volumes = Callable[[str], Any]


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("run", type=Path, metavar="RUN_DIR", help="folder of a run")
    add("--out", type=Path, metavar="PAGE.html", help="default: gallery.html in the run's folder")
    add("--cases", type=natural, default=12, metavar="N", help="cases on the page (%(default)s)")
    add("--order-by", default="", metavar="SCORE", help="findings_f1, bleu_1 to bleu_4, rouge_l or cider")
    add(
        "--labeller",
        choices=LABELLERS,
        default=LABELLERS[0],
        help="who reads findings from texts; auto: phantom for runs on phantoms, else keywords (%(default)s)",
    )
    add("--volumes", type=Path, metavar="DIR", help="ID.npy of each case: [D, H, W] in [0, 1]")
    add("--no-pictures", action="store_true", help="texts alone")
    add("--tokenise", action="store_true", help="score lower-cased tokens instead of the texts as they are")
    add("--seed", type=natural, default=0, metavar="N", help="of the random cases (%(default)s)")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Draw the gallery of a run.

    Args:
        arguments: command line without the program name; None takes the real one.

    Returns:
        the exit code.
    """
    options = build_parser().parse_args(arguments)
    return exit_code_of(
        lambda: print_json_line(run(options)),
        disk_code=1,
        disk_remedy="check space and permissions of --out",
        interrupted="interrupted; nothing was written",
    )


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Read the run and write the page.

    Args:
        options: parsed command line.

    Returns:
        what the last line of standard output shows.

    Raises:
        MG3DError: bad input.
    """
    from mg3d.finetuning.names import BASELINES, LABEL_TO_REPORT
    from mg3d.finetuning.report_gallery import PAGE, GalleryCase, write_gallery
    from tools.report_scores.pairs import read_pairs

    folder: Path = options.run.expanduser()
    if not (folder / GENERATED).is_file():
        raise DataError(f"no {GENERATED} here", "name the folder of a run that wrote reports", path=str(folder))
    pairs = read_pairs(folder / GENERATED)
    config, metrics = (_object(folder / name) for name in ("config.json", "metrics.json"))
    baseline = _column(folder / "per_case.csv", LABEL_TO_REPORT)
    cases = [
        GalleryCase(
            name, texts[0], hypothesis, {BASELINES[LABEL_TO_REPORT]: baseline[name]} if name in baseline else {}
        )
        for name, texts, hypothesis in zip(pairs.ids, pairs.references, pairs.hypotheses, strict=True)
    ]
    reader, reads = _reader(options.labeller, config)
    out = options.out or folder / PAGE
    with exclusive_output(out):
        summary = write_gallery(
            out,
            cases,
            count=options.cases,
            title=f"Generated reports of {'/'.join(folder.resolve().parts[-2:])}",
            facts=[f"findings read by {reads}", *(f"protocol {value}" for value in [metrics.get("protocol")] if value)],
            reader=reader,
            volumes=_volumes(options, config, metrics),
            order_by=options.order_by,
            pretokenised=not options.tokenise,
            seed=options.seed,
        )
    return {**summary, "labeller": reads, "page": str(out)}


def _reader(wanted: str, config: dict[str, Any]) -> tuple[Any, str]:
    """What reads findings, and its name."""
    kind = wanted if wanted != "auto" else "phantom" if config.get("phantom") else "keywords"
    if kind == "phantom":
        from mg3d.phantoms.report import stated_findings

        return stated_findings, kind
    if kind == "keywords":
        from mg3d.datasets.keyword_labels import findings_by_keywords

        return findings_by_keywords, kind
    return None, "nobody"


def _volumes(options: argparse.Namespace, config: dict[str, Any], metrics: dict[str, Any]) -> Volumes | None:
    """Where pictures come from; a note on standard error where there are none."""
    if options.no_pictures:
        return None
    try:
        found = _folder_volumes(options.volumes) if options.volumes else _benchmark_volumes(config, metrics)
    except MG3DError as problem:
        if options.volumes:
            raise
        sys.stderr.write(f"note: no pictures: {problem.message}\n")
        return None
    if found is None:
        sys.stderr.write("note: no pictures: the run names no benchmark; see --volumes\n")
    return found


def _folder_volumes(folder: Path) -> Volumes:
    import numpy as np

    if not folder.is_dir():
        raise DataError("no such folder", "give the folder that holds ID.npy", path=str(folder))

    def volume(name: str) -> Any:
        path = folder / f"{name}.npy"
        if Path(name).name != name or not path.is_file():
            return None
        try:
            return np.load(path, allow_pickle=False)
        except ValueError as problem:
            raise DataError("not an array of numbers", "save it with numpy.save", path=str(path)) from problem

    return volume


def _benchmark_volumes(config: dict[str, Any], metrics: dict[str, Any]) -> Volumes | None:
    """The images of the reported cases as the run's benchmark reads them."""
    place = ROOT / "downstream" / str(metrics.get("benchmark", ""))
    if not metrics.get("benchmark") or not (place / "data.py").is_file():
        return None
    from mg3d.finetuning.config import finetune_defaults, resolve_finetune_config
    from mg3d.finetuning.report_gallery import case_volumes

    sys.path.insert(0, str(place))
    benchmark = importlib.import_module("data").BENCHMARK
    known = finetune_defaults(benchmark)  # a run of another version may have other keys
    cfg = resolve_finetune_config({name: value for name, value in config.items() if name in known}, benchmark)
    return case_volumes(cfg, benchmark.resolve_task(cfg), benchmark.splits(cfg).test)


def _object(path: Path) -> dict[str, Any]:
    """A JSON object of the run; empty where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _column(path: Path, name: str) -> dict[str, str]:
    """Id -> text of a column of ``per_case.csv``, where it is there."""
    if not path.is_file():
        return {}
    return {row["id"]: row[name] for row in read_csv(path).rows if row.get("id") and row.get(name)}


if __name__ == "__main__":
    raise SystemExit(main())
