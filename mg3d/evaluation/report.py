"""From arrays of features, embeddings and labels to the evaluation table; no model, no files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mg3d.metrics.bootstrap import bootstrap_weights, summary
from mg3d.metrics.classification import weighted_auroc
from mg3d.metrics.probe import MIN_CASES_PER_CLASS, linear_probe_scores
from mg3d.metrics.representation import effective_rank
from mg3d.metrics.retrieval import chance_recall, group_identical, ranks_with_ties_last

RECALL_AT = (1, 5, 10)
RANK_ROUNDS = 100
PERMUTATION_ROUNDS = 200


@dataclass(frozen=True)
class ProbeArrays:
    """Frozen features of one encoder on the probe's training cases [n, d] and on the held-out pool [m, d]."""

    train: np.ndarray
    test: np.ndarray


@dataclass(frozen=True)
class Cases:
    """Labels [n, F] (1, 0, -1 unknown), patients and reports of the n cases of a split."""

    labels: np.ndarray
    patients: Sequence[str]
    reports: Sequence[str]


@dataclass(frozen=True)
class SharedSpace:
    """Unit vectors of the held-out pool and of the prompts in the image-text space.

    Attributes:
        image: [m, P] one vector per volume.
        text: [m, P] one vector per report, in the same order.
        prompt_direction: [F, P] prompt "present" minus prompt "absent" for each finding.
        name: which space this is, repeated in the results.
    """

    image: np.ndarray
    text: np.ndarray
    prompt_direction: np.ndarray
    name: str


