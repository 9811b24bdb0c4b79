"""Pairs of volume and report for the evaluation: reports of the table, a CSV or packed rows, joined by name."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mg3d.datasets.report_text import ReportEncoding, encode_report, prepare_sections
from mg3d.errors import DataError
from tools.reports import Report, ReportTable
from tools.retrieval.table import EmbeddingTable

if TYPE_CHECKING:
    from mg3d.inference.model import MG3DModel

REPORTS_AT_ONCE = 32
_CT_RATE_NAME = re.compile(r"([A-Za-z]+_\d+)_[A-Za-z]+_\d+")


@dataclass(frozen=True)
class Pairs:
    """m pairs in the order of the table.

    Attributes:
        image: unit vectors [m, P].
        text: unit vectors [m, P]; zero rows for reports without words.
        reports: the reports, to group identical ones.
        patients: patient of each pair.
        left_out: rows of the table that have no report.
        patients_from: where the patients come from, in words.
    """

    image: np.ndarray
    text: np.ndarray
    reports: list[str]
    patients: list[str]
    left_out: int
    patients_from: str


def pairs_of_table(table: EmbeddingTable) -> Pairs:
    """Pairs of a table that holds the vectors of the reports too (made from packed rows).

    Raises:
        DataError: it does not.
    """
    table.need_shared_space()
    if table.text_vectors is None or not all(name in table.columns for name in ("report", "patient_id")):
        raise DataError("holds no reports", "name them with --reports, and give --weights", path=str(table.path))
    columns = table.columns
    return Pairs(table.vectors, table.text_vectors, columns["report"], columns["patient_id"], 0, "the table")


def pairs_with_reports(table: EmbeddingTable, reports: Path, model: MG3DModel, encoding: str = "") -> Pairs:
    """Pairs of a table and reports from elsewhere, encoded with the weights the table was made with.

    Every comma fragment counts whole as a sentence; training draws one sentence where a fragment holds several.

    Args:
        table: embeddings in the shared space.
        reports: CSV, ``.arrow`` file, or folder of them.
        model: the weights.
        encoding: of a CSV that is not UTF-8.

    Raises:
        DataError: other weights, no report fits, or names that do not tell two scans apart.
    """
    table.need_shared_space()
    table.need_weights(model.digest)
    lookup = ReportTable.open(reports, encoding)
    found = {row: lookup.match(name) for row, name in enumerate(table.ids)}
    rows = [row for row, key in found.items() if key is not None]
    if not rows:
        raise DataError(f"has a row for none of {len(table)} scans", "check the names of the scans", path=str(reports))
    twice = [key for key, count in Counter(found[row] for row in rows).items() if count > 1]
    if twice:
        raise DataError(f"{twice[0]!r} fits several scans", "write their folders into the table", path=str(reports))
    chosen = [lookup.report(table.ids[row]) for row in rows]
    encodings = [_encode(model, report) for report in chosen]
    patients, origin = _patients([table.ids[row] for row in rows], chosen)
    text = np.concatenate([_embed(model, part) for part in _portions(encodings)])
    texts = [encoding.text for encoding in encodings]
    return Pairs(table.vectors[rows], text, texts, patients, len(table) - len(rows), origin)


def _encode(model: MG3DModel, report: Report) -> ReportEncoding:
    sections = prepare_sections(report.findings, report.impression)
    fragments = report.fragments or (sections.findings_sen, sections.impression_sen)
    stored: Any = model.metadata.get("reports") or {}
    return encode_report(
        model.tokenizer,
        *fragments,
        max_text_len=model.network.options.max_text_len,
        sent_level=False,
        fragment_separator=stored.get("fragment_separator", "blank"),
    )


def _portions(encodings: Sequence[ReportEncoding]) -> Iterable[Sequence[ReportEncoding]]:
    from tqdm import tqdm

    starts = range(0, len(encodings), REPORTS_AT_ONCE)
    for start in tqdm(starts, desc="encode reports", unit="batch", dynamic_ncols=True):
        yield encodings[start : start + REPORTS_AT_ONCE]


def _embed(model: MG3DModel, encodings: Sequence[ReportEncoding]) -> np.ndarray:
    return model.encode_reports(list(encodings)).numpy()


def _patients(ids: Sequence[str], reports: Sequence[Report]) -> tuple[list[str], str]:
    if all(report.patient for report in reports):
        return [report.patient for report in reports], "the reports' table"
    names = [name.rstrip("/").rsplit("/", 1)[-1].split(".")[0] for name in ids]
    matches = [_CT_RATE_NAME.fullmatch(name) for name in names]
    if all(matches):
        return [match.group(1) for match in matches if match], "the scans' names"
    return list(ids), "nowhere: every scan counts as its own patient"
