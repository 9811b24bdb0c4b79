"""Pairs of reference and generated report, and tables of labels, read with messages that name the entry."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mg3d.errors import DataError
from mg3d.files import id_key, read_csv, read_text

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


def read_pairs(path: Path, encoding: str = "") -> Pairs:
    """Read pairs from a JSON list, or from JSON lines when the name ends in ``.jsonl``.

    Args:
        path: the file.
        encoding: where it is not UTF-8, see :func:`mg3d.files.decode_text`.

    Raises:
        DataError: no such file, no JSON, or an entry that is not a pair.
    """
    text = read_text(path, encoding)
    try:
        lines = [line for line in text.splitlines() if line.strip()]
        content = [json.loads(line) for line in lines] if path.suffix == ".jsonl" else json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"not readable as JSON: {error}", MEND, path=str(path)) from error
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


def read_label_table(path: Path, encoding: str = "") -> tuple[list[str], list[str], np.ndarray]:
    """Read a csv table: an id column first, then one column per finding.

    Values are 0/1 labels, CheXbert classes 0 to 3, or CheXpert values 1, 0, -1 and blank; columns are matched by name
    later, since labellers order them differently.

    Returns:
        ids [n], findings [L] and values [n, L] (NaN: blank).

    Raises:
        DataError: not such a table.
    """
    table = read_csv(path, encoding=encoding, whole_rows=True)
    if not table.rows or len(table.columns) < 2 or len(set(table.columns)) < len(table.columns):
        raise DataError("no table of ids and findings", "write id,FINDING,... and one row per case", path=str(path))
    first, *names = table.columns
    ids = [row[first].strip() for row in table.rows]
    if len(set(ids)) < len(ids) or "" in ids:
        raise DataError("an id is there twice or empty", "give each case once", path=str(path))
    values = [[_value(row[name], name, row[first], path) for name in names] for row in table.rows]
    return ids, names, np.asarray(values)


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


def match_label_tables(
    truth: Path, predicted: Path, encoding: str = ""
) -> tuple[list[str], list[str], np.ndarray, np.ndarray]:
    """Two label tables brought into the same rows and columns, by name.

    Args:
        truth: labels of the references.
        predicted: labels of the generated reports.
        encoding: where the tables are not UTF-8.

    Returns:
        ids [n], findings [L], values of the references [n, L] and of the generated reports [n, L].

    Raises:
        DataError: the tables name different cases or findings.
    """
    ids, names, values = read_label_table(truth, encoding)
    other_ids, other_names, other = read_label_table(predicted, encoding)
    for kind, one, two in (("ids", ids, other_ids), ("findings", names, other_names)):
        lacking = sorted(set(one) ^ set(two))
        if lacking:
            raise DataError(
                f"{len(lacking)} {kind} are in one of the two label tables only: {', '.join(lacking[:4])}",
                _same_names(one, two) or "give both tables the same cases and findings",
                path=str(predicted),
            )
    rows, columns = _places(other_ids, ids), _places(other_names, names)
    return ids, names, values, other[np.ix_(rows, columns)]


def _same_names(one: Sequence[str], two: Sequence[str]) -> str:
    """A hint at names that a spreadsheet rewrote in one of the tables."""
    known = {id_key(name): name for name in set(two) - set(one)}
    pairs = ((name, known[id_key(name)]) for name in one if name not in two and id_key(name) in known)
    first = next(pairs, None)
    return f"{first[0]!r} and {first[1]!r} look like one name: write both alike" if first else ""


def _places(found: Sequence[str], wanted: Sequence[str]) -> list[int]:
    place = {name: number for number, name in enumerate(found)}
    return [place[name] for name in wanted]