def _mean_over_findings(per_finding: np.ndarray) -> np.ndarray:
    """Mean over axis 0 of [F, R], findings without a value in a round left out; NaN when none has one."""
    known = np.isfinite(per_finding)
    count = known.sum(0)
    total = np.where(known, per_finding, 0.0).sum(0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def auroc_entry(
    scores: np.ndarray, labels: np.ndarray, findings: Sequence[str], weights: np.ndarray
) -> tuple[dict[str, Any], np.ndarray]:
    """Area under the ROC curve of each finding and their mean.

    Args:
        scores: [F, m], NaN rows where no score exists.
        labels: [m, F].
        findings: F names.
        weights: bootstrap weights [R, m].

    Returns:
        The ``metrics.json`` entry and the bootstrap values of the mean [R].
    """
    every = np.vstack([np.ones(weights.shape[1]), weights])
    rows, per_class = [], {}
    for finding, score, target in zip(findings, scores, labels.T, strict=True):
        enough = min((target == 1).sum(), (target == 0).sum()) >= MIN_CASES_PER_CLASS
        usable = enough and bool(np.isfinite(score).all())
        values = weighted_auroc(score, target, every) if usable else np.full(len(every), np.nan)
        per_class[finding] = summary(values[0], values[1:], int(np.isin(target, (0, 1)).sum()))
        rows.append(values)
    mean = _mean_over_findings(np.asarray(rows)) if rows else np.full(len(every), np.nan)
    return summary(mean[0], mean[1:], weights.shape[1], per_class=per_class), mean


def probe_scores(arrays: ProbeArrays, train: Cases, seed: int) -> np.ndarray:
    """Probe scores of every finding on the held-out pool, [F, m]; NaN rows where the probe could not be fitted."""
    groups = np.asarray(train.patients)
    rows = []
    for target in train.labels.T:
        score = linear_probe_scores(arrays.train, target, groups, arrays.test, seed)
        rows.append(np.full(len(arrays.test), np.nan) if score is None else score)
    return np.asarray(rows)


def probe_entries(
    trained: ProbeArrays,
    random: ProbeArrays,
    train: Cases,
    test: Cases,
    findings: Sequence[str],
    weights: np.ndarray,
    seed: int,
) -> dict[str, Any]:
    """Linear probe of the trained encoder, of the same seed's random one, and the paired difference."""
    entries: dict[str, Any] = {}
    means = {}
    for name, arrays in (("trained", trained), ("random", random)):
        scores = probe_scores(arrays, train, seed)
        entries[f"linear_probe_auroc_{name}"], means[name] = auroc_entry(scores, test.labels, findings, weights)
    gain = means["trained"] - means["random"]
    entries["linear_probe_gain"] = summary(gain[0], gain[1:], weights.shape[1])
    return entries


def _directions(similarity: np.ndarray, groups: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Both retrieval directions as (scores [Q, K], relevance [Q, K]); identical reports are one candidate."""
    first_of_group = np.unique(groups, return_index=True)[1]
    same = groups[:, None] == groups[None, :]
    return {
        "report_to_volume": (similarity, same),
        "volume_to_report": (similarity.T[:, first_of_group], same[:, first_of_group]),
    }


def retrieval_entries(similarity: np.ndarray, groups: np.ndarray, weights: np.ndarray) -> dict[str, Any]:
    """Recall at K in both directions beside chance.

    Args:
        similarity: [m reports, m volumes].
        groups: [m] number of each distinct report.
        weights: bootstrap weights [R, m].
    """
    entries = {}
    for direction, (scores, relevant) in _directions(similarity, groups).items():
        ranks = ranks_with_ties_last(scores, relevant)
        for k in RECALL_AT:
            hits, chance = (ranks <= k).astype(float), float(chance_recall(relevant, k).mean())
            rounds = weights @ hits / weights.sum(1)
            extra = {"chance": chance, "times_chance": float(hits.mean() / chance), "candidates": scores.shape[1]}
            entries[f"{direction}_recall_at_{k}"] = summary(hits.mean(), rounds, len(hits), **extra)
    return entries


def permuted_entries(
    space: SharedSpace, groups: np.ndarray, test: Cases, findings: Sequence[str], seed: int
) -> dict[str, Any]:
    """The control: the same figures after the volumes were shuffled across patients; intervals must hold chance.

    Each round draws a new permutation, so the interval is that of the metric under "images carry nothing".
    """
    rng = np.random.default_rng(seed)
    similarity, prompts = space.text @ space.image.T, space.prompt_direction @ space.image.T
    recalls: dict[str, list[float]] = {}
    areas, ones = [], np.ones((1, len(groups)))
    for _ in range(PERMUTATION_ROUNDS):
        order = rng.permutation(len(groups))
        for direction, (scores, relevant) in _directions(similarity[:, order], groups).items():
            ranks = ranks_with_ties_last(scores, relevant)
            for k in RECALL_AT:
                recalls.setdefault(f"{direction}_recall_at_{k}", []).append(float((ranks <= k).mean()))
        areas.append(auroc_entry(prompts[:, order], test.labels, findings, ones)[1][0])
    chance = {
        f"{name}_recall_at_{k}": float(chance_recall(relevant, k).mean())
        for name, (_, relevant) in _directions(similarity, groups).items()
        for k in RECALL_AT
    }
    entries = {
        name: summary(float(np.mean(values)), np.asarray(values), len(groups), chance=chance[name])
        for name, values in recalls.items()
    }
    rounds = np.asarray(areas)
    mean = float(rounds[np.isfinite(rounds)].mean()) if np.isfinite(rounds).any() else float("nan")
    entries["zero_shot_auroc"] = summary(mean, rounds, len(groups), chance=0.5)
    return entries


def rank_entry(embeddings: np.ndarray, weights: np.ndarray) -> dict[str, Any]:
    """Effective rank of a set of embeddings.

    Repeated cases pull every bootstrap value down, so the rounds are shifted to lie around the value of the whole set
    (centred bootstrap).
    """
    mean = effective_rank(embeddings)
    rounds = np.array([effective_rank(embeddings, weight) for weight in weights[:RANK_ROUNDS]])
    centred = rounds - np.median(rounds) + mean
    return summary(mean, centred, len(embeddings), largest_possible=min(embeddings.shape))


def evaluation_entries(
    trained: ProbeArrays,
    random: ProbeArrays,
    train: Cases,
    test: Cases,
    findings: Sequence[str],
    space: SharedSpace | None,
    rounds: int,
    seed: int,
) -> dict[str, Any]:
    """All entries of the evaluation, ready for ``metrics.json``.

    Args:
        trained: features of the pre-trained vision encoder.
        random: features of the same architecture at the same seed's initialisation.
        train: cases the probe is fitted on.
        test: held-out pool.
        findings: names of the label columns.
        space: shared image-text space, or None when the run trained none (its entries are then null).
        rounds: bootstrap rounds.
        seed: seed of folds, bootstrap and permutations.

    Returns:
        ``{metric: {mean, ci95, n, ...}}``.
    """
    weights = bootstrap_weights(test.patients, rounds, seed)
    entries = probe_entries(trained, random, train, test, findings, weights, seed)
    entries["effective_rank_features"] = rank_entry(trained.test, weights)
    if space is None:
        return entries | {"retrieval": None, "zero_shot_auroc": None, "effective_rank_image_embeddings": None}
    groups = group_identical(test.reports)
    entries |= retrieval_entries(space.text @ space.image.T, groups, weights)
    entries["zero_shot_auroc"], _ = auroc_entry(space.prompt_direction @ space.image.T, test.labels, findings, weights)
    entries["effective_rank_image_embeddings"] = rank_entry(space.image, weights)
    entries["effective_rank_text_embeddings"] = rank_entry(space.text, weights)
    entries["permuted_images"] = permuted_entries(space, groups, test, findings, seed)
    entries["image_text_space"] = space.name
    return entries
