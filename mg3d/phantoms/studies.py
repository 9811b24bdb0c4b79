"""Which studies a phantom set holds: patients, scans, reconstructions, findings and reports, all from one seed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mg3d.phantoms.canvas import Grid
from mg3d.phantoms.chest import ChestCase
from mg3d.phantoms.findings import draw_lesions, redraw_lesions
from mg3d.phantoms.report import Report, write_report

# Field of view in mm. The published crop keeps 0.88 of the depth, 0.65625 of the rows and 0.875 of the columns: body
# and lungs stay inside, table and most of the air go.
FIELD_MM = (300.0, 400.0, 400.0)
_SECOND_SCAN_SHARE = 0.06
_SECOND_RECONSTRUCTION_SHARE = 0.04
_STREAMS = {"train": 11, "valid": 12, "ctrg": 13}


@dataclass(frozen=True)
class Study:
    """One scan of one patient with its report.

    Attributes:
        patient: number of the patient within its split, from 1.
        scan: letter of the scan, from "a".
        case: what to draw.
        report: findings and impression.
        grids: sampling grid of every reconstruction.
    """

    patient: int
    scan: str
    case: ChestCase
    report: Report
    grids: tuple[Grid, ...]


def plan_studies(split: str, count: int, size: int, seed: int) -> Iterator[Study]:
    """Plan the studies of one split; a longer list begins with the shorter one.

    Args:
        split: "train", "valid" or "ctrg"; each draws from its own stream, so no patient is in two of them.
        count: number of scans.
        size: voxels per axis.
        seed: seed of the whole set.

    Yields:
        Studies in the order of their patients.

    Raises:
        KeyError: for another split.
    """
    stream, patient, made = _STREAMS[split], 0, 0
    while made < count:
        patient += 1
        rng = np.random.default_rng((seed, stream, patient))
        patient_seed = int(rng.integers(2**31))
        lesions = draw_lesions(rng)
        scans = "ab" if rng.random() < _SECOND_SCAN_SHARE else "a"
        for scan in scans[: count - made]:
            lesions = redraw_lesions(lesions, rng) if scan == "b" else lesions
            case = ChestCase(patient_seed, int(rng.integers(2**31)), lesions)
            twice = split != "ctrg" and rng.random() < _SECOND_RECONSTRUCTION_SHARE
            grids = (draw_grid(size, rng), *([draw_grid(size, rng, size + size // 4)] if twice else []))
            yield Study(patient, scan, case, write_report(lesions, rng), grids)
            made += 1


def draw_grid(size: int, rng: np.random.Generator, depth: int | None = None) -> Grid:
    """A grid over the standard field, varied by 2 %.

    Args:
        size: voxels per axis, at least 32.
        rng: source of the variation.
        depth: number of slices; None takes `size`.
    """
    depth = depth or size
    z, plane = FIELD_MM[0] / depth * rng.uniform(0.98, 1.02), FIELD_MM[1] / size * rng.uniform(0.98, 1.02)
    return Grid((depth, size, size), (round(float(z), 4), round(float(plane), 4), round(float(plane), 4)))
