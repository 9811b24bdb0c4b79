"""What a path given to the command is: packed files, or a download and the reader that fits it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mg3d.errors import DataError
from mg3d.scans.folders import PassedOver, walk_folders
from mg3d.scans.read import SCAN_SUFFIXES
from prepro.command_line import build_parser
from prepro.job import make_reader
from prepro.readers.base import Case, Reader
from prepro.readers.ct_rate import CtRateReader
from prepro.verification.command import FORWARDED
from prepro.verification.packed_folder import arrow_files, leftovers
from prepro.verification.raw_tree import PROBE_GEOMETRY


@dataclass
class Sources:
    """The paths of a run, sorted by what they are.

    Attributes:
        arrows: packed files, each once.
        folders: folders of packed files, to check for completeness.
        trees: downloads: data set as the packer names it, its root, its table where the path is one.
        missing: paths that do not exist.
        unknown: paths that are none of this.
    """

    arrows: list[Path] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)
    trees: list[tuple[str, Path, Path | None]] = field(default_factory=list)
    missing: list[Path] = field(default_factory=list)
    unknown: list[Path] = field(default_factory=list)


def sort_paths(paths: list[Path], options: argparse.Namespace) -> Sources:
    """Find out what the paths are.

    Args:
        paths: as given.
        options: the command line; ``--annotation`` and ``--table`` decide what a folder is.
    """
    sources = Sources()
    for given in paths:
        path = given.expanduser()
        if not path.exists():
            sources.missing.append(path)
        elif path.is_file() and path.suffix == ".arrow":
            _add_new(sources.arrows, [path])
        elif path.is_dir() and (arrow_files(path) or leftovers(path)):
            _add_new(sources.folders, [path])
            _add_new(sources.arrows, arrow_files(path))
        else:
            dataset = _dataset(path, options)
            if dataset:
                table = path if path.is_file() else None
                sources.trees.append((dataset, path.parent if table else path, table))
            else:
                sources.unknown.append(path)
    return sources


def _add_new(known: list[Path], more: list[Path]) -> None:
    seen = {path.resolve() for path in known}
    known.extend(path for path in more if path.resolve() not in seen)


def _dataset(path: Path, options: argparse.Namespace) -> str:
    if path.is_file():
        return "own" if path.suffix.lower() in (".csv", ".tsv") else ""
    if options.annotation:
        return "ctrg"
    if options.table:
        return "own"
    return "ct_rate" if _has_ct_rate_folders(path) else ""


def _has_ct_rate_folders(root: Path) -> bool:
    try:
        CtRateReader(root, PROBE_GEOMETRY).dataset_folder()
    except DataError:
        return False
    return True


def packer_options(dataset: str, root: Path, table: Path | None, options: argparse.Namespace) -> argparse.Namespace:
    """Return the options the packer would run with, so that nothing is decided twice.

    Args:
        dataset: ``ct_rate``, ``ctrg`` or ``own``.
        root: the download.
        table: the CSV, when it is what was given.
        options: this command's options; those of the packer are handed on.
    """
    words = [dataset, "--root", str(root), "--out", "."]
    for flag, (datasets, _) in FORWARDED.items():
        value = getattr(options, flag.strip("-").replace("-", "_"))
        if flag == "--table" and table is not None:
            value = str(table)
        if value is True and dataset in datasets:
            words.append(flag)
        elif value and dataset in datasets:
            words += [flag, *(value if isinstance(value, list) else [value])]
    return build_parser().parse_args(words)


def reader_of(packing: argparse.Namespace) -> Reader:
    """Return the packer's reader, on a coarse grid.

    Args:
        packing: from :func:`packer_options`.
    """
    return make_reader(packing, PROBE_GEOMETRY)


def scans_below(root: Path) -> Iterator[Case]:
    """List every scan file below a folder, for a download whose tables cannot be read.

    Args:
        root: the folder.

    Yields:
        cases without report.
    """
    below = [folder / name for folder, names in walk_folders(root, PassedOver()) for name in names]
    for path in sorted(below):
        suffix = next((ending for ending in SCAN_SUFFIXES if path.name.lower().endswith(ending)), "")
        if suffix:
            name = path.name[: -len(suffix)]
            yield Case(name, name, "", (path,), "", "")
