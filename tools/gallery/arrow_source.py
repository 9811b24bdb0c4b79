"""Packed Arrow files as a source: text columns without the pixels, volumes with their checksums."""

from __future__ import annotations

import bisect
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mg3d.datasets.arrow_files import find_arrow_files
from mg3d.datasets.arrow_schema import parse_window
from mg3d.datasets.arrow_table import ArrowTable, row_text
from mg3d.datasets.published_pixels import decode_slices
from mg3d.datasets.volume import TARGET_SPACING_MM, WINDOW_HU, quantise_grey
from mg3d.errors import DataError
from tools.gallery.items import Problem, Study, Voxels

PACK_AGAIN = "pack it again"
_NAME = re.compile(r"(?P<corpus>.+)_(?P<split>train|val|test)(?:-\d{5}-of-\d{5})?$")
_RECORDED = {
    "stored_shape_DHW": "acquired voxels (z, y, x)",
    "stored_spacing_mm": "acquired spacing (z, y, x) mm",
    "slices": "acquired slices",
    "tilt_degrees": "tilt of the axes, degrees",
    "rescale": "slope and intercept",
    "orientation": "directions",
    "spacing": "spacing from",
}
_ROW_ERRORS = (pa.ArrowException, OSError, ValueError, IndexError, KeyError, TypeError)


