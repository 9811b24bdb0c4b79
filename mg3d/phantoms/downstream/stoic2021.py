"""A drawn STOIC 2021 download: one MetaImage file a patient and a table of outcomes (downstream section 6).

``ROOT/data/mha/<PatientID>.mha`` and ``ROOT/metadata/reference.csv``; age and sex stand in the image headers.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mg3d.files import write_csv
from mg3d.phantoms.canvas import Grid
from mg3d.phantoms.chest import ChestCase, render
from mg3d.phantoms.downstream.meta_image import write_mha
from mg3d.phantoms.findings import draw_lesion
from mg3d.phantoms.studies import FIELD_MM

__all__ = ["REFERENCE_COLUMNS", "write_stoic2021"]

REFERENCE_COLUMNS = ("PatientID", "probCOVID", "probSevere")
_OUTCOMES = ((1, 0), (0, 0), (1, 1))  # patients take turns: mild, negative, severe


def write_stoic2021(
    root: Path, *, patients: int = 60, shape: tuple[int, int, int] = (48, 64, 64), seed: int = 0
) -> None:
    """Write the data set: opacities are COVID, with an effusion on both sides it is severe.

    Args:
        root: folder that receives ``data`` and ``metadata``.
        patients: number of patients; a third of them is COVID negative, a third severe.
        shape: voxels (D, H, W) of a scan.
        seed: seed of everything; a longer list begins with the shorter one.
    """
    folder = root / "data" / "mha"
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(patients):
        rng = np.random.default_rng((seed, 51, number))
        covid, severe = _OUTCOMES[number % len(_OUTCOMES)]
        names = ["Lung opacity"] * covid + ["Pleural effusion", "Consolidation"] * severe
        lesions = tuple(draw_lesion(name, rng) for name in names)
        case = ChestCase(int(rng.integers(2**31)), int(rng.integers(2**31)), lesions)
        spacing = [extent / n * rng.uniform(0.95, 1.05) for extent, n in zip(FIELD_MM, shape, strict=True)]
        z, y, x = (round(float(step), 4) for step in (spacing[0], spacing[1], spacing[1]))
        hu = render(case, Grid(shape, (z, y, x))).hu
        patient = number * 7 + 1  # the published numbers have gaps
        tags = {"PatientAge": f"{int(rng.integers(25, 90)):03d}Y", "PatientSex": "MF"[int(rng.integers(2))]}
        write_mha(folder / f"{patient}.mha", hu, (z, y, x), tuple(rng.uniform(-250, 0, 3).round(1)), tags)
        rows.append((patient, covid, severe))
    write_csv(root / "metadata" / "reference.csv", REFERENCE_COLUMNS, rows)
