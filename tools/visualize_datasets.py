"""Look at a data set: python tools/visualize_datasets.py PATH --out DIR, then open DIR/index.html in a browser.

PATH is an .arrow file, a folder of them, or a raw tree: a CT-RATE root, a CTRG root, or the CSV of an own data set.
Counts cover every row, pictures a sample of --limit studies. The pages need no network. The last line of standard
output is one JSON object. Exit code 0: all drawn; 1: some rows cannot be read (their pages say why), or the run broke
down; 2: bad input or arguments.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from mg3d.command_line import Parser, exit_code_of, natural  # noqa: E402
from mg3d.errors import DataError  # noqa: E402 - the line above makes it importable
from mg3d.files import add_encoding_option  # noqa: E402

if TYPE_CHECKING:
    from mg3d.scans.slices import Window
    from tools.gallery.items import Source

WINDOW_NAMES = ("lung", "mediastinum", "bone", "full")


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("path", type=Path, help=".arrow file, folder of arrows, CT-RATE root, CTRG root, or own CSV")
    add("--out", type=_folder, required=True, help="folder of the gallery; an older gallery there is replaced")
    add("--limit", type=natural, default=60, metavar="N", help="studies to draw, 0 for all (%(default)s)")
    add("--seed", type=int, default=0, help="seed of the draw (%(default)s)")
    add("--ids", nargs="+", default=(), metavar="ID", help="draw these studies instead")
    add("--series", default="", metavar="UID|largest", help="own CSV: of a DICOM folder that holds several series")
    add("--annotation", type=Path, help="JSON of a CTRG root; looked for there when not given")
    add_encoding_option(add)
    add(
        "--window",
        nargs="+",
        default=["lung"],
        metavar="W",
        help=f"shown first: {', '.join(WINDOW_NAMES)}, or CENTER WIDTH in HU (lung)",
    )
    add("--tokenizer", metavar="NAME_OR_DIR", help="count tokens exactly; else a lower bound from the words")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Make one gallery.

    Args:
        arguments: command line without the program name; None takes the real one.

    Returns:
        the exit code.
    """
    options = build_parser().parse_args(arguments)
    untouched = "nothing was changed in --out"
    return exit_code_of(
        lambda: _draw(options),
        disk_code=1,
        disk_remedy=f"{untouched}; check space and permissions there",
        interrupted=f"interrupted; {untouched}",
    )


def _draw(options: argparse.Namespace) -> int:
    summary = run(options)
    sys.stdout.write(json.dumps(summary) + "\n")
    return 1 if summary["bad"] else 0


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Open the data set and draw it.

    Args:
        options: parsed command line.

    Returns:
        what the last line of standard output shows.

    Raises:
        MG3DError: bad input.
    """
    window = parse_window(options.window)
    if not options.path.exists():
        raise DataError("no such file or folder", "give the data set", path=str(options.path))
    from prepro.tokens import make_counter
    from tools.gallery.book import BookOptions, draw_book, refuse_foreign_folder

    refuse_foreign_folder(options.out)
    book = BookOptions(
        out=options.out,
        name=options.path.resolve().name,
        limit=options.limit,
        seed=options.seed,
        ids=tuple(options.ids),
        window=window,
    )
    summary = draw_book(
        open_source(options.path, options.annotation, options.encoding, options.series),
        book,
        make_counter(options.tokenizer),
    )
    return {**asdict(summary), "out": str(options.out)}


def open_source(path: Path, annotation: Path | None, encoding: str = "", series: str = "") -> Source:
    """Recognise what a path holds.

    Args:
        path: file or folder, exists.
        annotation: JSON of a CTRG root.
        series: which of several series of a DICOM folder.
        encoding: of its tables, where they are not UTF-8.

    Returns:
        the data set.

    Raises:
        DataError: nothing known is there.
    """
    arrows = sorted(path.glob("[!.]*.arrow")) if path.is_dir() else [path] * (path.suffix == ".arrow")
    if arrows and annotation is None:
        from tools.gallery.arrow_source import ArrowSource

        return ArrowSource(arrows)
    from tools.gallery.raw_source import open_raw

    return open_raw(path, annotation, encoding, series)


def parse_window(words: list[str]) -> Window:
    """Return the window of ``--window``: a name, or centre and width in HU.

    Raises:
        DataError: neither.
    """
    from mg3d.scans.slices import HU_WINDOWS, Window

    if len(words) == 1 and words[0] in HU_WINDOWS:
        return HU_WINDOWS[words[0]]
    try:
        center, width = (float(word) for word in words)
    except ValueError:
        center = width = float("nan")
    if not (abs(center) <= 1e5 and 0 < width <= 1e5):
        raise DataError(f"--window {' '.join(words)}", f"give {', '.join(WINDOW_NAMES)}, or CENTER WIDTH in HU")
    return Window("own", center, width)


def _folder(text: str) -> Path:
    return Path(text).expanduser()


if __name__ == "__main__":
    raise SystemExit(main())
