"""Tables that people open in a spreadsheet: texts that look like formulas are inert, numbers stay numbers."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mg3d.datasets.labelled_reports import LabelledReports, read_labelled_reports, write_labelled_reports
from mg3d.files import read_csv
from mg3d.finetuning.comparison.table import Line, write_tables
from mg3d.finetuning.evaluation import write_rows as write_run_rows
from mg3d.finetuning.label_tables import write_label_tables
from mg3d.finetuning.text_labels.scores import write_files
from mg3d.metrics.captioning import score_captions
from tools.report_scores.pairs import Pairs
from tools.report_scores.scoring import write_per_case
from tools.retrieval.search import write_rows as write_answers
from tools.run_comparison import read_rows

EVIL = '=HYPERLINK("http://x")'
REPORTS = LabelledReports((EVIL, "-b"), ("@lungs", "+ clear"), np.array([[0, 1], [1, 0]], np.int8), ("-one", "=two"))


def run_rows(folder: Path) -> Path:
    write_run_rows(folder / "t.csv", [{"id": EVIL, "dice": -0.5, "text": "- none"}])
    return folder / "t.csv"


def answers(folder: Path) -> Path:
    write_answers(folder / "t.csv", [{"rank": 1, "similarity": -0.5, "id": EVIL, "report": "-no"}])
    return folder / "t.csv"


def per_case(folder: Path) -> Path:
    pairs = Pairs((EVIL, "b"), (("lungs clear",), ("heart",)), ("lungs", "heart"))
    scores = score_captions(pairs.references, pairs.hypotheses, ids=pairs.ids, meteor="none", rounds=0)
    write_per_case(folder / "t.csv", pairs, scores)
    return folder / "t.csv"


def comparison(folder: Path) -> Path:
    return write_tables([Line("MSD", "swin", EVIL, planned=1, runs=0, mean=-0.5)], folder)[0]


def labelled(folder: Path) -> Path:
    write_labelled_reports(folder / "t.csv", REPORTS)
    return folder / "t.csv"


def classifier(folder: Path) -> Path:
    write_files(folder, np.array([[0.2, 0.7], [0.8, 0.1]]), REPORTS)
    return folder / "per_case.csv"


def areas(folder: Path) -> Path:
    rows = [{"id": EVIL, f"target_{EVIL}": n, f"prob_{EVIL}": n / 2} for n in (0, 1)]
    write_label_tables(folder, rows, [EVIL])
    return folder / "aurocs.csv"


@pytest.mark.parametrize("write", [run_rows, answers, per_case, comparison, labelled, classifier, areas])
def test_no_cell_is_a_formula(write: Callable[[Path], Path], tmp_path: Path) -> None:
    path = write(tmp_path)
    with path.open(newline="", encoding="utf-8") as stream:
        cells = [cell for row in csv.reader(stream) for cell in row]
    assert any(cell.startswith(f"'{EVIL}") for cell in cells), "it is there, behind an apostrophe"
    for cell in cells:
        if cell[:1] in set("=+-@\t\r"):
            assert float(cell) < 0
    table = read_csv(path)
    assert EVIL in "".join([*table.columns, *(text for row in table.rows for text in row.values())]).replace("'", "")


def test_our_own_readers_give_the_names_back(tmp_path: Path) -> None:
    found = read_labelled_reports(labelled(tmp_path), REPORTS.names)
    assert (found.ids, found.texts, found.names) == (REPORTS.ids, REPORTS.texts, REPORTS.names)
    (row,) = read_rows(run_rows(tmp_path))
    assert row == {"id": EVIL, "dice": "-0.5", "text": "- none"}
