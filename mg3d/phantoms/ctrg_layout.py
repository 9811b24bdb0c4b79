"""Phantom studies as a CTRG-Chest download: a folder of jpg slices per study and one annotation JSON (downstream 8.1).

As published, ``val`` and ``test`` list the same studies; ``report`` is the findings text, ``result`` the impression.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from mg3d.datasets.volume import WINDOW_HU
from mg3d.phantoms.chest import render
from mg3d.phantoms.studies import Study

IMAGE_FOLDER = "Chest_New"
ANNOTATION = "annotation.json"
SLICE_PIXELS = 128
TEST_SHARE = 0.2
_JPEG_QUALITY = 92


def slice_paths(study: Study) -> list[str]:
    """Paths of a study's slices relative to the root, from the neck down."""
    return [f"{IMAGE_FOLDER}/{study.patient}/{number}.jpg" for number in range(1, study.grids[0].shape[0] + 1)]


def write_slices(root: Path, study: Study) -> None:
    """Render a study and write its slices as 8-bit grey images, rows towards the back, columns towards the left."""
    low, high = WINDOW_HU
    hu = render(study.case, study.grids[0]).hu.astype(np.float32)
    grey = np.rint((np.clip(hu, low, high) - low) * (255 / (high - low))).astype(np.uint8)
    (root / IMAGE_FOLDER / str(study.patient)).mkdir(parents=True, exist_ok=True)
    for path, pixels in zip(slice_paths(study), grey[::-1], strict=True):
        image = Image.fromarray(pixels).resize((SLICE_PIXELS, SLICE_PIXELS), Image.Resampling.BILINEAR)
        image.save(root / path, quality=_JPEG_QUALITY)


def write_annotation(root: Path, studies: Sequence[Study]) -> None:
    """Write the annotation: the last fifth of the studies is both val and test."""
    first_test = len(studies) - round(len(studies) * TEST_SHARE)
    train, test = studies[:first_test], studies[first_test:]
    content = {
        "train": [_entry(study, "train") for study in train],
        "val": [_entry(study, "val") for study in test],
        "test": [_entry(study, "val") for study in test],
    }
    root.mkdir(parents=True, exist_ok=True)
    (root / ANNOTATION).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _entry(study: Study, split: str) -> dict[str, object]:
    return {
        "id": str(study.patient),
        "report": study.report.findings,
        "result": study.report.impression,
        "image_path": slice_paths(study),
        "split": split,
    }
