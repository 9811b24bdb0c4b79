"""A drawn COVID-19-20 download: ``Train`` with pairs of CT and lesion mask, ``Validation`` with CT alone (section 2).

``ROOT/Train/volume-covid19-A-0003_ct.nii.gz`` beside ``volume-covid19-A-0003_seg.nii.gz``; the numbers have gaps and
one in five names carries a further index, as published.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from mg3d.phantoms.canvas import Grid
from mg3d.phantoms.chest import ChestCase, Phantom, render
from mg3d.phantoms.downstream.nifti_file import write_nifti
from mg3d.phantoms.findings import draw_lesion

__all__ = ["render_lesion_chest", "write_covid19_20"]

_LESIONS = ("Lung opacity", "Consolidation")
_DRAWN_MM = (9.0, 6.3, 6.3)  # (z, y, x): the grid shows a whole chest
# The header claims less: a chest a quarter of the size, so that smoke runs need few windows.
STORED_SPACING_MM = (1.5, 1.5, 5.0)
_ORIGIN_MM = (96.0, 96.0, -90.0)
_HU = (-1024, 600)


def write_covid19_20(root: Path, *, cases: int = 7, unlabelled: int = 1, size: int = 64, seed: int = 0) -> None:
    """Write the data set.

    Args:
        root: folder that receives ``Train`` and ``Validation``.
        cases: pairs of CT and mask.
        unlabelled: scans of ``Validation``.
        size: voxels along x and y, at least 32; the scans have 36 slices.
        seed: seed of everything; a longer list begins with the shorter one.
    """
    for folder, first, count in (("Train", 1, cases), ("Validation", 700, unlabelled)):
        for number in range(first, first + count):
            drawn = render_lesion_chest(_LESIONS, (36, size, size), (seed, 22, number), _DRAWN_MM)
            stem = f"volume-covid19-A-{3 * number:04d}" + ("_1" if number % 5 == 0 else "")
            image = drawn.hu.clip(*_HU).transpose(2, 1, 0)
            write_nifti(root / folder / f"{stem}_ct.nii.gz", image, STORED_SPACING_MM, origin_mm=_ORIGIN_MM)
            if folder == "Train":
                mask = (drawn.mask(_LESIONS[0]) | drawn.mask(_LESIONS[1])).astype(np.uint8).transpose(2, 1, 0)
                write_nifti(root / folder / f"{stem}_seg.nii.gz", mask, STORED_SPACING_MM, origin_mm=_ORIGIN_MM)


def render_lesion_chest(
    findings: tuple[str, ...],
    shape_dhw: tuple[int, int, int],
    seed: tuple[int, ...],
    spacing_zyx_mm: tuple[float, float, float],
    extent_mm: tuple[float, float] | None = None,
) -> Phantom:
    """A drawn chest with the given findings.

    Args:
        findings: what to paint, names of `mg3d.phantoms.findings`.
        shape_dhw: voxels (z, y, x).
        seed: seed of anatomy, position, noise and findings.
        spacing_zyx_mm: voxel size while drawing.
        extent_mm: smallest and largest size of the findings; None takes the usual ones.
    """
    rng = np.random.default_rng(seed)
    lesions = [draw_lesion(name, rng) for name in findings]
    if extent_mm is not None:
        lesions = [replace(lesion, extent=float(rng.uniform(*extent_mm))) for lesion in lesions]
    patient, study = (int(value) for value in rng.integers(2**31, size=2))
    return render(ChestCase(patient, study, tuple(lesions)), Grid(shape_dhw, spacing_zyx_mm))
