"""Everything that CT-CLIP's scripts leave, in ``results`` of a run, and the maps of its latents."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mg3d.finetuning.label_tables import write_label_tables
from mg3d.finetuning.pictures.latent_maps import PUBLISHED_DPI, draw_latent_maps
from mg3d.finetuning.retrieval_tables import write_report_recall, write_shared_findings
from mg3d.finetuning.vocabulary_scores import RECALL_AT, SHARED_AT

if TYPE_CHECKING:
    from mg3d.finetuning.config import FinetuneConfig

__all__ = ["write_ct_rate_results"]

LATENTS = ("image_latents", "text_latents")


def write_ct_rate_results(
    cfg: FinetuneConfig, run_dir: Path, rows: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> None:
    """Write the published files, and a map of the latents for every finding.

    Args:
        cfg: reads ``protocol``, ``seed``, ``pictures`` and the benchmark's own key ``maps``.
        run_dir: the run; the latents move from ``predictions`` to ``results``.
        rows: of ``per_case.csv``, in the order of the latents.
        names: findings.
    """
    folder = run_dir / "results"
    write_label_tables(folder, rows, names)
    for name in LATENTS:
        if (run_dir / "predictions" / f"{name}.npz").is_file():
            os.replace(run_dir / "predictions" / f"{name}.npz", folder / f"{name}.npz")
    scores, images = run_dir / "predictions" / "report_to_volume.npz", folder / "image_latents.npz"
    if scores.is_file():
        with np.load(scores) as stored:
            write_report_recall(folder, stored["data"], RECALL_AT, cfg.seed)
    if not images.is_file():
        return
    with np.load(images) as stored:
        latents = stored["data"].reshape(len(rows), -1)
    labels = np.asarray([[row[f"target_{name}"] for name in names] for row in rows])
    clean = cfg.protocol == "clean"
    write_shared_findings(
        folder / "i2i_real.txt",
        latents,
        labels,
        SHARED_AT,
        protocol="clean" if clean else "reference",
        groups=[str(row["patient"]) for row in rows] if clean else None,
    )
    for method in cfg.extra["maps"] if cfg.pictures else ():
        draw_latent_maps(run_dir, latents, labels, names, method, **({} if clean else {"dpi": PUBLISHED_DPI}))
