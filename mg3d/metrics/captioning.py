"""Scores of generated reports against references: BLEU, ROUGE-L, CIDEr and METEOR, with the protocol beside them.

Definitions are coco-caption's (the numbers equal pycocoevalcap on the same tokens); D cases, R bootstrap rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from mg3d.errors import ConfigError, MG3DError
from mg3d.metrics.bootstrap import bootstrap_weights, interval
from mg3d.metrics.captioning_meteor import meteor_java, meteor_nltk
from mg3d.metrics.captioning_ngrams import bleu, bleu_statistics, cider, count_ngrams
from mg3d.metrics.captioning_rouge import rouge_f, rouge_l
from mg3d.metrics.captioning_text import PRETOKENISED, TOKENISED, prepare

__all__ = ["METRICS", "PROTOCOL", "CaptionScores", "score_captions"]

MeteorKind = Literal["auto", "java", "nltk", "none"]
METEOR_KINDS: tuple[MeteorKind, ...] = ("auto", "java", "nltk", "none")
_MEANS = ("rouge_l", "cider", "rouge1_f", "rouge2_f", "rougel_f")
METRICS = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", *_MEANS, "meteor_java", "meteor_nltk")

PROTOCOL = {
    "bleu": "corpus BLEU, closest reference length, brevity penalty",
    "rouge_l": "mean over cases, longest common subsequence, beta 1.2",
    "rouge_f": "rouge1_f, rouge2_f, rougel_f: F measures of rouge-score (letters and digits, stemmed), mean over cases",
    "cider": "CIDEr-D (coco-caption's CIDEr): n = 1..4, clipped, sigma 6, x 10, document frequency of these references",
    "meteor_java": "METEOR 1.5, Java program, English, normalised; corpus score from summed statistics",
    "meteor_nltk": "NLTK's METEOR, mean over cases; not comparable with the Java program",
}
"""What each number means."""


@dataclass(frozen=True)
class CaptionScores:
    """Scores of D generated reports.

    Attributes:
        values: corpus value by metric name (:data:`METRICS`); None: not computed (see ``notes``).
        per_case: [D] by metric name, only computed ones.
        intervals: 95 % bootstrap interval over patients by metric name; empty without rounds.
        cases: D.
        protocol: what each number means.
        notes: what a reader must know: empty generations, why a metric is absent ...
    """

    values: dict[str, float | None]
    per_case: dict[str, np.ndarray]
    intervals: dict[str, list[float] | None]
    cases: int
    protocol: dict[str, str]
    notes: tuple[str, ...] = field(default=())

    def entries(self) -> dict[str, dict[str, Any]]:
        """Entries of ``metrics.json``: metric -> mean, ci95, n."""
        return {
            name: {"mean": value, "ci95": self.intervals.get(name), "n": self.cases}
            for name, value in self.values.items()
        }


def score_captions(
    references: Sequence[str | Sequence[str]],
    hypotheses: Sequence[str],
    *,
    ids: Sequence[str] | None = None,
    pretokenised: bool = False,
    meteor: MeteorKind = "auto",
    meteor_timeout_s: float = 600.0,
    rounds: int = 0,
    groups: Sequence[str] | None = None,
    seed: int = 0,
) -> CaptionScores:
    """Score generated reports.

    Args:
        references: of each case one text or several.
        hypotheses: the generated texts; an empty one scores 0 and is counted in the notes.
        ids: names of the cases for messages.
        pretokenised: leave the text as it is (blanks apart) instead of lower-casing and splitting it.
        meteor: auto: Java, else NLTK, else absent; java, nltk: that kind or an error; none.
        meteor_timeout_s: limit of the Java program in seconds.
        rounds: bootstrap rounds R for 95 % intervals; 0: none. METEOR's corpus score gets none.
        groups: patient of each case for the bootstrap; each case its own when None.
        seed: seed of the bootstrap.

    Returns:
        The scores with protocol and notes.

    Raises:
        DataError: no case, different lengths or an empty reference.
        ConfigError: an unknown kind of METEOR.
        EnvironmentProblem, RunFailedError: the kind of METEOR asked for by name is missing or failed.
    """
    if meteor not in METEOR_KINDS:
        raise ConfigError(f"meteor={meteor!r}", f"choose one of {', '.join(METEOR_KINDS)}")
    wanted, found = prepare(references, hypotheses, ids, pretokenised=pretokenised)
    counts = count_ngrams(wanted, found)
    statistics = bleu_statistics(counts)
    per_case = {f"bleu_{order + 1}": column for order, column in enumerate(bleu(statistics).T)}
    per_case |= {"rouge_l": rouge_l(wanted, found), "cider": cider(counts), **rouge_f(wanted, found)}
    values: dict[str, float | None] = dict.fromkeys(METRICS)
    values |= _corpus(statistics, per_case, np.ones((1, len(found))), lambda row: float(row[0]))
    intervals: dict[str, list[float] | None] = {}
    if rounds:
        weights = bootstrap_weights(list(groups or [str(case) for case in range(len(found))]), rounds, seed)
        intervals = _corpus(statistics, per_case, weights, interval)
    notes = _notes(found)
    _add_meteor(meteor, meteor_timeout_s, wanted, found, values, per_case, notes)
    protocol = {"text": PRETOKENISED if pretokenised else TOKENISED, **PROTOCOL}
    return CaptionScores(values, per_case, intervals, len(found), protocol, tuple(notes))


def _corpus(
    statistics: np.ndarray, per_case: dict[str, np.ndarray], weights: np.ndarray, read: Callable[[np.ndarray], Any]
) -> dict[str, Any]:
    """Corpus values of every row of case weights [R, D], each metric's R values read by ``read``."""
    found = {f"bleu_{order + 1}": column for order, column in enumerate(bleu(weights @ statistics).T)}
    found |= {name: weights @ per_case[name] / weights.sum(axis=1) for name in _MEANS}
    return {name: read(values) for name, values in found.items()}


def _notes(hypotheses: Sequence[str]) -> list[str]:
    notes = []
    empty = sum(not text for text in hypotheses)
    if empty:
        notes.append(f"{empty} of {len(hypotheses)} generations are empty; they score 0")
    if len(hypotheses) == 1:
        notes.append("CIDEr of one document is 0 by construction: every n-gram is in all documents")
    return notes


def _add_meteor(
    kind: MeteorKind,
    timeout_s: float,
    references: Sequence[Sequence[str]],
    hypotheses: Sequence[str],
    values: dict[str, float | None],
    per_case: dict[str, np.ndarray],
    notes: list[str],
) -> None:
    """Compute the kind asked for; with auto the first that works, and a note on each that does not."""
    scorers: dict[str, Callable[[], tuple[float, np.ndarray]]] = {
        "java": lambda: meteor_java(references, hypotheses, timeout_s),
        "nltk": lambda: meteor_nltk(references, hypotheses),
    }
    for name, scorer in scorers.items():
        if kind not in (name, "auto"):
            continue
        try:
            values[f"meteor_{name}"], per_case[f"meteor_{name}"] = scorer()
            return
        except MG3DError as problem:
            if kind == name:
                raise
            notes.append(f"meteor_{name} not computed: {problem.message}")
