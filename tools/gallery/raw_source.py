"""A download before packing as a source: the readers of ``prepro`` find the scans and orient them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mg3d.datasets.report_text import split_fragments
from mg3d.errors import DataError
from mg3d.scans.geometry import Geometry
from prepro.readers.base import Case, Reader
from tools.gallery.items import Problem, Study, Voxels

WHOLE = Geometry(target_spacing_mm=None, store="native")
"""Every voxel as acquired, canonical directions: what a person wants to see of a raw scan."""


TABLE_SUFFIXES = (".csv", ".tsv")
REMEDY = "give an .arrow file, a folder of them, a CT-RATE root, a CTRG root with --annotation JSON, or a CSV"


class RawSource:
    """The scans of a raw tree, in the order packing would give them.

    Args:
        reader: one of ``prepro.readers``.

    Raises:
        DataError: the tree lacks a table, or nothing is found.
    """

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.kind = f"raw scans ({reader.corpus})"
        self.found = reader.find_cases()
        if not self.found.cases:
            reasons = self.found.exclusions
            raise DataError("no scan with a report", f"first reason: {reasons[0].reason}" if reasons else "check it")

    def __len__(self) -> int:
        return len(self.found.cases)

    def scan(self) -> Iterator[Study | Problem]:
        """Yield every study in order; voxels stay on disk."""
        return (self.study(number) for number in range(len(self.found.cases)))

    def study(self, number: int) -> Study:
        """Return one study."""
        case = self.found.cases[number]
        return Study(
            number=number,
            image_id=case.image_id,
            patient_id=case.patient_id,
            corpus=self.reader.corpus,
            split=case.origin or "all",
            findings=case.findings,
            impression=case.impression,
            findings_sen=tuple(split_fragments(case.findings)),
            impression_sen=tuple(split_fragments(case.impression)),
            labels=tuple(case.labels),
            label_names=tuple(self.reader.label_names) if case.labels else (),
            place=_place(case),
        )

    def voxels(self, study: Study) -> Voxels:
        """Read a scan as packing would, over its whole field of view where the reader can."""
        packed = self.reader.load(self.found.cases[study.number])
        facts = {key.replace("_", " "): value for key, value in packed.record.items()}
        facts["source sha256"] = str(facts.get("source sha256", ""))[:16]
        assumed = packed.record.get("spacing") == "assumed"
        return Voxels(packed.voxels, packed.spacing_mm, facts, packed.warnings, "read to its last byte", assumed)

    def manifests(self) -> list[dict[str, Any]]:
        """Return what the reader left out and noted."""
        exclusions = [asdict(item) for item in self.found.exclusions]
        return [{"corpus": self.reader.corpus, "exclusions": exclusions, "config": {"notes": self.found.notes}}]


def open_raw(path: Path, annotation: Path | None, encoding: str = "", series: str = "") -> RawSource:
    """Recognise a raw tree and open it.

    Args:
        path: CT-RATE root, CTRG root (with its annotation), or the CSV of an own data set.
        annotation: JSON of a CTRG download.
        series: of an own data set, which of several series of a DICOM folder.
        encoding: of tables that are not UTF-8.

    Raises:
        DataError: nothing known is there.
    """
    if path.is_file():
        return RawSource(_own_reader(path, encoding, series))
    annotation = annotation or _annotation_in(path)
    if annotation is not None:
        from prepro.readers.ctrg import CtrgReader

        return RawSource(CtrgReader(path, annotation, WHOLE, encoding=encoding))
    from prepro.readers.ct_rate import CtRateReader

    reader = CtRateReader(path, WHOLE, encoding=encoding)
    try:
        reader.dataset_folder()
    except DataError:
        raise DataError("no data set recognised here", REMEDY, path=str(path)) from None
    return RawSource(reader)


def _own_reader(table: Path, encoding: str, series: str) -> Reader:
    """The reader of a CSV whose volume paths are relative to its own folder."""
    from prepro.readers.own_data import OwnDataReader

    if table.suffix.lower() not in TABLE_SUFFIXES:
        raise DataError(f"a {table.suffix or 'nameless'} file is no data set", REMEDY, path=str(table))
    return OwnDataReader(table, table.resolve().parent, WHOLE, encoding=encoding, series=series)


def _annotation_in(root: Path) -> Path | None:
    """The one JSON beside the scans that looks like a CTRG annotation."""
    for path in sorted(path for path in root.glob("*.json") if path.is_file()):
        try:
            content = json.loads(path.read_text(encoding="utf-8-sig", errors="replace"))
        except (OSError, ValueError):
            continue
        entries = [entry for group in content.values() for entry in group] if _is_split(content) else content
        if isinstance(entries, list) and entries and isinstance(entries[0], dict) and "image_path" in entries[0]:
            return path
    return None


def _is_split(content: Any) -> bool:
    return isinstance(content, dict) and all(isinstance(group, list) for group in content.values())


def _place(case: Case) -> str:
    first = case.source[0]
    return str(first.parent.name if len(case.source) > 1 else first.name)
