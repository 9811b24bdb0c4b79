"""Label-to-report baseline: write what the classifier finds, in sentences that training reports use.

A generator that is not better than this has learnt style, not findings. n reports, L findings, S distinct sentences.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mg3d.errors import DataError

Labeller = Callable[[str], np.ndarray]

FALLBACK = "{finding} is present."
MIN_COUNT = 2
MIN_SHARE = 0.02
"""Share of the training reports that a sentence without findings must occur in to be written into others."""
_TOO_ALIKE = 0.5
_CONTRADICTS = 0.25
_ENOUGH = 4.0
_SHORTEST_WORD = 4
_COMMON = 3


@dataclass(frozen=True)
class Template:
    """A sentence to write.

    Attributes:
        text: the sentence as the training reports write it most often.
        position: mean place in its reports, 0 first, 1 last.
        barred: findings that forbid it ("Heart size is normal." with cardiomegaly); empty for a finding's own sentence.
    """

    text: str
    position: float
    barred: tuple[int, ...] = ()


@dataclass(frozen=True)
class ReportTemplates:
    """What the baseline learnt.

    Attributes:
        findings: the L names.
        present: one sentence per finding [L].
        background: sentences of reports without these findings, most frequent first.
        length: sentences of a report (median of the training reports).
    """

    findings: tuple[str, ...]
    present: tuple[Template, ...]
    background: tuple[Template, ...]
    length: int

    def to_json(self) -> dict[str, Any]:
        """Plain types, for a file."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> ReportTemplates:
        """The inverse of :meth:`to_json`."""
        present, background = (
            tuple(Template(row["text"], row["position"], tuple(row["barred"])) for row in content[key])
            for key in ("present", "background")
        )
        return cls(tuple(content["findings"]), present, background, int(content["length"]))


def learn_templates(
    reports: Sequence[Sequence[str]], labels: np.ndarray, findings: Sequence[str], labeller: Labeller | None = None
) -> ReportTemplates:
    """Learn the sentences of the baseline from training reports.

    For each finding the sentence that goes with it most clearly (signed G statistic of sentence and label), counted at
    least twice; with a ``labeller`` only sentences that state this finding and no other. A finding without such a
    sentence gets "<finding> is present.". Background sentences are the frequent ones that state nothing. One is barred
    beside a finding when it occurs less than a quarter as often with it (and was to be expected four times at least),
    or when it is rarer with it and speaks of the same thing ("Heart size is normal." beside "Heart size increased.").

    Args:
        reports: sentences of n training reports.
        labels: [n, L] of 0 and 1.
        findings: L names.
        labeller: sentence -> [L]; without one the label statistics alone decide.

    Raises:
        DataError: no report, or labels of another shape.
    """
    truth = np.asarray(labels) == 1
    if not reports or truth.shape != (len(reports), len(findings)):
        raise DataError(f"{len(reports)} reports and labels {truth.shape}", "give one row of labels per report")
    table = _SentenceTable(reports, truth)
    stated = table.stated(labeller)
    present = tuple(_present(table, stated, number, name) for number, name in enumerate(findings))
    background = _background(table, stated, _topics(findings, present))
    length = int(np.median([len(sentences) for sentences in reports]))
    return ReportTemplates(tuple(findings), present, background, max(1, length))


