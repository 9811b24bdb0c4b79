"""Scores of a vocabulary run: findings with thresholds chosen elsewhere, both retrievals, effective ranks.

n cases, L findings, P latent width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mg3d.metrics.bootstrap import bootstrap_weights, summary
from mg3d.metrics.label_retrieval import overlap_at_k
from mg3d.metrics.operating_point import corner_thresholds, multilabel_entries
from mg3d.metrics.report_retrieval import recall_entries, select_pool
from mg3d.metrics.representation import effective_rank
from mg3d.metrics.retrieval import group_identical
from mg3d.models.finetune.case_rows import rows_to_arrays

if TYPE_CHECKING:
    from mg3d.finetuning.benchmark import VocabularyTask
    from mg3d.finetuning.config import FinetuneConfig

__all__ = ["RECALL_AT", "SHARED_AT", "score_vocabulary"]

RECALL_AT = (5, 10, 50, 100)
SHARED_AT = (1, 5, 10, 50)
RANK_ROUNDS = 100

Entries = dict[str, dict[str, Any]]


def score_vocabulary(
    rows: Sequence[Mapping[str, Any]], arrays: Mapping[str, Any], task: VocabularyTask, cfg: FinetuneConfig
) -> tuple[Entries, list[str]]:
    """Score the case rows and arrays of a run.

    Args:
        rows: of the reported cases.
        arrays: `mg3d.models.finetune.vocabulary_module.VocabularyModule.case_arrays`; without it thresholds are 0.5 and
            retrieval is left out.
        task: findings, reports, pools.
        cfg: protocol, bootstrap rounds, seed.

    Returns:
        metric -> mean, ci95, n: the mean over the findings with ``per_class``; ``f1_own_threshold`` ... with thresholds
        of the reported cases themselves (published); ``thresholds``; recall per pool as ``recall@K``, further pools as
        ``recall@K/pool``; ``map@K``; effective ranks; and notes.
    """
    ids, patients, probabilities, targets = rows_to_arrays(rows, task)
    drawn: dict[str, Any] = {"rounds": cfg.bootstrap_rounds, "groups": patients, "seed": cfg.seed}
    names, notes = task.outputs, []
    own, _ = corner_thresholds(probabilities, targets)
    thresholds, undefined = _tuned(arrays.get("tuning_rows"), task)
    notes.append("thresholds: chosen on the validation cases, nearest to the ROC diagram's corner")
    if undefined:
        notes.append(f"threshold 0.5, one class only in validation: {', '.join(names[k] for k in undefined)}")
    entries, more = multilabel_entries(probabilities, targets, names, thresholds, **drawn)
    fitted, _ = multilabel_entries(probabilities, targets, names, own, **drawn)
    entries |= {f"{name}/own_threshold": entry for name, entry in fitted.items() if name != "auroc"}
    per_class = {
        name: {"mean": float(t), "ci95": None, "n": len(rows)} for name, t in zip(names, thresholds, strict=True)
    }
    entries["threshold"] = {"mean": float(thresholds.mean()), "ci95": None, "n": len(rows), "per_class": per_class}
    if task.scored:
        entries["auroc_scored"] = _scored(probabilities, targets, task, drawn)
    notes += more
    if "similarity" in arrays:
        entries |= _report_retrieval(ids, patients, arrays["similarity"], task, cfg)
        found, left_out = _volume_retrieval(patients, arrays["image_latents"], targets, cfg)
        entries |= found | _ranks(arrays, patients, cfg)
        notes += left_out
    return entries, notes


def _tuned(rows: Sequence[Mapping[str, Any]] | None, task: VocabularyTask) -> tuple[np.ndarray, list[int]]:
    if not rows:
        return np.full(len(task.outputs), 0.5), list(range(len(task.outputs)))
    _, _, probabilities, targets = rows_to_arrays(rows, task)
    return corner_thresholds(probabilities, targets)


def _scored(
    probabilities: np.ndarray, targets: np.ndarray, task: VocabularyTask, drawn: Mapping[str, Any]
) -> dict[str, Any]:
    chosen = [task.outputs.index(name) for name in task.scored]
    thresholds = np.full(len(chosen), 0.5)
    entries, _ = multilabel_entries(probabilities[:, chosen], targets[:, chosen], task.scored, thresholds, **drawn)
    return entries["auroc"]


def _report_retrieval(
    ids: Sequence[str], patients: Sequence[str], similarity: np.ndarray, task: VocabularyTask, cfg: FinetuneConfig
) -> Entries:
    """Recall of reports that ask for their volume, in every pool; the first pool without a suffix."""
    reports = [task.reports[name] for name in ids]
    entries: Entries = {}
    for pool in task.pools:
        rows = select_pool(ids, reports, pool, task.excluded)  # type: ignore[arg-type]  # checked there
        found = recall_entries(
            similarity[np.ix_(rows, rows)],
            [k for k in RECALL_AT if k < len(rows)] or [1],
            pool=pool,
            groups=[patients[row] for row in rows],
            same=group_identical([reports[row] for row in rows]),
            rounds=cfg.bootstrap_rounds,
            seed=cfg.seed,
        )
        suffix = "" if pool == task.pools[0] else f"/{pool}"
        entries |= {f"{name}{suffix}": entry for name, entry in found.items()}
    return entries


def _volume_retrieval(
    patients: Sequence[str], latents: np.ndarray, targets: np.ndarray, cfg: FinetuneConfig
) -> tuple[Entries, list[str]]:
    """Label overlap of the nearest volumes; ``clean`` takes the query's own patient out of the gallery."""
    groups = list(patients) if cfg.protocol == "clean" else None
    protocol = "clean" if cfg.protocol == "clean" else "reference"
    ks = [k for k in SHARED_AT if k < len(latents)]
    try:
        values, queries = overlap_at_k(latents, targets, ks, protocol=protocol, groups=groups)  # type: ignore[arg-type]
    except ValueError as problem:
        return {}, [f"no volume-to-volume retrieval: {problem}"]
    asked = [patients[row] for row in queries]
    weights = bootstrap_weights(asked, cfg.bootstrap_rounds, cfg.seed)
    totals = weights.sum(axis=1)
    return {f"map@{k}": summary(v.mean(), weights @ v / totals, len(asked)) for k, v in values.items()}, []


def _ranks(arrays: Mapping[str, Any], patients: Sequence[str], cfg: FinetuneConfig) -> Entries:
    weights = bootstrap_weights(patients, min(cfg.bootstrap_rounds, RANK_ROUNDS), cfg.seed)
    entries = {}
    for name in ("image_latents", "text_latents"):
        drawn = np.asarray([effective_rank(arrays[name], weight) for weight in weights])
        entries[f"effective_rank_{name}"] = summary(effective_rank(arrays[name]), drawn, len(patients))
    return entries
