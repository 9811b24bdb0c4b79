"""What a classifier on the same image features would write: the label-to-report baseline beside written reports.

n studies, m training studies, d feature width, L findings.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch

from mg3d.config_schema import MG3DConfig
from mg3d.evaluation.finding_reader import FindingReader
from mg3d.finetuning.report_baseline import Beside, best_threshold, probe_probabilities, score_beside
from mg3d.metrics.captioning import MeteorKind

__all__ = ["label_to_report"]


@dataclass(frozen=True)
class _Seen:
    """Features [n, d], findings [n, L], texts, patients and names of some studies."""

    features: np.ndarray
    findings: np.ndarray
    texts: list[str]
    patients: list[str]
    names: list[str]


def label_to_report(
    cfg: MG3DConfig, module: Any, data: Any, rows: Sequence[Mapping[str, Any]], reader: FindingReader
) -> Beside:
    """Score reports written from the findings that a linear probe sees in the mean image token.

    The probe is fitted on training volumes (at most ``eval_probe_cases``), its threshold is chosen on the validation
    split, and the sentences come from the training reports.

    Args:
        cfg: the run's config.
        module: the trained `mg3d.models.clm.ReportWritingModule`.
        data: its data module.
        rows: case rows of the scored studies.
        reader: of findings.
    """
    trained = module.training
    module.eval()
    parts = {
        "train": _see(module, data.training_volumes(cfg.eval_probe_cases), "train", reader),
        "val": _see(module, data.complete_reports("val"), "val", reader),
        "test": _see(module, data.complete_reports(cfg.eval_split), "test", reader),
    }
    module.train(trained)
    train, val, test = parts["train"], parts["val"], parts["test"]
    order = [test.names.index(str(row["id"])) for row in rows]
    chances, rare = probe_probabilities(
        train.features, train.findings, train.patients, [val.features, test.features[order]], cfg.seed
    )
    found = score_beside(
        [str(row["reference"]) for row in rows],
        chances[1],
        reader.names,
        train.texts,
        train.findings,
        labels=test.findings[order],
        threshold=best_threshold(val.findings, chances[0]),
        reader=reader.read,
        ids=[str(row["id"]) for row in rows],
        patients=[str(row["patient"]) for row in rows],
        meteor=cast(MeteorKind, cfg.clm_meteor),
        rounds=cfg.eval_bootstrap,
        seed=cfg.seed,
    )
    if rare:
        found.notes.append(f"too rare for the probe: {', '.join(reader.names[number] for number in rare)}")
    return found


@torch.no_grad()
def _see(module: Any, batches: Iterable[Mapping[str, Any]], phase: str, reader: FindingReader) -> _Seen:
    features, labels = [], []
    columns: dict[str, list[str]] = {name: [] for name in ("report", "patient_id", "image_id")}
    for batch in batches:
        moved = {**batch, "image": batch["image"].to(module.device)}
        features.append(module.encoder_tokens(moved, phase).float().mean(1).cpu())
        labels.append(batch["labels"])
        for name, values in columns.items():
            values.extend(str(value) for value in batch[name])
    findings = reader.of_studies(torch.cat(labels).numpy(), columns["report"])[0]
    texts, patients, names = columns.values()
    return _Seen(torch.cat(features).numpy(), findings, texts, patients, names)