def write_report_from_labels(
    scores: np.ndarray, templates: ReportTemplates, thresholds: float | np.ndarray = 0.5
) -> str:
    """Write the report of one case.

    Args:
        scores: labels or probabilities [L]; at or above the threshold a finding is written.
        templates: of :func:`learn_templates`.
        thresholds: one value, or [L].

    Returns:
        Sentences of the findings and, up to the usual length, background sentences they do not bar, in the usual order.

    Raises:
        DataError: another number of scores, or one that is not finite.
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.shape != (len(templates.findings),) or not np.isfinite(values).all():
        raise DataError(f"scores {values.shape} for {len(templates.findings)} findings", "give one finite score each")
    found = np.flatnonzero(values >= np.asarray(thresholds))
    chosen = [templates.present[number] for number in found]
    allowed = [template for template in templates.background if not set(template.barred) & set(found.tolist())]
    chosen += allowed[: max(1, templates.length - len(chosen))]
    return " ".join(template.text for template in sorted(chosen, key=lambda template: template.position))


class _SentenceTable:
    """How often each distinct sentence occurs beside each finding."""

    def __init__(self, reports: Sequence[Sequence[str]], truth: np.ndarray) -> None:
        self.reports, self.truth = len(reports), truth
        forms: dict[str, Counter[str]] = defaultdict(Counter)
        places: dict[str, list[float]] = defaultdict(list)
        rows: dict[str, set[int]] = defaultdict(set)
        for row, sentences in enumerate(reports):
            for place, sentence in enumerate(sentences):
                key = _key(sentence)
                forms[key][sentence] += 1
                places[key].append(place / max(1, len(sentences) - 1))
                rows[key].add(row)
        self.keys = sorted((key for key in rows if len(rows[key]) >= MIN_COUNT), key=lambda k: (-len(rows[k]), k))
        self.texts = [min(forms[key].items(), key=lambda item: (-item[1], item[0]))[0] for key in self.keys]
        self.positions = [float(np.mean(places[key])) for key in self.keys]
        self.occurs = np.zeros((len(self.keys), len(reports)), dtype=bool)
        for number, key in enumerate(self.keys):
            self.occurs[number, sorted(rows[key])] = True

    def stated(self, labeller: Labeller | None) -> np.ndarray | None:
        """Findings that each sentence states by itself [S, L]."""
        if labeller is None:
            return None
        if not self.texts:
            return np.zeros((0, self.truth.shape[1]), dtype=bool)
        return np.stack([np.asarray(labeller(text)) == 1 for text in self.texts])

    def shares(self, finding: int) -> tuple[np.ndarray, np.ndarray]:
        """Share of the reports with and without a finding that hold each sentence, one half added to every count."""
        true = self.truth[:, finding]
        with_finding = (self.occurs[:, true].sum(axis=1) + 0.5) / (true.sum() + 1.0)
        without = (self.occurs[:, ~true].sum(axis=1) + 0.5) / ((~true).sum() + 1.0)
        return with_finding, without


def _present(table: _SentenceTable, stated: np.ndarray | None, finding: int, name: str) -> Template:
    with_finding, without = table.shares(finding)
    hits = table.occurs[:, table.truth[:, finding]].sum(axis=1)
    score = np.where(hits >= MIN_COUNT, hits * np.log(with_finding / without), -np.inf)
    if stated is not None:
        alone = stated[:, finding] & (stated.sum(axis=1) == 1)
        score = np.where(alone, score, -np.inf)
    best = int(np.argmax(score)) if score.size else -1
    if best < 0 or not np.isfinite(score[best]) or score[best] <= 0:
        return Template(FALLBACK.format(finding=name), 0.5)
    return Template(table.texts[best], table.positions[best])


def _background(table: _SentenceTable, stated: np.ndarray | None, topics: Sequence[set[str]]) -> tuple[Template, ...]:
    shares = [table.shares(finding) for finding in range(table.truth.shape[1])]
    ratios = np.stack([with_finding / without for with_finding, without in shares])
    expected = np.stack([without for _, without in shares]) * table.truth.sum(axis=0)[:, None]
    chosen: list[Template] = []
    words: list[set[str]] = []
    for number, key in enumerate(table.keys):
        if table.occurs[number].sum() < max(MIN_COUNT, MIN_SHARE * table.reports):
            continue
        if stated[number].any() if stated is not None else (ratios[:, number] > 2).any():
            continue
        own = set(key.split())
        if any(len(own & other) > _TOO_ALIKE * min(len(own), len(other)) for other in words):
            continue
        absent = (ratios[:, number] < _CONTRADICTS) & (expected[:, number] >= _ENOUGH)
        same_thing = np.asarray([bool(own & topic) for topic in topics]) & (ratios[:, number] < 1)
        barred = tuple(int(finding) for finding in np.flatnonzero(absent | same_thing))
        chosen.append(Template(table.texts[number], table.positions[number], barred))
        words.append(own)
    return tuple(chosen)


def _topics(findings: Sequence[str], present: Sequence[Template]) -> list[set[str]]:
    """Words that tell what each finding is about: of its name and sentence, but those that many share."""
    words = [
        {word for word in _key(f"{name} {template.text}").split() if len(word) >= _SHORTEST_WORD}
        for name, template in zip(findings, present, strict=True)
    ]
    shared = Counter(word for own in words for word in own)
    return [{word for word in own if shared[word] < _COMMON} for own in words]


def _key(sentence: str) -> str:
    """What makes two sentences the same: words without case, punctuation and numbers."""
    return " ".join(re.sub(r"\d+(?:[.,]\d+)*", "#", re.sub(r"[^\w\s.,]", " ", sentence.lower())).strip(" .,").split())
