"""A drawn chest CT: body, lungs, heart, great vessels, spine and ribs, and the findings of a study painted into it.

Sizes and Hounsfield values are textbook figures for an adult lying on the back with raised arms. Volumes are stored in
canonical order [D, H, W]: z towards the head, y towards the back, x towards the patient's left.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mg3d.datasets.labels import CT_RATE_LABELS
from mg3d.phantoms.canvas import Canvas, Grid, Placement, ellipsoid_distance, smooth_noise
from mg3d.phantoms.findings import Lesion
from mg3d.phantoms.lesions import HEART_CENTRE, ORGANS, Thorax, heart_radii, paint_lesions

_LUNG_HU = -850.0
_FAT_HU = -100.0
_SOFT_HU = 45.0
_BLOOD_HU = 42.0
_HU_RANGE = (-1024, 3071)
_LOW_MM = 10.0  # the field reaches further above the lungs' centre than below, as in a chest scan


@dataclass(frozen=True)
class ChestCase:
    """Everything that decides a study; rendering it twice on one grid gives the same bytes.

    Attributes:
        patient_seed: seed of the anatomy.
        study_seed: seed of position and noise.
        lesions: findings of the study.
    """

    patient_seed: int
    study_seed: int
    lesions: tuple[Lesion, ...]


@dataclass(frozen=True)
class Phantom:
    """A rendered study.

    Attributes:
        hu: int16 [D, H, W], Hounsfield units in -1024..3071.
        organs: uint8 [D, H, W], codes of `mg3d.phantoms.lesions.ORGANS`, 0 outside.
        finding_bits: uint32 [D, H, W]; bit k is set where CT-RATE label k was painted.
        spacing_mm: voxel size (z, y, x).
    """

    hu: np.ndarray
    organs: np.ndarray
    finding_bits: np.ndarray
    spacing_mm: tuple[float, float, float]

    def mask(self, finding: str) -> np.ndarray:
        """Boolean [D, H, W]: the voxels of one finding.

        Raises:
            ValueError: for a name that is not a CT-RATE label.
        """
        return (self.finding_bits >> CT_RATE_LABELS.index(finding)) & 1 == 1


def render(case: ChestCase, grid: Grid, reconstruction: int = 0) -> Phantom:
    """Draw a study.

    Args:
        case: patient, position and findings.
        grid: voxels and voxel size; a field of about 300 x 400 x 400 mm shows the whole chest.
        reconstruction: number of the reconstruction; each has its own noise.

    Returns:
        The volume with its organ and finding masks.
    """
    patient = np.random.default_rng((case.patient_seed, 1))
    study = np.random.default_rng((case.study_seed, 2))
    canvas = Canvas(grid, _placement(patient, study))
    thorax = _draw_thorax(patient, case.lesions)
    _paint_wall(canvas, patient)
    _paint_lungs(canvas, thorax, patient)
    _paint_abdomen(canvas, thorax, patient)
    _paint_mediastinum(canvas, thorax)
    _paint_lung_vessels(canvas, patient)
    paint_lesions(canvas, thorax, case.lesions)
    noise = np.random.default_rng((case.study_seed, 3, reconstruction))
    canvas.hu += noise.uniform(14, 24) * noise.standard_normal(grid.shape, dtype=np.float32)
    hu = np.rint(canvas.hu).clip(*_HU_RANGE).astype(np.int16)
    return Phantom(hu, canvas.organs, canvas.finding_bits, grid.spacing_mm)


def _placement(patient: np.random.Generator, study: np.random.Generator) -> Placement:
    size = patient.uniform(0.94, 1.05)
    z, y, x = (float(v) for v in size * patient.uniform(0.95, 1.05, 3))
    shift = [float(v) for v in study.uniform(-12, 12, 3)]
    return Placement((shift[0] - _LOW_MM, shift[1], shift[2]), (z, y, x))


def _draw_thorax(patient: np.random.Generator, lesions: tuple[Lesion, ...]) -> Thorax:
    width, diaphragm = float(patient.uniform(98, 118)), float(patient.uniform(-16, 16))
    enlarged = [lesion.extent for lesion in lesions if lesion.finding == "Cardiomegaly"]
    return Thorax(width, enlarged[0] if enlarged else width, diaphragm)


def _paint_wall(canvas: Canvas, patient: np.random.Generator) -> None:
    z, y, x = canvas.everywhere()
    fat = float(patient.uniform(8, 32))
    everywhere = (slice(None), slice(None), slice(None))
    column = np.ones_like(z)
    body = canvas.occupancy(_oval(y, x, 122, 165)) * column
    canvas.blend(everywhere, body, _FAT_HU, ORGANS["body"])
    canvas.blend(everywhere, canvas.occupancy(_oval(y, x, 122 - fat, 165 - fat)) * column, _SOFT_HU)
    stripes = canvas.occupancy(np.abs((z + 0.35 * y) % 27 - 13.5) - 5)
    shell = canvas.occupancy(np.abs(_oval(y, x, 98, 133)) - 4)
    canvas.blend(everywhere, stripes * shell, 420.0, ORGANS["bone"])
    canvas.box((20, -98, 0), (85, 5, 18), 260.0, ORGANS["bone"])
    canvas.box((0, 152, 0), (400, 5, 200), -350.0)


def _paint_lungs(canvas: Canvas, thorax: Thorax, patient: np.random.Generator) -> None:
    axes = canvas.everywhere()
    z, y, x = axes
    everywhere = (slice(None), slice(None), slice(None))
    texture = 25 * smooth_noise(patient, canvas.grid.shape, 7)
    value = _LUNG_HU + patient.uniform(-30, 30) + 0.35 * y + texture
    for side, centre_x, radius in (("left", 62.0, 57.0), ("right", -62.0, 60.0)):
        cavity = ellipsoid_distance(axes, (-10, 4, centre_x), (138, 89, radius))
        share = canvas.occupancy(np.maximum(cavity, _dome(y, x, thorax) - z))
        canvas.blend(everywhere, share, value, ORGANS[f"{side} lung"])
        canvas.regions[side] = share > 0


def _paint_abdomen(canvas: Canvas, thorax: Thorax, patient: np.random.Generator) -> None:
    z, y, x = canvas.everywhere()
    everywhere = (slice(None), slice(None), slice(None))
    below = canvas.occupancy(np.maximum(z - _dome(y, x, thorax), _oval(y, x, 90, 122)))
    liver = canvas.occupancy(x - 28)
    canvas.blend(everywhere, below, 40.0 + 15.0 * liver, ORGANS["abdomen"])
    gas = float(patient.uniform(0, 34))  # the stomach under the left half of the diaphragm
    canvas.ellipsoid((-108 + thorax.diaphragm_mm, -30, 58), (0.6 * gas, 0.8 * gas, gas), -900.0)


def _paint_mediastinum(canvas: Canvas, thorax: Thorax) -> None:
    canvas.ellipsoid((30, 0, 0), (135, 78, 27), -20.0, ORGANS["mediastinum"])
    for level in range(-143, 150, 26):
        canvas.capsule((level - 6, 74, 0), (level + 6, 74, 0), 17, 130.0, ORGANS["bone"])
    canvas.capsule((-150, 98, 0), (150, 98, 0), 9, 200.0, ORGANS["bone"])
    canvas.ellipsoid(HEART_CENTRE, heart_radii(thorax.heart_width), _SOFT_HU, ORGANS["heart"])
    for start, stop, radius in thorax.aorta():
        canvas.capsule(start, stop, radius, _BLOOD_HU, ORGANS["aorta"])
    canvas.capsule((0, -4, -26), (95, 0, -26), 9, _BLOOD_HU, ORGANS["vessel"])
    canvas.capsule((15, -32, 18), (28, 12, 30), 13, _BLOOD_HU, ORGANS["vessel"])
    canvas.capsule((24, 4, 10), (22, 12, -34), 11, _BLOOD_HU, ORGANS["vessel"])
    canvas.capsule((44, 14, 1), (150, 6, 1), 9, -1000.0, ORGANS["airway"])
    for side in (1, -1):
        canvas.capsule((44, 14, 1), (16, 18, 42 * side), 6, -1000.0, ORGANS["airway"])


def _paint_lung_vessels(canvas: Canvas, patient: np.random.Generator) -> None:
    for side in (1, -1):
        for _ in range(6):
            start = (8.0, 14.0, 40.0 * side)
            reach = patient.uniform((-80, -60, 15), (85, 60, 55))
            stop = (8 + float(reach[0]), 10 + float(reach[1]), side * (40 + float(reach[2]) * 0.9))
            middle = (0.5 * (start[0] + stop[0]), 0.5 * (start[1] + stop[1]), 0.5 * (start[2] + stop[2]))
            canvas.capsule(start, middle, 4, -100.0)
            canvas.capsule(middle, stop, 2, -500.0)


def _oval(y: np.ndarray, x: np.ndarray, radius_y: float, radius_x: float) -> np.ndarray:
    """Approximate signed distance to an upright oval cylinder; [1, H, W]."""
    unit = np.sqrt((y / radius_y) ** 2 + (x / radius_x) ** 2)
    return (unit - 1.0) * min(radius_y, radius_x)


def _dome(y: np.ndarray, x: np.ndarray, thorax: Thorax) -> np.ndarray:
    """Height of the diaphragm in mm; the right half stands higher; [1, H, W]."""
    left = -60 - 50 * ((x - 62) / 66) ** 2
    right = -48 - 50 * ((x + 62) / 66) ** 2
    height = np.where(x > 0, left, right) - 55 * (y / 95) ** 2 + thorax.diaphragm_mm
    return np.maximum(height, -145.0)
