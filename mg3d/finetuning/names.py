"""Names of runs, weights and baselines for folders and tables. No heavy import."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mg3d.training.run_folder import CHECKPOINTS

if TYPE_CHECKING:
    from mg3d.finetuning.config import FinetuneConfig

__all__ = ["BASELINES", "CONSTANT", "LABEL_TO_REPORT", "experiment_name", "weights_label"]

LABEL_TO_REPORT = "label_to_report"
CONSTANT = "constant_report"
BASELINES: Mapping[str, str] = {LABEL_TO_REPORT: "label-to-report", CONSTANT: "best constant report"}
"""Baselines of a report generator: first part of their keys in ``metrics.json``, and title."""

_VARIANT_KEYS = ("organ",)  # own keys of a benchmark that choose another data set
_GENERIC = ("last.ckpt", "best.ckpt", "model.safetensors")


def weights_label(weights: str) -> str:
    """Short name of weights: of a checkpoint its run, of another file its stem; empty for none."""
    parts = [part for part in Path(weights).parts if part not in (CHECKPOINTS, "/", "~")]
    if parts and parts[-1] in _GENERIC and len(parts) > 1:
        parts.pop()
        return "-".join(parts[-2:]) if parts[-1].startswith("version_") else parts[-1]
    if parts and parts[-1].startswith("version_"):
        return "-".join(parts[-2:])
    return Path(parts[-1]).stem if parts else ""


def experiment_name(cfg: FinetuneConfig) -> str:
    """Name of the folder that holds the versions of a run: the same command always gives the same one."""
    fraction = f"-{cfg.data_fraction:g}" if cfg.data_fraction < 1 else ""
    start = "-scratch" if cfg.scratch else ""
    variant = "".join(f"-{cfg.extra[key]}" for key in _VARIANT_KEYS if key in cfg.extra)
    return cfg.run_name or f"{cfg.benchmark}{variant}-{cfg.encoder}-{cfg.mode}-fold{cfg.fold}{fraction}{start}"
