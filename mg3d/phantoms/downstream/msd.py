"""Drawn Decathlon tasks: ``Task06_Lung`` and ``Task10_Colon`` with ``dataset.json`` (downstream section 3).

``ROOT/Task06_Lung/{imagesTr,labelsTr,imagesTs}/lung_001.nii.gz``; the numbers have gaps, as published. A chest and an
abdomen are stored with a quarter of their size, so that smoke runs need few windows.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mg3d.phantoms.canvas import Canvas, Grid, Placement
from mg3d.phantoms.downstream.covid19_20 import render_lesion_chest
from mg3d.phantoms.downstream.nifti_file import write_nifti

__all__ = ["write_msd", "write_msd_task"]

Drawing = tuple[np.ndarray, np.ndarray]
_SHAPE_DHW = (34, 64, 64)
_TUMOUR_BIT = 0
_FAT_HU, _MUSCLE_HU, _STOOL_GAS_HU, _TUMOUR_HU = -100.0, 45.0, -800.0, 110.0
_ENHANCED_HU = 90  # over soft tissue, so that a network of 12 features finds a lung tumour in some thirty steps
# corners (z, y, x) of the colon in mm: ascending, transverse, descending, sigmoid
_COLON = ((-95.0, 20.0, -85.0), (70.0, 10.0, -95.0), (50.0, -40.0, 0.0), (80.0, 15.0, 95.0), (-90.0, 25.0, 85.0))


def write_msd(root: Path, *, cases: int = 7, test: int = 1, seed: int = 0) -> None:
    """Write both tasks below one folder; see :func:`write_msd_task`."""
    for task in ("lung", "colon"):
        write_msd_task(root, task, cases=cases, test=test, seed=seed)


def write_msd_task(root: Path, task: str, *, cases: int = 7, test: int = 1, seed: int = 0) -> Path:
    """Write one task.

    Args:
        root: folder that receives the folder of the task.
        task: "lung" or "colon".
        cases: training pairs.
        test: test images, without label.
        seed: seed of everything; a longer list begins with the shorter one.

    Returns:
        the folder of the task.
    """
    name, label, spacing_mm, draw = _TASKS[task]
    folder = root / name
    listed: dict[str, list[Any]] = {"training": [], "test": []}
    for number in range(1, cases + test + 1):
        file = f"{task}_{2 * number - 1:03d}.nii.gz"
        image, mask = draw((seed, 23, number))
        part = "imagesTr" if number <= cases else "imagesTs"
        write_nifti(folder / part / file, image.transpose(2, 1, 0), spacing_mm, axes="LPS")
        if number <= cases:
            write_nifti(folder / "labelsTr" / file, mask.transpose(2, 1, 0), spacing_mm, axes="LPS")
            listed["training"].append({"image": f"./imagesTr/{file}", "label": f"./labelsTr/{file}"})
        else:
            listed["test"].append(f"./imagesTs/{file}")
    content = {
        "name": task.capitalize(),
        "description": "A drawing, no patient was involved",
        "tensorImageSize": "3D",
        "modality": {"0": "CT"},
        "labels": {"0": "background", "1": label},
        "numTraining": cases,
        "numTest": test,
        **listed,
    }
    (folder / "dataset.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return folder


def _draw_lung(seed: tuple[int, ...]) -> Drawing:
    drawn = render_lesion_chest(("Lung nodule",), _SHAPE_DHW, seed, (9.0, 6.3, 6.3), extent_mm=(80.0, 120.0))
    mask = drawn.mask("Lung nodule")
    return drawn.hu + np.int16(_ENHANCED_HU) * mask, mask.astype(np.uint8)


def _draw_colon(seed: tuple[int, ...]) -> Drawing:
    """An abdomen with a gas-filled colon and an enhancing tumour of its wall."""
    rng = np.random.default_rng(seed)
    shift = rng.uniform(-8, 8, 3)
    placement = Placement((float(shift[0]), float(shift[1]), float(shift[2])), (float(rng.uniform(0.94, 1.06)),) * 3)
    canvas = Canvas(Grid(_SHAPE_DHW, (7.0, 5.5, 5.5)), placement)
    canvas.ellipsoid((0, 0, 0), (900, 115, 155), _FAT_HU)
    canvas.ellipsoid((20, 0, -55), (70, 60, 55), _MUSCLE_HU + 25)
    canvas.capsule((-200, 65, 0), (200, 65, 0), 30, _MUSCLE_HU + 100)
    for radius, value in ((19.0, _MUSCLE_HU), (13.0, _STOOL_GAS_HU)):
        for start, stop in itertools.pairwise(_COLON):
            canvas.capsule(start, stop, radius, value)
    part, along = int(rng.integers(len(_COLON) - 1)), rng.uniform(0.25, 0.75)
    z, y, x = (float(a + along * (b - a)) for a, b in zip(_COLON[part], _COLON[part + 1], strict=True))
    radius = float(rng.uniform(20, 30))
    canvas.ellipsoid((z, y, x), (1.2 * radius, radius, radius), _TUMOUR_HU, bit=_TUMOUR_BIT)
    canvas.hu += 15.0 * rng.standard_normal(_SHAPE_DHW).astype(np.float32)
    mask = (canvas.finding_bits >> _TUMOUR_BIT) & 1
    return np.rint(canvas.hu).clip(-1024, 3071).astype(np.int16), mask.astype(np.uint8)


# folder, name of label 1, stored voxel size (x, y, z) in mm, drawing
_TASKS: dict[str, tuple[str, str, tuple[float, float, float], Callable[[tuple[int, ...]], Drawing]]] = {
    "lung": ("Task06_Lung", "cancer", (1.2, 1.2, 2.5), _draw_lung),
    "colon": ("Task10_Colon", "colon cancer primaries", (1.0, 1.0, 2.0), _draw_colon),
}
