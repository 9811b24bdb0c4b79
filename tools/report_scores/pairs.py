"""Pairs of reference and generated report, and tables of labels, read with messages that name the entry."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mg3d.errors import DataError

MEND = 'write a list of {"id": ..., "ref": text or list of texts, "hyp": text}'
KEYS = {
    "id": ("id", "filename"),
    "ref": ("ref", "reference", "ground_truth"),
    "hyp": ("hyp", "hypothesis", "prediction"),
}
"""What the three parts of a pair may be called; the last ones stand in ``generated.json`` of a run."""


@dataclass(frozen=True)
class Pairs:
    """D cases.

    Attributes:
        ids: unique names [D].
        references: texts [D][>= 1].
        hypotheses: generated texts [D], possibly empty.
    """

    ids: tuple[str, ...]
    references: tuple[tuple[str, ...], ...]
    hypotheses: tuple[str, ...]


def read_pairs(path: Path) -> Pairs:
    """Read pairs from a JSON list, or from JSON lines when the name ends in ``.jsonl``.

    Raises:
        DataError: no such file, no JSON, or an entry that is not a pair.
    """
    if not path.is_file():
        raise DataError("no such file", MEND, path=str(path))
    try:
        text = path.read_bytes().decode("utf-8-sig")
        lines = [line for line in text.splitlines() if line.strip()]
        content = [json.loads(line) for line in lines] if path.suffix == ".jsonl" else json.loads(text)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"not readable as UTF-8 JSON: {error}", MEND, path=str(path)) from error
    if not isinstance(content, list) or not content:
        raise DataError("holds no list of pairs", MEND, path=str(path))
    found = [_pair(entry, number, path) for number, entry in enumerate(content)]
    ids, references, hypotheses = zip(*found, strict=True)
    repeated = next((name for name in ids if ids.count(name) > 1), None) if len(set(ids)) < len(ids) else None
    if repeated is not None:
        raise DataError(f"id {repeated!r} is there twice", "give each case once", path=str(path))
    return Pairs(ids, references, hypotheses)


def _pair(entry: Any, number: int, path: Path) -> tuple[str, tuple[str, ...], str]:
    if not isinstance(entry, dict):
        raise DataError(f"entry {number} is no object", MEND, path=str(path))
    found = {part: next((name for name in names if name in entry), None) for part, names in KEYS.items()}
    missing = [f"no {part} (nor {', '.join(KEYS[part][1:])})" for part, name in found.items() if name is None]
    if missing:
        raise DataError(f"entry {number} has {', '.join(missing)}, but {', '.join(entry)}", MEND, path=str(path))
    name, reference, hypothesis = (entry[key] for key in found.values() if key is not None)
    if name is None or not str(name).strip():
        raise DataError(f"entry {number} has an empty id", MEND, path=str(path))
    references = reference if isinstance(reference, list) else [reference]
    if not references or not all(isinstance(text, str) for text in (*references, hypothesis)):
        raise DataError(
            'ref and hyp must be texts (an empty generation is "")', MEND, case_id=str(name), path=str(path)
        )
    return str(name), tuple(references), hypothesis


def read_label_table(path: Path) -> tuple[list[str], list[str], np.ndarray]:
    """Read a csv table: an id column first, then one column per finding.

    Values are 0/1 labels, CheXbert classes 0 to 3, or CheXpert values 1, 0, -1 and blank; columns are matched by name
    later, since labellers order them differently.

    Returns:
        ids [n], findings [L] and values [n, L] (NaN: blank).

    Raises:
        DataError: not such a table.
    """
    if not path.is_file():
        raise DataError("no such file", "give a csv table: id, then one column per finding", path=str(path))
    try:
        rows = list(csv.reader(io.StringIO(path.read_bytes().decode("utf-8-sig"), newline=""), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"not a UTF-8 csv table: {error}", "save it as csv, UTF-8", path=str(path)) from error
    rows = [row for row in rows if any(cell.strip() for cell in row)]
    if len(rows) < 2 or len(rows[0]) < 2 or any(len(row) != len(rows[0]) for row in rows):
        raise DataError("no table of equal rows", "write id,FINDING,... and one row per case", path=str(path))
    ids = [row[0].strip() for row in rows[1:]]
    if len(set(ids)) < len(ids) or "" in ids:
        raise DataError("an id is there twice or empty", "give each case once", path=str(path))
    values = [
        [_value(cell, name, row[0], path) for name, cell in zip(rows[0][1:], row[1:], strict=True)] for row in rows[1:]
    ]
    return ids, [name.strip() for name in rows[0][1:]], np.asarray(values)


def _value(cell: str, name: str, case: str, path: Path) -> float:
    text = cell.strip()
    if not text:
        return math.nan
    try:
        value = float(text)
    except ValueError:
        value = math.inf
    if value not in (-1, 0, 1, 2, 3):
        raise DataError(f"{name} is {text!r}", "use 0/1, CheXbert's 0-3, or 1/0/-1/blank", case_id=case, path=str(path))
    return value


def match_label_tables(truth: Path, predicted: Path) -> tuple[list[str], list[str], np.ndarray, np.ndarray]:
    """Two label tables brought into the same rows and columns, by name.

    Returns:
        ids [n], findings [L], values of the references [n, L] and of the generated reports [n, L].

    Raises:
        DataError: the tables name different cases or findings.
    """
    ids, names, values = read_label_table(truth)
    other_ids, other_names, other = read_label_table(predicted)
    for kind, one, two in (("ids", ids, other_ids), ("findings", names, other_names)):
        lacking = sorted(set(one) ^ set(two))
        if lacking:
            raise DataError(
                f"{len(lacking)} {kind} are in one of the two label tables only: {', '.join(lacking[:4])}",
                "give both tables the same cases and findings",
                path=str(predicted),
            )
    rows, columns = _places(other_ids, ids), _places(other_names, names)
    return ids, names, values, other[np.ix_(rows, columns)]


def _places(found: Sequence[str], wanted: Sequence[str]) -> list[int]:
    place = {name: number for number, name in enumerate(found)}
    return [place[name] for name in wanted]
