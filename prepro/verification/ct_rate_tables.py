"""The three tables of a CT-RATE download, row by row: unreadable ones, odd cells, reports whose volume is missing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from mg3d.datasets.labels import CT_RATE_LABELS
from mg3d.errors import DataError
from mg3d.files import Table, read_csv
from prepro.readers.base import CaseList
from prepro.readers.ct_rate import (
    LABEL_CODES,
    LABEL_COLUMNS,
    METADATA_COLUMNS,
    REPORT_COLUMNS,
    SPLIT_TABLE_NAMES,
    CtRateReader,
    table_paths,
)
from prepro.readers.tables import strip_suffix
from prepro.verification.findings import Finding, bare_message, finding


def check_ct_rate_tables(reader: CtRateReader, found: CaseList) -> list[Finding]:
    """Check every table there is, also those the packer would not come to.

    Args:
        reader: of the download.
        found: its volumes, with and without report.

    Returns:
        unreadable tables, odd rows, reports without volume.
    """
    base = reader.dataset_folder()
    volumes = {case.image_id for case in found.cases} | {item.image_id for item in found.exclusions}
    problems: list[Finding] = []
    for split in SPLIT_TABLE_NAMES:
        if any((base / name).is_dir() for name in (split, f"{split}_fixed")):
            reports, labels, metadata = table_paths(base, split)
            if table := _read(reports, REPORT_COLUMNS, reader, problems):
                problems += [*_odd_names(table), *_without_volume(table, volumes)]
            if labels.is_file() and (table := _read(labels, LABEL_COLUMNS, reader, problems)):
                problems += _odd_labels(table)
            if metadata.is_file():
                _read(metadata, METADATA_COLUMNS, reader, problems)
    return problems


def _read(path: Path, columns: Iterable[str], reader: CtRateReader, problems: list[Finding]) -> Table | None:
    try:
        return read_csv(path, columns, encoding=reader.encoding)
    except (DataError, OSError) as problem:
        remedy = getattr(problem, "remedy", "")
        problems.append(finding("tree_unreadable", bare_message(problem), path=str(path), remedy=remedy))
        return None


def _odd_names(table: Table) -> Iterator[Finding]:
    seen: set[str] = set()
    for number, row in table.numbered():
        name = strip_suffix(row["VolumeName"].strip())
        path = str(table.path)
        if not name:
            yield finding("table_row_odd", "VolumeName is empty", path=path, row=number)
        elif Path(name).name != name:
            message = f"VolumeName {name!r} is a path"
            yield finding("tree_unreadable", message, path=path, row=number, remedy="use plain file names")
        elif name in seen:
            yield finding("table_row_odd", f"{name} a second time", path=path, row=number, case=name)
        seen.add(name)


def _without_volume(table: Table, volumes: set[str]) -> Iterator[Finding]:
    numbered = [(number, strip_suffix(row["VolumeName"].strip())) for number, row in table.numbered()]
    names = [name for _, name in numbered]
    # a volume without a row of its own takes that of another reconstruction of its scan
    served = {volume.rpartition("_")[0] for volume in volumes.difference(names)}
    for number, name in numbered:
        if name and name not in volumes and name.rpartition("_")[0] not in served:
            yield finding("report_without_scan", name, path=str(table.path), row=number, case=name)


def _odd_labels(table: Table) -> Iterator[Finding]:
    for number, row in table.numbered():
        odd = [name for name in CT_RATE_LABELS if row[name].strip() not in LABEL_CODES]
        if odd:
            message = f"{odd[0]} is {row[odd[0]]!r}, expected 0, 1 or empty"
            yield finding("tree_unreadable", message, path=str(table.path), row=number, case=row["VolumeName"].strip())
