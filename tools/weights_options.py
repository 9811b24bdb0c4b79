"""What the commands that use weights share: their options, the model behind them, and how a scan is read."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mg3d.errors import DataError
from mg3d.files import add_encoding_option

if TYPE_CHECKING:
    from mg3d.inference.model import MG3DModel
    from mg3d.inference.processor import Processor


def add_weights_options(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add ``--weights``, ``--tokenizer``, ``--device`` and how scans are read."""
    add = parser.add_argument
    add(
        "--weights",
        required=required,
        metavar="W",
        help="checkpoint, run folder, export folder, or hub id",
    )
    add("--tokenizer", metavar="DIR", help="tokenizer of the text encoder, where the weights do not bring it")
    add("--device", default="cpu", help="cpu, cuda, cuda:1 ... (%(default)s)")
    scan = parser.add_argument_group("reading scans")
    scan.add_argument("--metadata", nargs="+", type=Path, metavar="CSV", help="scale and voxel size by VolumeName")
    add_encoding_option(scan.add_argument)
    scan.add_argument("--rescale", choices=("auto", "apply", "skip"), default="auto", help="scale to HU (auto)")
    scan.add_argument("--assume-spacing", nargs=3, type=float, metavar=("Z", "Y", "X"), help="mm, where there is none")
    scan.add_argument("--series", default="", metavar="UID|largest", help="of a DICOM folder that holds several series")
    scan.add_argument("--max-volume-gib", type=float, default=4.0, metavar="GIB", help="refuse larger ones")


def open_model(options: argparse.Namespace) -> MG3DModel:
    """Load the weights that the options name; warnings go to standard error."""
    from mg3d.inference.model import load_model

    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s")

    return load_model(options.weights, device=options.device, tokenizer=options.tokenizer)


def open_processor(options: argparse.Namespace, model: MG3DModel) -> Processor:
    """The preparation of scans that belongs to the weights, changed as the options say.

    Raises:
        DataError: a metadata table cannot be read, or the assumed spacing is none.
    """
    from mg3d.inference.processor import make_processor
    from mg3d.inference.scan_table import read_scan_table

    table = read_scan_table(options.metadata or (), options.encoding)
    changes: dict[str, Any] = {"rescale": options.rescale, "table": table}
    changes["max_volume_gib"], changes["series"] = options.max_volume_gib, options.series
    if options.assume_spacing:
        if not all(0.01 <= size <= 100 for size in options.assume_spacing):
            raise DataError(f"--assume-spacing {options.assume_spacing}", "give three sizes in mm: Z Y X")
        changes["assumed_spacing_mm"] = tuple(options.assume_spacing)
    return make_processor(model.preparation, **changes)


def check_scan(path: Path) -> Path:
    """Return the path of a scan that exists.

    Raises:
        DataError: nothing is there.
    """
    path = path.expanduser()
    if not path.exists():
        raise DataError("no such file or folder", "give the scan's path", path=str(path))
    return path


def check_weights(name: str) -> None:
    """Refuse a name of weights that stands for nothing, before anything heavy is imported."""
    from mg3d.inference.places import find_weights

    find_weights(name)
