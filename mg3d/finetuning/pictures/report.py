"""One self-contained HTML page for a run: results with intervals, pictures, cases, and how it was made."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mg3d.finetuning.names import BASELINES
from mg3d.finetuning.pictures.page import TEMPLATE

MAX_ROWS = 500
FILES = ("weights_report.json", "config.json", "environment.json")
MAX_PART_CHARACTERS = 40_000
DASH = "-"
DETAILS = "Sub-groups and other checkpoints"
FLOOR = " (floor {})"


def write_report(
    run_dir: Path,
    metrics: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    figures: Mapping[str, Path] | None = None,
    *,
    title: str = "",
) -> Path:
    """Write ``report.html`` into the folder of a run.

    Args:
        run_dir: folder of the run; its weights report, config and environment are shown where they exist.
        metrics: content of ``metrics.json``. An entry with ``mean`` becomes a row of the results (``per_class`` its
            columns), of a folded second table where its name has a slash (sub-groups, other checkpoints); those of
            `BASELINES` stand beside the generator's in a table of their own; ``definitions`` follow the tables;
            ``notes`` and ``warnings`` are set off; other plain values stand below the title.
        rows: rows of ``per_case.csv``.
        figures: caption -> PNG; a picture that is missing is left out.
        title: name of the run; that of its folder and the one above otherwise.

    Returns:
        the page.
    """
    from jinja2 import Environment

    from mg3d.atomic import write_text_atomically

    entries = {name: value for name, value in metrics.items() if isinstance(value, Mapping) and "mean" in value}
    classes = list(dict.fromkeys(name for entry in entries.values() for name in entry.get("per_class") or {}))
    columns = list(dict.fromkeys(name for row in rows for name in row))
    page = Environment(autoescape=True).from_string(TEMPLATE)
    text = page.render(
        title=title or "/".join(run_dir.resolve().parts[-2:]),
        facts=[f"{name}: {_text(value)}" for name, value in metrics.items() if isinstance(value, (str, int, float))],
        notes=[str(note) for key in ("notes", "warnings") for note in _listed(metrics.get(key))],
        tables=_tables(entries, classes),
        beside=_beside(entries),
        definitions=metrics.get("definitions") or {},
        classes=classes,
        figures=[
            {"caption": caption, "data": base64.b64encode(path.read_bytes()).decode("ascii")}
            for caption, path in (figures or {}).items()
            if path.is_file()
        ],
        columns=columns,
        rows=[[_text(row.get(name)) for name in columns] for row in rows[:MAX_ROWS]],
        hidden=max(len(rows) - MAX_ROWS, 0),
        parts=[{"name": name, "text": _file_text(run_dir / name)} for name in FILES if (run_dir / name).is_file()],
    )
    path = run_dir / "report.html"
    write_text_atomically(path, text)
    return path


def _tables(entries: Mapping[str, Mapping[str, Any]], classes: Sequence[str]) -> list[dict[str, Any]]:
    """The results, then what they are made up of; neither when empty."""
    rows: dict[str, list[dict[str, Any]]] = {"": [], DETAILS: []}
    for name, entry in entries.items():
        if name.split("/")[0] not in BASELINES:
            rows[DETAILS if "/" in name else ""].append(_metric_row(name, entry, classes))
    return [{"name": name, "rows": found} for name, found in rows.items() if found]


def _beside(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, list[Any]]:
    """A generator's figures with those of its baselines: titles of the columns, and rows of name and cells."""
    named = [name.split("/", 1) for name in entries]
    metrics = dict.fromkeys(rest[0] for first, *rest in named if first in BASELINES)
    columns = {prefix: title for prefix, title in BASELINES.items() if any(prefix == first for first, *_ in named)}
    rows = []
    for metric in metrics:
        cells = [_cell(entries.get(key)) for key in (metric, *(f"{prefix}/{metric}" for prefix in columns))]
        floor = next((e["floor"] for name, e in entries.items() if name.endswith(metric) and "floor" in e), None)
        rows.append((metric + ("" if floor is None else FLOOR.format(_text(floor))), cells))
    return {"columns": ["generator", *columns.values()], "rows": rows}


def _cell(entry: Mapping[str, Any] | None) -> tuple[str, str]:
    """Mean and interval of a cell."""
    if entry is None:
        return DASH, ""
    interval = entry.get("ci95")
    return _text(entry["mean"]), f"{_text(interval[0])} to {_text(interval[1])}" if interval else ""


def _metric_row(name: str, entry: Mapping[str, Any], classes: Sequence[str]) -> dict[str, Any]:
    interval = entry.get("ci95")
    per_class = entry.get("per_class") or {}
    values = (per_class.get(each) for each in classes)
    floor = FLOOR.format(_text(entry["floor"])) if "floor" in entry else ""
    return {
        "name": name + floor,
        "mean": _text(entry["mean"]),
        "interval": f"{_text(interval[0])} to {_text(interval[1])}" if interval else DASH,
        "n": _text(entry.get("n")),
        "classes": [_text(value.get("mean") if isinstance(value, Mapping) else value) for value in values],
    }


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _text(value: Any) -> str:
    """Short text of a table cell; a dash for what is undefined."""
    if value is None or value == "":
        return DASH
    if isinstance(value, float):
        if math.isnan(value):
            return DASH
        return f"{value:.4g}" if abs(value) >= 1000 or value == 0 or not math.isfinite(value) else f"{value:.4f}"
    return str(value)


def _file_text(path: Path) -> str:
    """JSON with two blanks of indentation, cut when very long."""
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        text = json.dumps(json.loads(text), indent=2, ensure_ascii=False)
    except json.JSONDecodeError:
        pass
    if len(text) > MAX_PART_CHARACTERS:
        return f"{text[:MAX_PART_CHARACTERS]}\n... {len(text) - MAX_PART_CHARACTERS} more characters in {path.name}"
    return text
