"""A drawn ACDC download: beating hearts in short-axis cine-MRI, one folder a patient (downstream section 1).

``ROOT/training/patient001/``: ``Info.cfg``, ``patient001_4d.nii.gz``, and for end-diastole and end-systole
``patient001_frame01.nii.gz`` with ``patient001_frame01_gt.nii.gz``; ``ROOT/testing/patient101/`` likewise.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mg3d.phantoms.canvas import Axes, ellipsoid_distance
from mg3d.phantoms.downstream.nifti_file import write_nifti

__all__ = ["GROUPS", "write_acdc"]

GROUPS = ("NOR", "MINF", "DCM", "HCM", "RV")
SHAPE_XYZ = (96, 110, 8)
SPACING_MM = (1.5, 1.5, 10.0)
_FRAME_SECONDS = 0.07
_TISSUE, _LUNG, _MUSCLE, _BLOOD, _NOISE = 70.0, 25.0, 95.0, 190.0, 6.0
# radius of the left cavity, thickness of its wall, radius of the right cavity (mm), share of the radius left in systole
_HEARTS = {
    "NOR": (23.0, 9.0, 24.0, 0.70),
    "MINF": (26.0, 7.0, 24.0, 0.85),
    "DCM": (32.0, 7.5, 25.0, 0.92),
    "HCM": (20.0, 16.0, 22.0, 0.60),
    "RV": (22.0, 9.0, 34.0, 0.72),
}


@dataclass(frozen=True)
class _Heart:
    centre: tuple[float, float, float]
    cavity: float
    wall: float
    right: float
    systole: float


def write_acdc(root: Path, *, patients: int = 6, testing: int = 1, frames: int = 12, seed: int = 0) -> None:
    """Write the data set.

    Args:
        root: folder that receives ``training`` and ``testing``.
        patients: training patients, from ``patient001``; the five disease groups take turns.
        testing: test patients, from ``patient101``.
        frames: frames of a film; end-systole lies between the fifth and the last but two.
        seed: seed of everything; a longer list begins with the shorter one.
    """
    for part, first, count in (("training", 1, patients), ("testing", 101, testing)):
        for number in range(first, first + count):
            _write_patient(root / part / f"patient{number:03d}", number, frames, seed)
    (root / "MANDATORY_CITATION.md").write_text("A drawing, no patient was involved.\n", encoding="utf-8")


def _write_patient(folder: Path, number: int, frames: int, seed: int) -> None:
    rng = np.random.default_rng((seed, 21, number))
    group = GROUPS[(number - 1) % len(GROUPS)]
    systole = int(rng.integers(5, frames - 1))
    heart = _draw_heart(group, rng)
    film = [_render(heart, _contraction(frame, systole, frames), rng) for frame in range(1, frames + 1)]
    images = np.stack([image for image, _ in film], axis=-1)
    write_nifti(folder / f"{folder.name}_4d.nii.gz", images, (*SPACING_MM, _FRAME_SECONDS), axes="RAS")
    for frame in (1, systole):
        image, label = film[frame - 1]
        stem = f"{folder.name}_frame{frame:02d}"
        write_nifti(folder / f"{stem}.nii.gz", image, SPACING_MM, axes="RAS")
        write_nifti(folder / f"{stem}_gt.nii.gz", label, SPACING_MM, axes="RAS")
    lines = {"ED": 1, "ES": systole, "Group": group, "Height": 150.0 + number % 40, "NbFrame": frames, "Weight": 75.0}
    (folder / "Info.cfg").write_text("".join(f"{k}: {v}\n" for k, v in lines.items()), encoding="utf-8")


def _draw_heart(group: str, rng: np.random.Generator) -> _Heart:
    cavity, wall, right, systole = _HEARTS[group]
    size = rng.uniform(0.92, 1.08)
    x, y, z = (float(value) for value in rng.uniform(-6, 6, 3))
    return _Heart((x, y, 0.5 * z), cavity * size, wall * size, right * size, systole)


def _contraction(frame: int, systole: int, frames: int) -> float:
    """0 at the first frame, 1 at end-systole, back towards 0 at the end of the film."""
    if frame <= systole:
        return (frame - 1) / (systole - 1)
    return 1.0 - (frame - systole) / (frames + 1 - systole)


def _render(heart: _Heart, contraction: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Image int16 and label map uint8 [X,Y,Z]: 1 right cavity, 2 muscle, 3 left cavity."""
    axes = _axes(SHAPE_XYZ)
    shrink = 1.0 - (1.0 - heart.systole) * contraction
    cavity, wall = heart.cavity * shrink, heart.wall * (1.0 + 0.35 * contraction)
    x, y, z = heart.centre
    inner = ellipsoid_distance(axes, heart.centre, (cavity, cavity, 36.0)) <= 0
    outer = ellipsoid_distance(axes, heart.centre, (cavity + wall, cavity + wall, 36.0 + wall)) <= 0
    beside = (x + cavity + wall + 0.35 * heart.right, y + 6.0, z)  # towards the patient's right and front
    right = ellipsoid_distance(axes, beside, (heart.right * shrink, heart.right * 1.1 * shrink, 33.0)) <= 0
    label = np.zeros(SHAPE_XYZ, dtype=np.uint8)
    for code, where in ((1, right), (2, outer), (3, inner)):
        label[where] = code
    body = ellipsoid_distance(axes, (0.0, 0.0, 0.0), (68.0, 78.0, 500.0)) <= 0
    lungs = ellipsoid_distance(axes, (-38.0, 0.0, 0.0), (26.0, 52.0, 500.0)) <= 0
    values = np.array([_TISSUE, _BLOOD, _MUSCLE, _BLOOD])[label]
    values[lungs & (label == 0)] = _LUNG
    values += _NOISE * rng.standard_normal(SHAPE_XYZ)
    return np.where(body | (label > 0), values.round().clip(1), 0).astype(np.int16), label


def _axes(shape: tuple[int, int, int]) -> Axes:
    x, y, z = ((np.arange(n) - (n - 1) / 2) * step for n, step in zip(shape, SPACING_MM, strict=True))
    return x[:, None, None], y[None, :, None], z[None, None, :]
