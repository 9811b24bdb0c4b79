"""Beside every generator: the report a label classifier would lead to, and the best report that says the same of all.

Both are scored by the generator's metrics. A generator that is not better than the first has learnt style, not
findings. Everything here works on plain lists, so that any program can ask for it; n cases, m training reports, L
findings, d features.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mg3d.datasets.labelled_reports import split_report
from mg3d.errors import DataError
from mg3d.finetuning.names import CONSTANT, LABEL_TO_REPORT
from mg3d.metrics.captioning import MeteorKind, score_captions
from mg3d.metrics.clinical import clinical_entries, clinical_scores
from mg3d.metrics.probe import multiclass_probe_probabilities
from mg3d.models.finetune.label_report import FALLBACK, ReportTemplates, learn_templates, write_report_from_labels

__all__ = [
    "Beside",
    "best_constant",
    "best_threshold",
    "probe_probabilities",
    "score_beside",
    "stated_table",
]

Reader = Callable[[str], Collection[str]]
"""What a text states, as names of findings."""

DEFAULT_THRESHOLD = 0.5
LEAST_POSITIVES = 20
"""Labels that must be present in the selection cases before a threshold is chosen on them."""


@dataclass
class Beside:
    """The baselines of a run.

    Attributes:
        entries: metric -> mean, ci95, n; keys ``label_to_report/...`` and ``constant_report/...``, and without prefix
            those of the generator, if its reports were given.
        notes: how the baselines were made.
        texts: baseline -> its report of every case.
    """

    entries: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    texts: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class _Scorer:
    """The metrics that all three columns share."""

    references: Sequence[str]
    findings: Sequence[str]
    reader: Reader | None
    ids: Sequence[str] | None
    patients: Sequence[str] | None
    pretokenised: bool
    meteor: MeteorKind
    rounds: int
    seed: int

    def wording(self, texts: Sequence[str]) -> tuple[dict[str, dict[str, Any]], list[str]]:
        scores = score_captions(
            self.references,
            texts,
            ids=self.ids,
            pretokenised=self.pretokenised,
            meteor=self.meteor,
            rounds=self.rounds,
            groups=self.patients,
            seed=self.seed,
        )
        return scores.entries(), list(scores.notes)

    def all_of(
        self, texts: Sequence[str], truth: np.ndarray | None, stated: np.ndarray | None = None
    ) -> tuple[dict[str, dict[str, Any]], list[str]]:
        """Wording, and where findings can be read, which of them are stated (``stated`` replaces the reading)."""
        entries, notes = self.wording(texts)
        if truth is None:
            return entries, notes
        found = stated_table(texts, self.reader, self.findings) if stated is None else stated
        clinical, more = clinical_entries(
            truth, found, self.findings, rounds=max(1, self.rounds), groups=self.patients, seed=self.seed
        )
        for entry in clinical.values() if not self.rounds else ():
            entry["ci95"] = None
        return entries | clinical, notes + more


def score_beside(
    references: Sequence[str],
    probabilities: np.ndarray,
    findings: Sequence[str],
    train_texts: Sequence[str],
    train_labels: np.ndarray,
    *,
    hypotheses: Sequence[str] | None = None,
    labels: np.ndarray | None = None,
    threshold: float = DEFAULT_THRESHOLD,
    reader: Reader | None = None,
    clean: Callable[[str], str] | None = None,
    ids: Sequence[str] | None = None,
    patients: Sequence[str] | None = None,
    pretokenised: bool = False,
    meteor: MeteorKind = "none",
    rounds: int = 1000,
    seed: int = 0,
) -> Beside:
    """Write both baselines and score them like the generator.

    Sentences come from the training reports alone: of each finding the one that goes with it most clearly (with a
    ``reader`` only sentences that state this finding and no other), and background sentences that state nothing.

    Args:
        references: n reports that were to be written.
        probabilities: [n, L] what an image classifier says of the n cases.
        findings: L names.
        train_texts: m training reports.
        train_labels: [m, L] of 0 and 1.
        hypotheses: n generated reports; given, the generator's own figures are computed as well.
        labels: [n, L] findings of the n cases where a table has them; None: those that the reader finds in the
            references. Texts and the classifier (``label_to_report/classifier_f1_micro``) are held against them.
        threshold: probability from which on a finding is written; see `best_threshold`.
        reader: findings that a text states, out of ``findings``. Without one there are no clinical figures.
        clean: brings a text into the form of the references, such as a tokenizer's cleaning.
        ids: names of the cases, for messages.
        patients: patient of each case for the bootstrap.
        pretokenised: as in `score_captions`.
        meteor: as in `score_captions`.
        rounds: bootstrap rounds; 0: no intervals.
        seed: seed of the bootstrap.

    Returns:
        Entries, notes and texts.

    Raises:
        DataError: lists or arrays that do not fit each other.
    """
    chances = np.asarray(probabilities, dtype=np.float64)
    _check(references, chances, findings, hypotheses, labels)
    scorer = _Scorer(references, findings, reader, ids, patients, pretokenised, meteor, rounds, seed)
    tidy = clean or str.strip
    templates = _templates(train_texts, np.asarray(train_labels), findings, reader, tidy)
    known = labels if labels is not None or reader is None else stated_table(references, reader, findings)
    truth = np.asarray(known) if reader is not None else None
    constant = best_constant(np.asarray(train_labels if known is None else known) == 1)
    written = [tidy(write_report_from_labels(row, templates, threshold)) for row in chances]
    same = [tidy(write_report_from_labels(constant, templates))] * len(references)
    found = Beside(texts={LABEL_TO_REPORT: written, CONSTANT: same})
    if hypotheses is not None:
        found.entries, found.notes = scorer.all_of(hypotheses, truth)
    found.entries |= _named(LABEL_TO_REPORT, scorer.all_of(written, truth)[0])
    fixed = np.tile(
        constant, (len(references), 1)
    )  # what it states by definition, whatever a reader makes of its words
    found.entries |= _named(CONSTANT, scorer.all_of(same, truth, fixed)[0])
    if known is not None:
        f1 = clinical_scores(np.asarray(known), chances >= threshold)["ce_f1_micro"]
        found.entries[f"{LABEL_TO_REPORT}/classifier_f1_micro"] = {"mean": f1, "ci95": None, "n": len(references)}
    found.notes += _notes(templates, constant, len(train_texts), threshold, known is None)
    return found


def _templates(
    texts: Sequence[str],
    labels: np.ndarray,
    findings: Sequence[str],
    reader: Reader | None,
    tidy: Callable[[str], str],
) -> ReportTemplates:
    def labeller(text: str) -> np.ndarray:
        return stated_table([text], reader, findings)[0]

    sentences = [split_report(tidy(text)) for text in texts]
    return learn_templates(sentences, labels, findings, labeller if reader is not None else None)


def _named(name: str, entries: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {f"{name}/{key}": entry for key, entry in entries.items()}


def _notes(
    templates: ReportTemplates, constant: np.ndarray, reports: int, threshold: float, from_training: bool
) -> list[str]:
    plain = sum(
        each.text == FALLBACK.format(finding=name)
        for name, each in zip(templates.findings, templates.present, strict=True)
    )
    own = len(templates.findings) - plain
    stated = [name for name, value in zip(templates.findings, constant, strict=True) if value]
    where = "the training labels" if from_training else "these very references"
    return [
        f"{LABEL_TO_REPORT}: findings with a probability of at least {threshold:.3g}, in sentences of {reports} "
        f"training reports; {own} of {len(templates.findings)} findings have a sentence of their own there, the "
        "others are named plainly",
        f"{CONSTANT}: one report for all cases; it names the findings with the highest micro F1 on {where}: "
        f"{', '.join(stated) or 'none'}",
    ]


def _check(
    references: Sequence[str],
    probabilities: np.ndarray,
    findings: Sequence[str],
    hypotheses: Sequence[str] | None,
    labels: np.ndarray | None,
) -> None:
    wanted = (len(references), len(findings))
    for what, shape in (("probabilities", probabilities.shape), ("labels", wanted if labels is None else labels.shape)):
        if shape != wanted:
            raise DataError(f"{what} {shape} for {wanted[0]} reports and {wanted[1]} findings", "give one per case")
    if hypotheses is not None and len(hypotheses) != len(references):
        raise DataError(f"{len(hypotheses)} generated reports for {len(references)} references", "give one per case")


def stated_table(texts: Sequence[str], reader: Reader | None, findings: Sequence[str]) -> np.ndarray:
    """Findings that texts state, 0 or 1, [n, L].

    Raises:
        ValueError: there is no reader.
    """
    if reader is None:
        raise ValueError("there is no reader of findings")
    read = [reader(text) for text in texts]
    return np.asarray([[int(name in found) for name in findings] for found in read]).reshape(len(read), -1)


def best_constant(truth: np.ndarray) -> np.ndarray:
    """The findings that one report for all cases must state to reach the highest micro F1.

    Args:
        truth: 0 or 1, [n, L].

    Returns:
        0 or 1, [L]: the k most frequent findings, for the best k; none where no case has any.
    """
    counts = np.asarray(truth).astype(int).sum(axis=0)
    order = np.argsort(-counts, kind="stable")
    f1 = _f1_of_the_first(counts[order], np.full(len(counts), len(truth)))
    chosen = np.zeros(len(counts), dtype=int)
    if counts.any():
        chosen[order[: int(f1.argmax()) + 1]] = 1
    return chosen


def best_threshold(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """The one threshold for all findings with the highest micro F1 on selection cases.

    Args:
        labels: [n, L] of 0 and 1, of cases that are not reported.
        probabilities: [n, L].

    Returns:
        A value halfway between two probabilities; 0.5 where fewer than `LEAST_POSITIVES` labels are present.
    """
    truth, chances = np.asarray(labels).ravel() == 1, np.asarray(probabilities, dtype=np.float64).ravel()
    if truth.sum() < LEAST_POSITIVES:
        return DEFAULT_THRESHOLD
    order = np.argsort(-chances, kind="stable")
    ranked = np.append(chances[order], 0.0)
    f1 = _f1_of_the_first(truth[order].astype(int), np.ones(len(order), dtype=int))
    f1[ranked[:-1] == ranked[1:]] = -1.0  # equal probabilities cannot be told apart
    best = int(f1.argmax())
    return float(ranked[best : best + 2].mean())


def _f1_of_the_first(hits: np.ndarray, stated: np.ndarray) -> np.ndarray:
    """Micro F1 of stating the first k groups of slots, for every k: right ones and slots of each group given."""
    return 2 * hits.cumsum() / np.maximum(stated.cumsum() + hits.sum(), 1)


def probe_probabilities(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    train_patients: Sequence[str],
    features: Sequence[np.ndarray],
    seed: int = 0,
) -> tuple[list[np.ndarray], list[int]]:
    """A linear probe of every finding on frozen features, for generators without a label head.

    Args:
        train_features: [m, d].
        train_labels: [m, L] of 0 and 1.
        train_patients: patient of each training case.
        features: arrays [n, d] of the cases to label, such as those of selection and of reporting.
        seed: seed of the folds that choose the regularisation, by the likelihood of left-out patients.

    Returns:
        probabilities [n, L] of each array, and the findings that too few training patients have: 0 everywhere.
    """
    groups, stacked = np.asarray(list(train_patients)), np.concatenate(list(features))
    columns, rare = [], []
    for number, targets in enumerate(np.asarray(train_labels).astype(int).T):
        found = multiclass_probe_probabilities(train_features, targets, groups, stacked, 2, seed)
        if found is None:
            rare.append(number)
        columns.append(np.zeros(len(stacked)) if found is None else found[:, 1])
    ends = np.cumsum([len(each) for each in features])[:-1]
    return np.split(np.stack(columns, axis=1), ends), rare
