"""One verification: sort the paths, check each, collect everything in one report."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from mg3d.errors import MG3DError
from prepro.engines import Engine, Failure, create_engine, load_in_order
from prepro.job import automatic_workers
from prepro.progress import Progress
from prepro.readers.base import Case, CaseList, PackedImage
from prepro.verification.arrows import ArrowResult, check_arrow
from prepro.verification.file_digest import Advance, ignore_progress
from prepro.verification.findings import bare_message, finding
from prepro.verification.packed_folder import check_names, check_together
from prepro.verification.raw_tree import TreeOptions, check_tree
from prepro.verification.report import Report
from prepro.verification.sources import packer_options, reader_of, scans_below, sort_paths

BYTES_WORTH_A_WORKER = 1 << 28
MAX_WORKERS = 8


@dataclass(frozen=True)
class ArrowReader:
    """Lets the engines check packed files as they read scans: one file is one case.

    Attributes:
        advance: told the bytes checked; only where the check runs in this process.
    """

    advance: Advance = ignore_progress

    corpus: ClassVar[str] = ""
    label_names: ClassVar[tuple[str, ...]] = ()
    window: ClassVar[str] = ""

    def find_cases(self) -> CaseList:
        """Return nothing: the files are given."""
        return CaseList()

    def load(self, case: Case) -> PackedImage:
        """Check the file of a case; the result travels in the record."""
        result = check_arrow(case.source[0], self.advance)
        return PackedImage(np.empty((0, 0, 0), np.int16), (1.0, 1.0, 1.0), {"result": result})


def verify(options: argparse.Namespace) -> Report:
    """Check all paths of a command line.

    Args:
        options: from :func:`prepro.verification.command.build_verify_parser`.

    Returns:
        everything that was found.

    Raises:
        MG3DError: the workers cannot do their job.
    """
    report = Report()
    sources = sort_paths(options.paths, options)
    report.findings += [finding("not_found", str(path), path=str(path)) for path in sources.missing]
    report.findings += [finding("nothing_to_check", str(path), path=str(path)) for path in sources.unknown]
    for folder in sources.folders:
        report.findings += check_names(folder)
    if sources.arrows:
        _check_arrows(sources.arrows, options.workers, report)
    for dataset, root, table in sources.trees:
        _check_tree(packer_options(dataset, root, table, options), options, report)
    return report


def _check_arrows(paths: Sequence[Path], workers: int, report: Report) -> None:
    sizes = {path: path.stat().st_size for path in paths}
    wanted = workers or automatic_workers(len(paths) * sum(sizes.values()) // BYTES_WORTH_A_WORKER)
    results = []
    with closing(Progress(sum(sizes.values()), "arrows", "B")) as bar:
        for path, result in _results(paths, min(wanted, len(paths)), bar):
            if isinstance(result, Failure):
                report.findings.append(finding("file_unreadable", result.message, path=str(path)))
                continue
            results.append(result)
            report.findings += result.findings
    report.findings += check_together(results)
    report.checked["files"] += len(paths)
    report.checked["rows"] += sum(result.rows for result in results)
    report.checked["empty_reports"] += sum(result.empty_reports for result in results)


def _results(paths: Sequence[Path], workers: int, bar: Progress) -> Iterator[tuple[Path, ArrowResult | Failure]]:
    cases = [Case(path.name, "", "", (path,), "", "") for path in paths]
    engine = create_engine(workers)
    reader = ArrowReader(bar.advance) if workers <= 1 else ArrowReader()
    for case, result in load_in_order(reader, cases, engine):
        path = case.source[0]
        if workers > 1:
            bar.advance(path.stat().st_size)
        yield path, result if isinstance(result, Failure) else result.record["result"]


def _check_tree(packing: argparse.Namespace, options: argparse.Namespace, report: Report) -> None:
    try:
        reader = reader_of(packing)
    except MG3DError as problem:
        report.findings.append(
            finding("tree_unreadable", bare_message(problem), path=str(packing.root), remedy=problem.remedy)
        )
        return
    tree = TreeOptions(
        packing.split_protocol, packing.seed, packing.val_fraction, packing.exclude, options.quick, packing.encoding
    )
    fallback = scans_below(packing.root) if packing.dataset == "ct_rate" else []
    check_tree(reader, fallback, tree, _engine(options), report)


def _engine(options: argparse.Namespace) -> Engine:
    return create_engine(options.workers or automatic_workers(1 << 10), options.scheduler)
