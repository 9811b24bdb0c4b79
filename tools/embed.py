"""Scans to a table of features.

    python tools/embed.py SCAN_OR_FOLDER --weights W --out embeddings.parquet

SCAN_OR_FOLDER is a NIfTI, NRRD, MetaImage or published .npz file, the folder of a DICOM series, a folder that is
searched for all of these, an .arrow file of packed rows or a folder of them. W is a checkpoint, a run folder, an export
folder, a released weights file or a hub id.

--output embedding   unit vector in the space that images and texts share (weights that trained one; then the default)
--output pooled      mean token of the image encoder (the default of all other weights)
--output tokens      all tokens of the image encoder

Beside the table OUT.failures.json names the scans that could not be used. A run that was stopped goes on where it
stopped; a later run with the same OUT, weights and settings adds what is new (a scan is known by its path) and tries
failed scans again. The last line of standard output is one JSON object. Exit code 0: all embedded; 1: some scans
failed or the run broke down; 2: bad input.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from mg3d.command_line import Parser, exit_code_of, natural  # noqa: E402
from mg3d.errors import CheckpointError, DataError  # noqa: E402 - the line above makes it importable
from mg3d.locks import exclusive_output  # noqa: E402
from mg3d.scans.folders import FOLLOW_LINKS  # noqa: E402
from tools.weights_options import add_weights_options  # noqa: E402


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("path", type=_path, metavar="SCAN_OR_FOLDER", help="scan, DICOM folder, folder of scans, or packed rows")
    add("--out", type=_path, required=True, metavar="FILE.parquet", help="table to write or to add to")
    add("--output", choices=("embedding", "pooled", "tokens"), help="what to keep of each scan (see above)")
    add(
        "--mode",
        choices=("resize", "crops"),
        default="resize",
        help="resize: one volume as in training (default); crops: overlapping volumes over the whole scan, averaged",
    )
    add("--split", choices=("train", "val", "test"), help="packed rows: only this split")
    add("--batch-size", type=_positive, default=4, metavar="N", help="volumes encoded together (%(default)s)")
    add("--workers", type=_positive, default=2, metavar="N", help="processes that read scans (%(default)s)")
    add("--overwrite", action="store_true", help="start anew instead of adding to OUT")
    add("--crop-spacing", nargs=3, type=float, metavar=("Z", "Y", "X"), help="mm, for --mode crops (as in training)")
    add(FOLLOW_LINKS, action="store_true", help="also search linked folders that lie outside the folder given")
    add_weights_options(parser)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Embed scans.

    Args:
        arguments: command line without the program name; None takes the real one.

    Returns:
        the exit code.
    """
    options = build_parser().parse_args(arguments)
    return exit_code_of(
        lambda: _run(options),
        disk_code=1,
        disk_remedy="check space and permissions at --out, then run the same again",
        interrupted="interrupted; run the same command again to go on",
    )


def _run(options: argparse.Namespace) -> int:
    _check(options)
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s")
    logging.getLogger("mg3d.inference").setLevel(logging.INFO)
    with exclusive_output(options.out):
        from tools.embedding.job import embed

        result = embed(options)
    print(json.dumps(result))
    return 1 if result["failed"] else 0


def _check(options: argparse.Namespace) -> None:
    """Refuse what can be seen to be wrong before anything heavy is imported."""
    from mg3d.inference.places import find_weights
    from mg3d.scans.find import find_scans
    from tools.embedding.sources import is_packed

    if not options.path.exists():
        raise DataError("no such file or folder", "give a scan or a folder of scans", path=str(options.path))
    if options.out.suffix != ".parquet" or options.out.is_dir():
        raise DataError("the table is a parquet file", "write --out NAME.parquet", path=str(options.out))
    if not options.out.parent.is_dir():
        raise DataError("no such folder", "make it, or mend --out", path=str(options.out.parent))
    if not is_packed(options.path):
        find_scans(options.path, follow_links=options.follow_links)
    if find_weights(options.weights).kind == "architecture":
        raise CheckpointError(f"--weights {options.weights} is an architecture", "give a weights file or folder")


def _path(text: str) -> Path:
    return Path(text).expanduser()


def _positive(text: str) -> int:
    if natural(text) == 0:
        raise ValueError(text)
    return int(text)


if __name__ == "__main__":
    raise SystemExit(main())
