"""What ``tools/score_reports.py`` computes, and how it is shown and written."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mg3d.errors import DataError, EnvironmentProblem
from mg3d.files import write_csv
from mg3d.metrics.captioning import CaptionScores, score_captions
from mg3d.metrics.clinical import PROTOCOL as CLINICAL_PROTOCOL
from mg3d.metrics.clinical import clinical_entries
from tools.report_scores.pairs import Pairs, match_label_tables, read_pairs

KEYWORDS = "keywords"


def score(options: argparse.Namespace) -> dict[str, Any]:
    """Score what the options name.

    Args:
        options: parsed command line.

    Returns:
        ``metrics`` (name -> mean, ci95, n), ``protocol``, ``notes``, ``cases``.

    Raises:
        MG3DError: bad input, or an optional scorer that is asked for and missing.
    """
    pairs = read_pairs(options.pairs, options.encoding)
    groups = _patients(pairs, options.patient_pattern)
    more = [_clinical(options, pairs, groups)] if options.labels or options.labeller else []
    more += [_radeval(options, pairs)] if options.radeval else []
    scores = score_captions(
        pairs.references,
        pairs.hypotheses,
        ids=pairs.ids,
        pretokenised=options.pretokenised,
        meteor=options.meteor,
        meteor_timeout_s=options.meteor_timeout,
        rounds=options.rounds,
        groups=groups,
        seed=options.seed,
    )
    result = {"cases": scores.cases, "metrics": scores.entries(), "protocol": dict(scores.protocol)}
    if options.rounds:
        unit = "patients" if options.patient_pattern else "cases"
        result["protocol"]["ci95"] = f"percentile bootstrap over {unit}, {options.rounds} rounds, seed {options.seed}"
    for part in more:
        result["metrics"] |= part["metrics"]
        result["protocol"] |= part["protocol"]
    if options.per_case:
        write_per_case(options.per_case, pairs, scores)
    return {**result, "notes": [*scores.notes, *(note for part in more for note in part["notes"])]}


def _patients(pairs: Pairs, pattern: Any) -> list[str] | None:
    """Patient of each case, by the first group of a pattern on its id."""
    if pattern is None:
        return None
    found = [pattern.search(name) for name in pairs.ids]
    lost = [name for name, match in zip(pairs.ids, found, strict=True) if match is None]
    if lost:
        raise DataError(f"--patient-pattern does not fit {len(lost)} ids, e.g. {lost[0]!r}", "mend the pattern")
    return [match[1] for match in found]


def _clinical(options: argparse.Namespace, pairs: Pairs, groups: list[str] | None) -> dict[str, Any]:
    notes: list[str] = []
    if options.labels:
        ids, names, truth, predicted = match_label_tables(*options.labels, options.encoding)
        if set(ids) != set(pairs.ids):
            notes.append(f"labels are of {len(ids)} cases that are not the {len(pairs.ids)} scored texts")
        place = dict(zip(pairs.ids, groups, strict=True)) if groups else {}
        groups = [place.get(name, name) for name in ids]
        labeller = "label tables: " + " and ".join(path.name for path in options.labels)
    else:
        names, truth, predicted = label_texts(options.labeller, pairs)
        labeller = f"{options.labeller}; several references of a case are labelled as one text"
    rounds = max(1, options.rounds)
    entries, more = clinical_entries(truth, predicted, names, rounds=rounds, groups=groups, seed=options.seed)
    for entry in entries.values() if not options.rounds else ():
        entry["ci95"] = None
    return {
        "metrics": entries,
        "protocol": {"labeller": labeller, **CLINICAL_PROTOCOL},
        "notes": [*notes, *more],
    }


def label_texts(labeller: str, pairs: Pairs) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Findings of both sides.

    Args:
        labeller: ``keywords``, or the folder of a trained report classifier.
        pairs: the texts.

    Returns:
        findings [L], labels of the references [D, L] and of the generated texts [D, L].
    """
    references = [" ".join(texts) for texts in pairs.references]
    if labeller == KEYWORDS:
        from mg3d.datasets.keyword_labels import label_all_by_keywords
        from mg3d.datasets.labels import CT_RATE_LABELS

        return list(CT_RATE_LABELS), label_all_by_keywords(references), label_all_by_keywords(pairs.hypotheses)
    if not Path(labeller).expanduser().is_dir():
        raise DataError(
            f"--labeller {labeller}: no such folder", f"give {KEYWORDS} or the best/ folder of a classifier"
        )
    from mg3d.datasets.labelled_reports import split_report
    from mg3d.models.finetune.text_classifier import ReportLabeller

    classifier = ReportLabeller.load(Path(labeller).expanduser(), split_report)
    found = (classifier.label(texts) for texts in (references, pairs.hypotheses))
    truth, predicted = found
    return list(classifier.options.findings), truth, predicted


def _radeval(options: argparse.Namespace, pairs: Pairs) -> dict[str, Any]:
    from mg3d.metrics.clinical_radeval import radeval_scores

    if any(len(texts) > 1 for texts in pairs.references):
        raise EnvironmentProblem("RadEval takes one reference per case", "leave --radeval out")
    found = radeval_scores([texts[0] for texts in pairs.references], pairs.hypotheses, options.radeval)
    plain = {name: value for name, value in found.items() if isinstance(value, (int, float))}
    return {
        "metrics": {name: {"mean": value, "ci95": None, "n": len(pairs.ids)} for name, value in plain.items()},
        "protocol": {"radeval": f"RadEval: {', '.join(options.radeval)}"},
        "notes": [],
    }


def write_per_case(path: Path, pairs: Pairs, scores: CaptionScores) -> None:
    """Write one row per case: id and every computed metric."""
    columns = scores.per_case.values()
    rows = ([name, *(f"{column[n]:.6f}" for column in columns)] for n, name in enumerate(pairs.ids))
    write_csv(path, ["id", *scores.per_case], rows)


def render(result: Mapping[str, Any]) -> str:
    """The numbers with their protocol for a reader."""
    lines = [f"{result['cases']} cases"]
    for name, entry in result["metrics"].items():
        value = "not computed" if entry["mean"] is None else f"{entry['mean']:.6f}"
        between = "" if entry["ci95"] is None else "  95 % {:.4f} to {:.4f}".format(*entry["ci95"])
        floor = f"  (floor {entry['floor']:.4f})" if "floor" in entry else ""
        lines.append(f"{name:22}{value:>14}{between}{floor}")
    lines += [f"{name}: {text}" for name, text in result["protocol"].items()]
    return "\n".join([*lines, *(f"note: {note}" for note in result["notes"])])


def warn(result: Mapping[str, Any]) -> None:
    """Repeat the notes on standard error, for those who read only the JSON."""
    for note in result["notes"]:
        sys.stderr.write(f"note: {note}\n")
