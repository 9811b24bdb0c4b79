"""Neighbours of a query among the rows of a table, and how they are told."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mg3d.atomic import atomic_path
from mg3d.errors import DataError
from mg3d.files import write_csv
from tools.retrieval.table import EmbeddingTable

REPORT_CHARACTERS = 70
OUT_SUFFIXES = (".json", ".csv")


def nearest(
    table: EmbeddingTable, query_P: np.ndarray, top: int, *, leave_out: int | None = None
) -> list[dict[str, Any]]:
    """The rows with the largest cosine, best first; ties in the order of the table.

    Args:
        table: rows to search.
        query_P: a vector of the table's width, any length but zero.
        top: how many.
        leave_out: a row that is no answer: the query itself.

    Raises:
        DataError: a query of another width, or zero.
    """
    if query_P.shape != table.vectors.shape[1:] or not np.linalg.norm(query_P) > 0:
        width, wanted = query_P.shape, table.vectors.shape[1:]
        raise DataError(f"the query has shape {width}, the table {wanted}", "give the weights the table was made with")
    similarity = table.vectors @ (query_P / np.linalg.norm(query_P))
    order = [int(row) for row in np.argsort(-similarity, kind="stable") if row != leave_out][:top]
    return [_answer(table, row, rank, float(similarity[row])) for rank, row in enumerate(order, start=1)]


def _answer(table: EmbeddingTable, row: int, rank: int, similarity: float) -> dict[str, Any]:
    found = {"rank": rank, "similarity": round(similarity, 4), "id": table.ids[row]}
    return found | {name: values[row] for name, values in table.columns.items() if values[row]}


def render_answers(answers: Sequence[Mapping[str, Any]]) -> str:
    """Lines of a text table: rank, similarity, id, begin of the report."""
    width = max([len(str(answer["id"])) for answer in answers] + [2])
    head = f"{'rank':>4}  {'cosine':>7}  {'id'.ljust(width)}"
    lines = [f"{head}  report" if any("report" in answer for answer in answers) else head]
    for answer in answers:
        report = answer.get("report", "")
        short = report if len(report) <= REPORT_CHARACTERS else report[: REPORT_CHARACTERS - 1] + "\u2026"
        lines.append(f"{answer['rank']:>4}  {answer['similarity']:>7.4f}  {answer['id']:<{width}}  {short}".rstrip())
    return "\n".join(lines)


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as JSON or CSV, by the ending of the file; a crash leaves no half of it.

    Args:
        path: ``.json`` (a list of objects) or ``.csv``.
        rows: plain values; columns are all keys in order of appearance.
    """
    if path.suffix != ".json":
        write_csv(path, list(dict.fromkeys(key for row in rows for key in row)), rows)
        return
    with atomic_path(path) as temporary:
        text = json.dumps(list(rows), indent=1, ensure_ascii=False) + "\n"
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def check_out(path: Path | None) -> None:
    """Raise DataError for a file to write that is neither JSON nor CSV, or whose folder does not exist."""
    if path is None:
        return
    if path.suffix not in OUT_SUFFIXES or path.is_dir():
        raise DataError("is neither .json nor .csv", "choose such a name for --out", path=str(path))
    if not path.parent.is_dir():
        raise DataError("no such folder", "make it, or mend --out", path=str(path.parent))
