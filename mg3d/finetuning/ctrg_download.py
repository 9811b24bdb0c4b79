"""CTRG's annotation and table of findings, read with messages that name list, entry and key (spec downstream 8.1)."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mg3d.errors import DataError
from mg3d.files import read_csv
from mg3d.finetuning.scan_checks import unreadable
from mg3d.paths import visible_files
from mg3d.scans.grey_slices import SLICE_SUFFIXES

__all__ = ["image_problems", "name_of", "read_annotation", "read_finding_codes"]

LISTS = ("train", "val", "test")
KEYS = ("id", "report", "image_path")
CODES = (-1.0, 0.0, 1.0, 2.0, 3.0)
"""CheXbert's 0 to 3; other labellers write -1 for uncertain."""

PRESENT = 1.0
SHOWN = 6
_EXPECTED = "expected {train, val, test}: lists of {id, report, image_path}, as downloaded"


def name_of(entry_id: Any) -> str:
    """Case id without the ending that some files have."""
    return str(entry_id).strip().removesuffix(".nii.gz")


def read_annotation(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Entries of the three lists, each with id, report (text) and image_path (text, or the list of the slices).

    Raises:
        DataError: no such JSON file, a list or key is missing or of another kind, or one list has an id twice with
            different reports.
    """
    content = _json(path)
    found = content if isinstance(content, dict) else {}
    lacking = [part for part in LISTS if not isinstance(found.get(part), list)]
    if lacking:
        what = f"keys {', '.join(list(map(str, found))[:SHOWN])}" if found else f"a {type(content).__name__}"
        raise _wrong(path, f"no list {', '.join(lacking)} (found: {what})")
    for part in LISTS:
        reports: dict[str, str] = {}
        for number, entry in enumerate(found[part]):
            problem = _problem_of(entry)
            if not problem and reports.setdefault(name_of(entry["id"]), entry["report"]) != entry["report"]:
                problem = f"id {entry['id']!r} stands for another report already"
            if problem:
                raise _wrong(path, f"{part}[{number}]: {problem}")
    return {part: found[part] for part in LISTS}


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as problem:
        raise DataError(
            f"not UTF-8 (byte 0x{problem.object[problem.start]:02x} at position {problem.start})",
            "save it as UTF-8, or download it again",
            path=str(path),
        ) from None
    except (ValueError, RecursionError) as problem:
        raise DataError(f"no JSON ({problem})", "download it again", path=str(path)) from None


def _problem_of(entry: Any) -> str:
    if not isinstance(entry, dict):
        return f"is a {type(entry).__name__}, no object"
    for key in KEYS:
        if key not in entry:
            return f"no {key!r}, but {', '.join(list(map(str, entry))[:SHOWN])}"
    paths = entry["image_path"] if isinstance(entry["image_path"], list) else [entry["image_path"]]
    if not isinstance(entry["id"], str | int) or not name_of(entry["id"]):
        return f"id {entry['id']!r} is no name"
    if not isinstance(entry["report"], str):
        return f"report of id {entry['id']!r} is a {type(entry['report']).__name__}, not a text"
    if not paths or not all(isinstance(each, str) and each for each in paths):
        return f"image_path of id {entry['id']!r} names no file"
    return ""


def _wrong(path: Path, what: str) -> DataError:
    return DataError(f"not CTRG's annotation: {what}", _EXPECTED, path=str(path))


def read_finding_codes(path: Path) -> tuple[tuple[str, ...], dict[str, tuple[float, ...]]]:
    """Names of the findings, and case id -> 1 where the code says present, else 0.

    Raises:
        DataError: no CSV table in UTF-8, no column ``id`` or none of a finding, a row of another length, a cell that is
            no code, or an id twice with different codes.
    """
    table = read_csv(path, ["id"], whole_rows=True)
    names = tuple(name for name in table.columns if name and name != "id")
    if not names or not table.rows:
        raise DataError("needs a column id, one of each label, and rows", "download it again", path=str(path))
    found: dict[str, tuple[float, ...]] = {}
    for number, row in table.numbered():
        codes = tuple(_code(row[name], name, number, path) for name in names)
        if found.setdefault(name_of(row["id"]), codes) != codes:
            raise DataError(f"row {number}: id {row['id']!r} has other codes above", "keep one row", path=str(path))
    return names, {name: tuple(float(code == PRESENT) for code in codes) for name, codes in found.items()}


def _code(text: str, name: str, number: int, path: Path) -> float:
    try:
        value = float(text.strip() or 0)
    except ValueError:
        value = 99.0
    if value not in CODES:
        raise DataError(
            f"row {number}: {name} is {text!r}, no code",
            "write 1 (present), 0 (not mentioned), 2 (absent), 3 or -1 (uncertain)",
            path=str(path),
        )
    return value


def image_problems(places: Iterable[Path], *, full: bool = False) -> list[tuple[str, list[str]]]:
    """Kinds of problems with the images, each with what it concerns.

    Args:
        places: NIfTI files, or folders of slices.
        full: also read every image that is there.
    """
    from mg3d.scans.ctrg import read_ctrg

    missing: list[str] = []
    empty: list[str] = []
    damaged: list[str] = []
    for place in places:
        if not place.exists():
            missing.append(str(place))
        elif place.is_dir() and not any(each.suffix.lower() in SLICE_SUFFIXES for each in visible_files(place, "*")):
            empty.append(str(place))
        elif full:
            damaged += unreadable([place], read_ctrg)
    kinds = {"images are missing": missing, "folders hold no jpg or png slice": empty, "images are damaged": damaged}
    return [(what, names) for what, names in kinds.items() if names]
