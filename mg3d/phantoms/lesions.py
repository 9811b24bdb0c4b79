"""Painting of the findings into a drawn chest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np

from mg3d.datasets.labels import CT_RATE_LABELS
from mg3d.phantoms.canvas import Canvas, Point, ellipsoid_distance, smooth_noise
from mg3d.phantoms.findings import Lesion

ORGANS: Mapping[str, int] = MappingProxyType(
    {
        name: code
        for code, name in enumerate(
            (
                "body",
                "bone",
                "left lung",
                "right lung",
                "abdomen",
                "mediastinum",
                "heart",
                "aorta",
                "vessel",
                "airway",
            ),
            start=1,
        )
    }
)
HEART_CENTRE: Point = (-30.0, -30.0, 20.0)
_NORMAL_WIDTH = 112.0
_FLUID_HU = 10.0
_FAT_HU = -100.0
_SIGN = {"left": 1.0, "right": -1.0}


@dataclass(frozen=True)
class Thorax:
    """Measures of one patient that the findings depend on.

    Attributes:
        normal_heart_width: width of the heart in health, mm.
        heart_width: width of the heart as drawn, mm.
        diaphragm_mm: height of the diaphragm over the average, mm: how deep the patient breathed in.
    """

    normal_heart_width: float
    heart_width: float
    diaphragm_mm: float

    def aorta(self) -> tuple[tuple[Point, Point, float], ...]:
        """Tubes (start, stop, radius in mm): ascending part, arch, descending part."""
        return (
            ((-8.0, -18.0, -6.0), (56.0, -10.0, -10.0), 15.0),
            ((56.0, -10.0, -10.0), (62.0, 46.0, 16.0), 13.0),
            ((62.0, 46.0, 16.0), (-150.0, 50.0, 14.0), 12.0),
        )


def heart_radii(width_mm: float) -> Point:
    """Semi-axes (z, y, x) in mm of a heart of the given width."""
    scale = width_mm / _NORMAL_WIDTH
    return 50.0 * scale, 44.0 * scale, 56.0 * scale


def paint_lesions(canvas: Canvas, thorax: Thorax, lesions: tuple[Lesion, ...]) -> None:
    """Paint the findings of a study, from the lung outwards so that fluid and metal lie on top.

    Args:
        canvas: the chest, already drawn.
        thorax: measures of the patient.
        lesions: findings of the study.
    """
    by_name = {lesion.finding: lesion for lesion in lesions}
    for finding, paint in _PAINTERS.items():
        if finding in by_name:
            paint(canvas, thorax, by_name[finding], CT_RATE_LABELS.index(finding))


def _lung(canvas: Canvas, side: str) -> np.ndarray:
    return canvas.organs == ORGANS[f"{side} lung"]


def _fill(canvas: Canvas, side: str, share: np.ndarray, value: np.ndarray | float, bit: int) -> None:
    """Replace air by something denser, up to the edge voxels of the lung that air fills only partly."""
    share = share * canvas.regions[side]
    canvas.hu += share * (np.maximum(canvas.hu, value) - canvas.hu)
    everywhere = (slice(None), slice(None), slice(None))
    canvas.mark(everywhere, share * _lung(canvas, side), bit)


def _lobe_centre(lesion: Lesion, side: str, rng: np.random.Generator) -> Point:
    jitter = rng.uniform(-1, 1, 3)
    z, y = (58.0, -8.0) if lesion.site == "upper" else (-34.0, 32.0)
    return z + 10 * jitter[0], y + 14 * jitter[1], _SIGN[side] * (64.0 + 6 * jitter[2])


def _paint_emphysema(canvas: Canvas, thorax: Thorax, lesion: Lesion, bit: int) -> None:
    rng = np.random.default_rng(lesion.seed)
    holes = smooth_noise(rng, canvas.grid.shape, 10)
    inside = _lung(canvas, "left") | _lung(canvas, "right")
    upper = np.clip((canvas.everywhere()[0] + 90) / 120, 0.3, 1.0)
    loss = (lesion.extent / 28.0) * upper * (40.0 + 110.0 * (holes > 0.5))
    empty = np.minimum(canvas.hu, np.maximum(canvas.hu - loss - 15, -985.0))
    canvas.hu[inside] = empty[inside]
    canvas.finding_bits[inside & (loss > 50)] |= np.uint32(1 << bit)


def _paint_in_lung(canvas: Canvas, lesion: Lesion, bit: int, value: np.ndarray | float, roughness: float) -> None:
    rng = np.random.default_rng(lesion.seed)
    for side in lesion.sides():
        centre, radius = _lobe_centre(lesion, side, rng), lesion.extent / 2
        stretch = rng.uniform(0.85, 1.15, 3)
        radii = (radius * stretch[0], radius * stretch[1], radius * stretch[2])
        distance = ellipsoid_distance(canvas.everywhere(), centre, radii)
        distance = distance + roughness * smooth_noise(rng, canvas.grid.shape, 12)
        _fill(canvas, side, canvas.occupancy(distance), value, bit)


def _paint_opacity(canvas: Canvas, thorax: Thorax, lesion: Lesion, bit: int) -> None:
    _paint_in_lung(canvas, lesion, bit, -480.0, 6.0)


def _paint_consolidation(canvas: Canvas, thorax: Thorax, lesion: Lesion, bit: int) -> None:
    rng = np.random.default_rng((lesion.seed, 1))
    bronchi = smooth_noise(rng, canvas.grid.shape, 16) > 1.0
    _paint_in_lung(canvas, lesion, bit, np.where(bronchi, -300.0, 30.0).astype(np.float32), 4.0)


def _paint_nodule(canvas: Canvas, thorax: Thorax, lesion: Lesion, bit: int) -> None:
    _paint_in_lung(canvas, lesion, bit, 40.0, 0.0)


def _paint_cardiomegaly(canvas: Canvas, thorax: Thorax, lesion: Lesion, bit: int) -> None:
    """The heart is already drawn large; mark what a normal heart would not have filled."""
    normal = ellipsoid_distance(canvas.everywhere(), HEART_CENTRE, heart_radii(thorax.normal_heart_width))
    canvas.finding_bits[(canvas.organs == ORGANS["heart"]) & (normal > 0)] |= np.uint32(1 << bit)


def _paint_pleural_effusion(canvas: Canvas, thorax: Thorax, lesion: Lesion, bit: int) -> None:
    z, y, _ = canvas.everywhere()
    depth = 0.75 * y - 0.66 * z
    for side in lesion.sides():
        cavity = _lung(canvas, side)
        level = float(np.quantile(np.broadcast_to(depth, cavity.shape)[cavity], 1 - lesion.extent / 100))
        _fill(canvas, side, canvas.occupancy(level - depth), _FLUID_HU, bit)


def _paint_pericardial_effusion(canvas: Canvas, thorax: Thorax, lesion: Lesion, bit: int) -> None:
    """Fluid outside a rim of epicardial fat; it pushes the lung aside."""
    everywhere = (slice(None), slice(None), slice(None))
    distance = ellipsoid_distance(canvas.everywhere(), HEART_CENTRE, heart_radii(thorax.heart_width))
    heart = canvas.occupancy(distance)
    above = canvas.organs != ORGANS["abdomen"]
    fluid = canvas.occupancy(distance - 7 - lesion.extent) * (1 - heart) * above
    canvas.blend(everywhere, fluid, _FLUID_HU)
    canvas.blend(everywhere, canvas.occupancy(np.abs(distance - 3.5) - 3.5) * above, _FAT_HU)
    canvas.mark(everywhere, fluid * (distance > 7), bit)


def _paint_hernia(canvas: Canvas, thorax: Thorax, lesion: Lesion, bit: int) -> None:
    """A pouch of stomach behind the heart: wall, gas in front, fluid behind (the patient lies on the back)."""
    everywhere = (slice(None), slice(None), slice(None))
    radius = lesion.extent / 2
    axes = canvas.everywhere()
    rng = np.random.default_rng(lesion.seed)
    jitter = rng.uniform(-1, 1, 2)
    centre = (-50.0 + thorax.diaphragm_mm + radius + 8 * jitter[0], 36.0, 4.0 + 8 * jitter[1])
    wall = ellipsoid_distance(axes, centre, (radius, radius * 0.9, radius))
    canvas.blend(everywhere, canvas.occupancy(wall), 35.0)
    gas = np.maximum(wall + 4.0, axes[1] - (centre[1] + 0.25 * radius))
    canvas.blend(everywhere, canvas.occupancy(gas), -950.0)
    canvas.mark(everywhere, canvas.occupancy(wall), bit)


def _paint_calcification(canvas: Canvas, thorax: Thorax, lesion: Lesion, bit: int) -> None:
    rng = np.random.default_rng(lesion.seed)
    for start, stop, radius in thorax.aorta():
        for _ in range(3):
            share, angle = rng.random(), rng.uniform(0, 2 * np.pi)
            z = start[0] + share * (max(stop[0], -90.0) - start[0])
            y = start[1] + share * (stop[1] - start[1]) + radius * float(np.sin(angle))
            x = start[2] + share * (stop[2] - start[2]) + radius * float(np.cos(angle))
            size = lesion.extent / 2
            canvas.ellipsoid((z, y, x), (2 * size, size, size), 700.0, bit=bit)


def _paint_material(canvas: Canvas, thorax: Thorax, lesion: Lesion, bit: int) -> None:
    """A pacemaker under the collar bone with a lead to the heart."""
    jitter = np.random.default_rng(lesion.seed).uniform(-1, 1, 2)
    half, height = lesion.extent / 2, 82.0 + 14 * jitter[0]
    for side in lesion.sides():
        x = _SIGN[side] * (66.0 + 12 * jitter[1])
        canvas.box((height, -84, x), (half * 0.9, 6, half), 2600.0, bit=bit)
        canvas.capsule((height - half, -74, x), (60, -20, -26), 2, 2200.0, bit=bit)
        canvas.capsule((60, -20, -26), (-30, -30, 16), 2, 2200.0, bit=bit)


_PAINTERS: Mapping[str, Callable[[Canvas, Thorax, Lesion, int], None]] = MappingProxyType(
    {
        "Emphysema": _paint_emphysema,
        "Lung opacity": _paint_opacity,
        "Consolidation": _paint_consolidation,
        "Lung nodule": _paint_nodule,
        "Cardiomegaly": _paint_cardiomegaly,
        "Pleural effusion": _paint_pleural_effusion,
        "Pericardial effusion": _paint_pericardial_effusion,
        "Hiatal hernia": _paint_hernia,
        "Arterial wall calcification": _paint_calcification,
        "Medical material": _paint_material,
    }
)
