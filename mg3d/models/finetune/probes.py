"""Probes of a frozen encoder: features computed once and kept on disk, then logistic regression or neighbours.

n cases, F features, K outputs, T targets. Both probes give the same case rows as a fine-tuned classifier.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from mg3d.errors import CheckpointError, ConfigError, DataError
from mg3d.metrics.probe import MIN_CASES_PER_CLASS, linear_probe_scores, multiclass_probe_probabilities
from mg3d.models.distributed import is_distributed, rank
from mg3d.models.finetune.case_rows import case_row
from mg3d.models.finetune.knn import knn_probabilities
from mg3d.models.weights_file import METADATA_KEY, load_checkpoint, save_weights, tensor_digest

if TYPE_CHECKING:
    from mg3d.finetuning.benchmark import Case, ClassificationTask
    from mg3d.finetuning.config import FinetuneConfig

__all__ = ["CaseFeatures", "case_features", "encoder_digest", "probe_probabilities", "run_probe"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CaseFeatures:
    """Features of the cases of one part, in the order of the ids.

    Attributes:
        ids: [n].
        values: [n, F] float32.
    """

    ids: tuple[str, ...]
    values: np.ndarray


def run_probe(
    module: Any, datamodule: Any, cfg: FinetuneConfig, task: ClassificationTask
) -> dict[str, list[dict[str, Any]]]:
    """Fit the probe that ``cfg.mode`` names on the training cases, and score the others.

    Args:
        module: a classification module with its weights loaded; its ``features`` are used.
        datamodule: the classification data module.
        cfg: the run's config.
        task: what is predicted.

    Returns:
        ``val`` and ``test`` -> case rows, sorted by id; the same on every process. The probability of an output that
        has too few training cases for a linear probe, beside others that have enough, is NaN.

    Raises:
        DataError: too few training cases.
    """
    _check_enough(cfg, task, datamodule.splits.train)
    cases = {part: {case.id: case for case in getattr(datamodule.splits, part)} for part in ("train", "val", "test")}
    found = {part: case_features(module, datamodule, cfg, part) for part in cases}
    train = found.pop("train")
    groups = np.asarray([cases["train"][case_id].patient for case_id in train.ids])
    targets = _targets([cases["train"][case_id] for case_id in train.ids], task)
    rows: dict[str, list[dict[str, Any]]] = {}
    for part, features in found.items():
        scores = probe_probabilities(cfg, task, train.values, targets, groups, features.values)
        held = [cases[part][case_id] for case_id in features.ids]
        made = zip(held, _targets(held, task), scores, strict=True)
        unsorted = [case_row(task, case.id, case.patient, case.tags, truth, probs) for case, truth, probs in made]
        rows[part] = sorted(unsorted, key=lambda row: row["id"])
    return rows


def probe_probabilities(
    cfg: FinetuneConfig,
    task: ClassificationTask,
    train_features: np.ndarray,
    train_targets: np.ndarray,
    train_groups: np.ndarray,
    test_features: np.ndarray,
) -> np.ndarray:
    """Probabilities [m, K] of a probe.

    Args:
        cfg: reads ``mode``, ``knn_neighbours``, ``knn_temperature`` and ``seed``.
        task: what is predicted.
        train_features: [n, F].
        train_targets: [n, T].
        train_groups: [n] patients.
        test_features: [m, F].

    Raises:
        ConfigError: ``mode`` is no probe.
        DataError: too few training cases for a linear probe.
    """
    multiclass = task.kind == "multiclass"
    if cfg.mode == "knn_probe":
        return knn_probabilities(
            train_features,
            train_targets,
            test_features,
            num_classes=len(task.outputs) if multiclass else 0,
            neighbours=cfg.knn_neighbours,
            temperature=cfg.knn_temperature,
        )
    if cfg.mode != "linear_probe":
        raise ConfigError(f"mode={cfg.mode} is no probe", "write mode=linear_probe or mode=knn_probe")
    if multiclass:
        found = multiclass_probe_probabilities(
            train_features, train_targets[:, 0], train_groups, test_features, len(task.outputs), cfg.seed
        )
        return _enough(found, "every class")
    weights = task.class_weights or (1.0,) * len(task.outputs)
    columns = [
        linear_probe_scores(train_features, values, train_groups, test_features, cfg.seed, weight)
        for values, weight in zip(train_targets.T, weights, strict=True)
    ]
    if all(scores is None for scores in columns):
        _enough(None, f"and without {task.outputs[0]}")
    odds = [np.full(len(test_features), np.nan) if scores is None else scores for scores in columns]
    return 0.5 * (1.0 + np.tanh(0.5 * np.stack(odds, axis=1)))


def case_features(module: Any, datamodule: Any, cfg: FinetuneConfig, part: str) -> CaseFeatures:
    """Frozen features of a part: read from ``work_dir/features``, or computed with progress and stored there.

    The file is named by the encoder's weights and description and by the data, so that changed weights, preprocessing
    or cases give another file.

    Args:
        module: the classification module, already on its device.
        datamodule: the classification data module.
        cfg: the run's config.
        part: train, val or test.

    Raises:
        DataError: no case could be read.
    """
    facts = {"encoder": encoder_digest(module.encoder), "data": datamodule.dataset(part).fingerprint()}
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
    path = Path(cfg.work_dir) / "features" / f"{part}-{key}.safetensors"
    stored = _read(path)
    if is_distributed():  # one process may have found the file in the moment another one wrote it
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, stored is not None)
        stored = stored if all(everywhere) else None
    if stored is not None:
        log.info("%s: features of %d cases from %s", part, len(stored.ids), path)
        return stored
    computed = _compute(module, datamodule.complete_dataloader(part), part)
    if not computed.ids:
        raise DataError(f"no case of the {part} part could be read", "run the same command with --check-data")
    if rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_weights({"features": torch.from_numpy(computed.values)}, path, {"ids": list(computed.ids), **facts})
    return computed


def encoder_digest(encoder: Any) -> str:
    """SHA-256 over the weights and the description of an encoder."""
    tensors = {name: value.detach().cpu() for name, value in encoder.state_dict().items()}
    described = json.dumps(encoder.metadata(), sort_keys=True, default=str)
    return hashlib.sha256(f"{tensor_digest(tensors)} {described}".encode()).hexdigest()


@torch.no_grad()
def _compute(module: Any, loader: Any, part: str) -> CaseFeatures:
    modes = {part: part.training for part in module.modules()}
    module.eval()
    found: dict[str, Tensor] = {}
    for batch in tqdm(loader, total=len(loader), desc=f"features {part}", unit="batch", disable=rank() != 0):
        if len(batch["image"]):
            values = module.features(batch["image"].to(module.device)).float().cpu()
            found |= dict(zip(batch["id"], values, strict=True))
    for each, training in modes.items():  # frozen parts stay in evaluation mode
        each.training = training
    shares: list[Any] = [found]
    if is_distributed():
        shares = [None] * dist.get_world_size()
        dist.all_gather_object(shares, found)
    together: dict[str, Tensor] = {}
    for share in shares:
        together |= share
    ids = tuple(sorted(together))
    values = torch.stack([together[case_id] for case_id in ids]).numpy() if ids else np.zeros((0, 0), np.float32)
    return CaseFeatures(ids, values)


def _read(path: Path) -> CaseFeatures | None:
    if not path.is_file():
        return None
    try:
        content = load_checkpoint(path)
        ids, values = content[METADATA_KEY]["ids"], content["state_dict"]["features"]
    except (CheckpointError, KeyError) as error:
        log.warning("%s is damaged and made again: %s", path, error)
        return None
    return CaseFeatures(tuple(ids), values.numpy())


def _targets(cases: list[Case], task: ClassificationTask) -> np.ndarray:
    """Targets [n, T]; unknown binary outputs are -1."""
    values = np.asarray([case.targets for case in cases], dtype=np.float64).reshape(len(cases), -1)
    if task.kind != "multiclass":
        values = np.where(np.isin(values, (0.0, 1.0)), values, -1.0)
    return values.astype(np.int64)


def _check_enough(cfg: FinetuneConfig, task: ClassificationTask, cases: Sequence[Case]) -> None:
    """Refuse a linear probe that has too few patients before features are computed; name outputs that have none."""
    if cfg.mode != "linear_probe":
        return
    targets = _targets(list(cases), task)
    multiclass = task.kind == "multiclass"
    lacking = []
    for column, name in zip(targets.T, ("",) if multiclass else task.outputs, strict=True):
        for value in np.unique(column) if multiclass else (0, 1):
            patients = {case.patient for case, target in zip(cases, column, strict=True) if target == value}
            if len(patients) < MIN_CASES_PER_CLASS and name not in lacking:
                lacking.append(name)
    if lacking and (multiclass or len(lacking) == len(task.outputs)):
        _enough(None, "every class" if multiclass else f"and without {lacking[0]}")
    if lacking:
        log.warning(
            "fewer than %d training patients with or without %s: no probability",
            MIN_CASES_PER_CLASS,
            ", ".join(lacking),
        )


def _enough(found: np.ndarray | None, what: str) -> np.ndarray:
    if found is None:
        raise DataError(
            f"the linear probe needs {MIN_CASES_PER_CLASS} training patients with {what}",
            "raise data_fraction, or write mode=knn_probe",
        )
    return found
