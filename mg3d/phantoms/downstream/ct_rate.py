"""A drawn CT-RATE download with a small text encoder for its words (spec downstream 7.1)."""

from __future__ import annotations

from pathlib import Path

from mg3d.phantoms.ct_rate_layout import write_tables, write_volumes
from mg3d.phantoms.studies import plan_studies
from mg3d.phantoms.text_encoder import write_text_encoder

__all__ = ["TEXT_ENCODER", "write_ct_rate"]

TEXT_ENCODER = "text_encoder"


def write_ct_rate(root: Path, *, train: int = 400, valid: int = 80, size: int = 40, seed: int = 0) -> None:
    """Write volumes and tables of both official splits, and ``text_encoder``.

    Args:
        root: folder that receives ``dataset`` and ``text_encoder``.
        train: scans of the training split.
        valid: scans of the validation split, of other patients.
        size: voxels per axis, at least 32.
        seed: seed of everything; a longer split begins with the shorter one.
    """
    planned = {
        split: list(plan_studies(split, count, size, seed)) for split, count in (("train", train), ("valid", valid))
    }
    for split, studies in planned.items():
        for study in studies:
            write_volumes(root, split, study)
        write_tables(root, split, studies)
    texts = [f"{study.report.findings} {study.report.impression}" for study in planned["train"]]
    write_text_encoder(root / TEXT_ENCODER, texts, seed)