@dataclass
class _File:
    path: Path
    table: ArrowTable
    text: pa.ipc.RecordBatchFileReader
    first: int
    ends: list[int]
    label_names: tuple[str, ...]
    _records: dict[str, dict[str, Any]] | None = None

    def manifest(self) -> dict[str, Any]:
        """What the packing wrote beside the file; empty without a readable manifest."""
        try:
            content = json.loads(self.path.with_suffix(".manifest.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def record(self, image_id: str) -> dict[str, Any]:
        """What the manifest says about one row."""
        if self._records is None:
            cases = self.manifest().get("cases")
            rows = [case for case in cases if isinstance(case, dict)] if isinstance(cases, list) else []
            self._records = {str(case.get("image_id")): case for case in rows}
        return self._records.get(image_id, {})


class ArrowSource:
    """The rows of Arrow files, in the order of their names.

    Args:
        paths: the files; a damaged one is reported and left out.

    Raises:
        DataError: no file can be opened.
    """

    kind = "packed Arrow rows"

    def __init__(self, paths: Sequence[Path]) -> None:
        self.files: list[_File] = []
        self.problems: list[Problem] = []
        rows = 0
        for path in paths:
            try:
                table, text = ArrowTable([path]), _open_text(path)
                self.files.append(_File(path, table, text, rows, _batch_ends(table, text), _label_names(table)))
                rows += len(table)
            except DataError as problem:
                self.problems.append(Problem(path.name, problem.message))
        if not self.files:
            reason = self.problems[0].reason if self.problems else "no .arrow file given"
            raise DataError(reason, "pack the data with prepro/prepro_pretraining_data.py")
        self.problems += _incomplete_sets(paths)

    def __len__(self) -> int:
        return sum(len(file.table) for file in self.files)

    def scan(self) -> Iterator[Study | Problem]:
        """Yield every study in order, without touching voxels, and the rows that cannot be read."""
        yield from self.problems
        for file in self.files:
            starts = [0, *file.ends[:-1]]
            for batch, start in enumerate(starts):
                try:
                    rows = _read_batch(file, batch)
                except DataError as problem:
                    yield Problem(f"{file.path.name} row {start}", problem.message)
                    continue
                yield from (_study(row, file, start + offset) for offset, row in enumerate(rows))

    def study(self, number: int) -> Study:
        """Return one study again."""
        file = self._file(number)
        inside = number - file.first
        batch = bisect.bisect_right(file.ends, inside)
        start = file.ends[batch - 1] if batch else 0
        return _study(_read_batch(file, batch)[inside - start], file, inside)

    def voxels(self, study: Study) -> Voxels:
        """Read the volume of a row; its checksum must fit."""
        file = self._file(study.number)
        row = file.table.row(study.number - file.first)
        image = row["image"]
        if isinstance(image, np.ndarray):
            return _packed_voxels(row, file, file.record(study.image_id))
        if image is None:
            raise DataError("the row holds a path, no pixels", "pack it with prepro", case_id=study.image_id)
        grey = quantise_grey(decode_slices(image, study.image_id))
        return Voxels(grey, TARGET_SPACING_MM, checked="slices decoded", assumed_spacing=True)

    def manifests(self) -> list[dict[str, Any]]:
        """Return the manifests beside the files; unreadable ones are left out."""
        found = [(file.manifest(), len(file.table)) for file in self.files]
        return [content | {"rows_in_file": rows} for content, rows in found if content]

    def _file(self, number: int) -> _File:
        return next(file for file in reversed(self.files) if file.first <= number)


def _packed_voxels(row: dict[str, Any], file: _File, record: dict[str, Any]) -> Voxels:
    facts = {"row checksum (crc32)": f"{row['row_crc32']:08x}", "stored part": _geometry(file.table)}
    window_hu = parse_window(file.table.metadata["mg3d.window_hu"])
    if window_hu is not None:
        facts["clipped to"] = f"{window_hu[0]:,} to {window_hu[1]:,} HU"
    return Voxels(
        row["image"],
        _triple(row["spacing_mm"]),
        facts | {words: record[key] for key, words in _RECORDED.items() if key in record},
        tuple(str(words) for words in record.get("warnings") or ()),
        "row checksum fits",
        record.get("spacing") == "assumed",
        window_hu or WINDOW_HU,
    )


def _open_text(path: Path) -> pa.ipc.RecordBatchFileReader:
    """A second reader that leaves the pixels out, so that compressed files are not unpacked for their text."""
    try:
        source = pa.memory_map(str(path))
        names = pa.ipc.open_file(source).schema.names
        fields = [number for number, name in enumerate(names) if name != "image"]
        options = pa.ipc.IpcReadOptions(use_threads=False, included_fields=fields)
        return pa.ipc.open_file(source, options=options)
    except (pa.ArrowException, OSError) as problem:
        raise DataError(f"cannot be opened ({_short(problem)})", PACK_AGAIN, path=str(path)) from problem


def _batch_ends(table: ArrowTable, text: pa.ipc.RecordBatchFileReader) -> list[int]:
    """Rows up to the end of each record batch; packed files hold one row in each."""
    if table.layout == "mg3d":
        return list(range(1, len(table) + 1))
    return list(itertools.accumulate(text.get_batch(number).num_rows for number in range(text.num_record_batches)))


def _read_batch(file: _File, number: int) -> list[dict[str, Any]]:
    try:
        batch = file.text.get_batch(number)
        batch.validate(full=True)
        rows = batch.to_pylist()
    except _ROW_ERRORS as problem:
        raise DataError(f"the row cannot be read ({_short(problem)})", PACK_AGAIN) from problem
    empty = [name for row in rows for name in ("image_id", "split") if row[name] is None]
    if empty:
        raise DataError(f"column {empty[0]} is null", PACK_AGAIN)
    return rows


def _study(row: dict[str, Any], file: _File, inside: int) -> Study:
    name = _NAME.fullmatch(file.path.stem)
    labels = tuple(row.get("labels") or ())
    return Study(
        number=file.first + inside,
        image_id=row["image_id"],
        patient_id=row.get("patient_id") or row["image_id"],
        corpus=row.get("corpus") or (name["corpus"] if name else file.path.stem),
        split=row["split"],
        findings=" ".join(row_text(row, "findings")),
        impression=" ".join(row_text(row, "impression")),
        findings_sen=tuple(row_text(row, "findings_sen")),
        impression_sen=tuple(row_text(row, "impression_sen")),
        labels=labels,
        label_names=file.label_names if len(labels) == len(file.label_names) else tuple(map(str, range(len(labels)))),
        shape=_triple(row.get("image_shape")),
        spacing_mm=_triple(row.get("spacing_mm")),
        content=f"{row['image_crc32']:08x} {row['image_shape']}" if row.get("image_crc32") is not None else "",
        place=f"{file.path.name} row {inside}",
    )


def _triple(values: Any) -> Any:
    return tuple(values) if values is not None and len(values) == 3 else None


def _label_names(table: ArrowTable) -> tuple[str, ...]:
    try:
        return tuple(str(name) for name in json.loads(table.metadata.get("mg3d.label_names", "[]")))
    except (ValueError, TypeError):
        return ()


def _geometry(table: ArrowTable) -> str:
    try:
        stored = json.loads(table.metadata.get("mg3d.geometry", "{}"))
    except ValueError:
        return ""
    crop = " × ".join(f"{value:g}" for value in stored.get("crop_fractions", []))
    return "the whole scan" if stored.get("store") == "native" else f"centre, {crop} of each axis (z, y, x)"


def _incomplete_sets(paths: Sequence[Path]) -> list[Problem]:
    """Shards that are missing beside those present."""
    problems = {}
    for path in paths:
        name = _NAME.fullmatch(path.stem)
        if name is None or len(paths) < 2:
            continue
        try:
            find_arrow_files(path.parent, name["corpus"], name["split"])
        except DataError as problem:
            problems[name["corpus"], name["split"]] = Problem(f"{name['corpus']}_{name['split']}", problem.message)
    return list(problems.values())


def _short(problem: BaseException) -> str:
    return f"{type(problem).__name__}: {(str(problem).splitlines() or [''])[0][:160]}"
