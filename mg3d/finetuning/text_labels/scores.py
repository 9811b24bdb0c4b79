"""Scores of a report labeller beside its baselines, and the files that show them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.metrics import classification_report, multilabel_confusion_matrix

from mg3d.atomic import atomic_path, write_text_atomically
from mg3d.datasets.keyword_labels import label_all_by_keywords
from mg3d.datasets.labelled_reports import LabelledReports
from mg3d.datasets.labels import CT_RATE_LABELS
from mg3d.files import write_csv
from mg3d.metrics.clinical import PROTOCOL, clinical_entries, finding_table
from mg3d.metrics.operating_point import multilabel_entries
from mg3d.metrics.retrieval import group_identical

CLASSIFIER = "classifier"
THRESHOLD = 0.5


def baseline_labels(test: LabelledReports, train: LabelledReports | None = None) -> dict[str, np.ndarray]:
    """What simple labellers say about the test reports, int8 [n, L] by name.

    ``keywords`` only for CT-RATE's findings; ``majority``: the commoner value in the training reports (absent, if there
    are none); ``all present``: the best that a constant can do for F1.
    """
    found = {"keywords": label_all_by_keywords(test.texts)} if test.names == CT_RATE_LABELS else {}
    share = train.labels.mean(axis=0) if train is not None else np.zeros(len(test.names))
    found["majority"] = np.tile((share > 0.5).astype(np.int8), (len(test), 1))
    found["all present"] = np.ones_like(test.labels)
    return found


def score_labels(
    probabilities: np.ndarray,
    test: LabelledReports,
    train: LabelledReports | None = None,
    *,
    rounds: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Score the classifier and its baselines on the same reports.

    Args:
        probabilities: [n, L].
        test: the reports with labels.
        train: for the majority.
        rounds: bootstrap rounds; identical reports are drawn together.
        seed: seed of the bootstrap.

    Returns:
        ``metrics`` (entries of ``metrics.json`` of the classifier), ``labellers`` (name -> ``ce_f1_macro`` entry and
        ``ce_f1_micro`` entry), ``table`` (a row per finding), ``protocol`` and ``notes``.
    """
    decided = (probabilities > THRESHOLD).astype(np.int8)
    groups = [str(number) for number in group_identical(test.texts)]
    settings: dict[str, Any] = {"rounds": rounds, "groups": groups, "seed": seed}
    everyone = {CLASSIFIER: decided, **baseline_labels(test, train)}
    scored = {name: clinical_entries(test.labels, found, test.names, **settings) for name, found in everyone.items()}
    metrics, notes = scored[CLASSIFIER]
    thresholds = np.full(len(test.names), THRESHOLD)
    ranked, more = multilabel_entries(probabilities.astype(float), test.labels, test.names, thresholds, **settings)
    metrics = {**metrics, "auroc": ranked["auroc"], "accuracy_all_findings": _exact(decided, test.labels)}
    kept = ("ce_f1_macro", "ce_f1_micro", "crg")
    return {
        "metrics": metrics,
        "labellers": {name: {key: entries[key] for key in kept} for name, (entries, _) in scored.items()},
        "table": _table(test, everyone),
        "protocol": {**PROTOCOL, "threshold": f"probability above {THRESHOLD}"},
        "notes": [*notes, *more],
    }


def _exact(decided: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    return {"mean": float((decided == labels).all(axis=1).mean()), "ci95": None, "n": len(labels)}


def _table(test: LabelledReports, everyone: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    columns = {name: finding_table(test.labels, found, test.names) for name, found in everyone.items()}
    return [
        {"finding": row["label"], "support": row["support"], **{name: rows[i]["f1"] for name, rows in columns.items()}}
        for i, row in enumerate(columns[CLASSIFIER])
    ]


def render(scores: Mapping[str, Any]) -> str:
    """The table for a reader: F1 per finding and labeller, then the macro means with intervals."""
    names = list(scores["labellers"])
    lines = [f"{'F1':32}{'support':>8}" + "".join(f"{name:>14}" for name in names)]
    for row in scores["table"]:
        values = "".join(f"{row[name]:14.3f}" for name in names)
        lines.append(f"{row['finding']:32}{row['support']:8}{values}")
    for key, shown in (("ce_f1_macro", "macro F1"), ("ce_f1_micro", "micro F1"), ("crg", "CRG")):
        entries = [scores["labellers"][name][key] for name in names]
        lines.append(f"{shown:40}" + "".join(_value(entry) for entry in entries))
        lines.append(f"{'  95 % interval':40}" + "".join(_interval(entry) for entry in entries))
    lines += [f"{name}: {text}" for name, text in scores["protocol"].items()]
    return "\n".join([*lines, *(f"note: {note}" for note in scores["notes"])])


def _value(entry: Mapping[str, Any]) -> str:
    return f"{'-':>14}" if entry["mean"] is None else f"{entry['mean']:14.3f}"


def _interval(entry: Mapping[str, Any]) -> str:
    return f"{'-':>14}" if entry["ci95"] is None else f"{'{:.3f}-{:.3f}'.format(*entry['ci95']):>14}"


def write_files(folder: Path, probabilities: np.ndarray, test: LabelledReports) -> None:
    """Write the published files and one row per case.

    ``per_case.csv`` (id, probabilities, truth), ``metrics_manual.csv`` (Label, Precision, Recall, F1 Score, Support,
    last row weighted by support), ``test_classification_report.txt``, ``test_confusion_matrix.npy`` [L, 2, 2].
    """
    decided = (probabilities > THRESHOLD).astype(np.int8)
    names = list(test.names)
    text = classification_report(test.labels, decided, target_names=names, zero_division=0, digits=4)
    write_text_atomically(folder / "test_classification_report.txt", text)
    with atomic_path(folder / "test_confusion_matrix.npy") as partial, partial.open("wb") as stream:
        np.save(stream, multilabel_confusion_matrix(test.labels, decided))
    rows = finding_table(test.labels, decided, names)
    columns = ("precision", "recall", "f1")
    weighted = [_weighted([row[key] for row in rows], [row["support"] for row in rows]) for key in columns]
    lines = [[row["label"], *(row[key] for key in columns), row["support"]] for row in rows]
    lines.append(["Weighted Average", *weighted, sum(row["support"] for row in rows)])
    write_csv(folder / "metrics_manual.csv", ["Label", "Precision", "Recall", "F1 Score", "Support"], lines)
    header = ["id", *(f"p_{name}" for name in names), *(f"true_{name}" for name in names)]
    found = zip(test.ids, probabilities, test.labels, strict=True)
    cases = [[name, *(f"{p:.6f}" for p in p_L), *(int(v) for v in truth_L)] for name, p_L, truth_L in found]
    write_csv(folder / "per_case.csv", header, cases)


def _weighted(values: list[float], support: list[int]) -> float:
    return float(np.average(values, weights=support)) if sum(support) else 0.0
