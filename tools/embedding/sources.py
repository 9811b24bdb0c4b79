"""What is embedded: scan files and DICOM folders, or rows of packed Arrow files."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mg3d.errors import DataError, MG3DError
from mg3d.inference.processor import Mode, ProcessedScan, Processor
from mg3d.scans.find import find_scans
from prepro.engines import Failure, create_engine, load_in_order
from prepro.readers.base import Case, CaseList


@dataclass(frozen=True)
class Prepared:
    """One scan ready for the model.

    Attributes:
        name: unique name in the table.
        volumes: float32 [V, 1, D, H, W] in [0, 1].
        columns: further columns of the table.
        report: tokens of its report for the model, None without one.
    """

    name: str
    volumes: np.ndarray
    columns: dict[str, Any] = field(default_factory=dict)
    report: Any = None


@dataclass(frozen=True)
class Refused:
    """One scan that cannot be used, and why."""

    name: str
    path: str
    message: str
    remedy: str


class Source(Protocol):
    """Scans with unique names in a fixed order."""

    @property
    def places(self) -> dict[str, str]:
        """Name of every scan, in order, and where it is."""

    def prepare(self, done: Collection[str]) -> Iterator[Prepared | Refused]:
        """Yield the scans that are not ``done``, in order."""


@dataclass(frozen=True)
class _ScanReader:
    """Prepares scans in worker processes; fits the engines of the packer."""

    processor: Processor
    mode: Mode
    corpus: str = "scans"
    label_names: tuple[str, ...] = ()
    window: str = ""

    def find_cases(self) -> CaseList:
        return CaseList()

    def load(self, case: Case) -> Any:
        return self.processor(case.source[0], mode=self.mode)


class ScanSource:
    """Files and DICOM folders.

    Args:
        path: one scan, or a folder to search through.
        processor: prepares them.
        mode: ``resize`` or ``crops``.
        workers: processes that read and resample; 1 does it in this one.
        follow_links: also search linked folders that lie outside the folder.

    Attributes:
        passed_over: what the search left out.

    Raises:
        DataError: no scan there.
    """

    def __init__(self, path: Path, processor: Processor, mode: Mode, workers: int, follow_links: bool = False) -> None:
        self._found = find_scans(path, follow_links=follow_links)
        self.passed_over = self._found.passed_over
        self._reader = _ScanReader(processor, mode)
        self._workers = workers

    @property
    def places(self) -> dict[str, str]:
        """Paths below the given folder, and the paths."""
        return {scan.name: str(scan.path) for scan in self._found}

    def prepare(self, done: Collection[str]) -> Iterator[Prepared | Refused]:
        """Read and resample what is not done; a scan that cannot be read or kills its worker is refused."""
        cases = (Case(scan.name, "", "", (scan.path,), "", "") for scan in self._found if scan.name not in done)
        for case, result in load_in_order(self._reader, cases, create_engine(self._workers)):
            if isinstance(result, Failure):
                yield Refused(case.image_id, result.path, result.message, result.remedy)
            else:
                yield self._prepared(case, result)  # type: ignore[arg-type]

    def _prepared(self, case: Case, scan: ProcessedScan) -> Prepared:
        columns = {
            "path": str(case.source[0]),
            "spacing_mm": [float(size) for size in scan.spacing_mm],
            "source_sha256": scan.record.get("source_sha256", ""),
            "warnings": list(scan.warnings),
            "record": json.dumps(scan.record, sort_keys=True),
        }
        return Prepared(case.image_id, scan.volumes, columns)


class PackedSource:
    """Rows of packed Arrow files, prepared exactly as training and evaluation do.

    Args:
        path: an ``.arrow`` file, or a folder of them.
        split: train, val or test; None takes all.
        size_dhw: input of the model.
        metadata: description of the weights: order of the corpora, text options.
        tokenizer: of the text encoder, to encode the reports too; None leaves them out.

    Raises:
        DataError: no such rows, or files that cannot be read.
    """

    def __init__(
        self, path: Path, split: str | None, size_dhw: tuple[int, int, int], metadata: dict[str, Any], tokenizer: Any
    ) -> None:
        self._tokenizer = tokenizer
        self._rows: list[tuple[str, Any, int]] = []
        first = 0
        for corpus, each_split, paths in _corpora(path, split, metadata.get("datasets") or []):
            dataset = _dataset(paths, corpus, size_dhw, metadata, tokenizer, first)
            first += len(dataset)
            ids = dataset.table.column("image_id")
            self._rows += [(f"{corpus}/{each_split}/{name}", dataset, row) for row, name in enumerate(ids)]

    @property
    def places(self) -> dict[str, str]:
        """Corpus, split and ``image_id``, and the Arrow files."""
        return {name: ", ".join(dataset.table.paths) for name, dataset, _ in self._rows}

    def prepare(self, done: Collection[str]) -> Iterator[Prepared | Refused]:
        """Read what is not done, in this process."""
        for name, dataset, row in self._rows:
            if name in done:
                continue
            try:
                yield self._prepared(name, dataset, row)
            except MG3DError as problem:
                yield Refused(name, str(dataset.table.paths[0]), problem.message, problem.remedy)

    def _prepared(self, name: str, dataset: Any, row: int) -> Prepared:
        corpus, split, _ = name.split("/", 2)
        place = dataset.first_row + row
        sample = dataset[row] if self._tokenizer is not None else None
        volume_D1HW = sample.image if sample is not None else dataset.image(row)
        values = dataset.table.row(row)
        columns = {
            "path": ", ".join(dataset.table.paths),
            "row": place,
            "patient_id": values.get("patient_id") or values["image_id"],
            "corpus": corpus,
            "split": split,
            "report": sample.report.text if sample is not None else dataset.text(row),
            "labels": list(values.get("labels") or []),
            "spacing_mm": [float(size) for size in values.get("spacing_mm") or []],
        }
        volumes = volume_D1HW.transpose(0, 1)[None].numpy()
        return Prepared(name, volumes, columns, sample.report if sample is not None else None)


def is_packed(path: Path) -> bool:
    """Whether a path is an Arrow file or a folder that holds some."""
    return path.suffix == ".arrow" or (path.is_dir() and any(path.glob("[!.]*.arrow")))


def _corpora(path: Path, split: str | None, order: list[str]) -> list[tuple[str, str, list[Path]]]:
    """Corpus, split and files; corpora in the order the weights saw them, so that seeded draws are the same."""
    files = [path] if path.suffix == ".arrow" else sorted(path.glob("[!.]*.arrow"))
    groups: dict[tuple[str, str], list[Path]] = {}
    for file in files:
        corpus, _, rest = file.stem.split("-", 1)[0].rpartition("_")
        groups.setdefault((corpus or file.stem, rest if corpus else ""), []).append(file)
    chosen = {key: paths for key, paths in groups.items() if split in (None, key[1])}
    if not chosen:
        known = ", ".join(sorted({key[1] for key in groups})) or "none"
        raise DataError(f"no Arrow file of the split {split!r} (there are: {known})", "mend --split", path=str(path))
    rank = {corpus: number for number, corpus in enumerate(order)}
    keys = sorted(chosen, key=lambda key: (key[1], rank.get(key[0], len(rank)), key[0]))
    return [(corpus, name, chosen[corpus, name]) for corpus, name in keys]


def _dataset(
    paths: list[Path], corpus: str, size_dhw: tuple[int, int, int], metadata: dict[str, Any], tokenizer: Any, first: int
) -> Any:
    from mg3d.datasets.arrow_table import ArrowTable
    from mg3d.datasets.volume_report import VolumeReportDataset

    reports = metadata.get("reports") or {}
    return VolumeReportDataset(
        ArrowTable(paths),
        corpus=corpus,
        tokenizer=tokenizer,
        size_dhw=size_dhw,
        max_text_len=(metadata.get("options") or {}).get("max_text_len", 250),
        seed=reports.get("seed", 0),
        sent_level=reports.get("sent_level", True),
        fragment_separator=reports.get("fragment_separator", "blank"),
        image_root=paths[0].parent,
        first_row=first,
    )
