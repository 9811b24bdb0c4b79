"""A drawn LUNA16 download: lung blocks with vessels and nodules, candidates and annotations (downstream section 4).

``ROOT/subset0..9/<seriesuid>.mhd`` with its ``.raw``, ``ROOT/candidates.csv`` and ``ROOT/annotations.csv``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mg3d.files import write_csv
from mg3d.phantoms.canvas import Canvas, Grid, Placement, Point, smooth_noise
from mg3d.phantoms.downstream.meta_image import write_mhd

__all__ = ["ANNOTATION_COLUMNS", "CANDIDATE_COLUMNS", "write_luna16"]

CANDIDATE_COLUMNS = ("seriesuid", "coordX", "coordY", "coordZ", "class")
ANNOTATION_COLUMNS = ("seriesuid", "coordX", "coordY", "coordZ", "diameter_mm")
_UID_ROOT = "1.3.6.1.4.1.14519.5.2.1.6279.6001"
_SPACING_MM = (1.25, 0.8, 0.8)
_THIN_SLICES = 40  # fewer than the 48 of a cube
_NODULE_HU, _VESSEL_HU, _LUNG_HU = 30.0, 0.0, -860.0


@dataclass(frozen=True)
class _Scan:
    uid: str
    hu: np.ndarray
    centres_mm: list[Point]
    diameters_mm: list[float]
    decoys_mm: list[Point]


def write_luna16(
    root: Path,
    *,
    subsets: Sequence[int] = tuple(range(10)),
    scans: int = 2,
    nodules: int = 4,
    decoys: int = 20,
    shape: tuple[int, int, int] = (72, 112, 112),
    seed: int = 0,
) -> None:
    """Write the data set.

    The first two decoys of a scan are its first and last voxel, so that cubes meet every border. The first scan of the
    last subset has only 40 slices, the first one of subset 3 is stored with its x and y axes reversed, as a few of
    the published scans are.

    Args:
        root: folder that receives the subsets and tables.
        subsets: numbers of the subsets that are written.
        scans: scans of each.
        nodules: true nodules of a scan; each has one candidate up to 1 mm off its centre.
        decoys: candidates of a scan that are no nodule: lung, or a vessel.
        shape: voxels (D, H, W) of a scan.
        seed: seed of everything.
    """
    candidates: list[tuple[object, ...]] = []
    annotations: list[tuple[object, ...]] = []
    for subset in subsets:
        folder = root / f"subset{subset}"
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(scans):
            rng = np.random.default_rng((seed, 31, subset, number))
            thin = number == 0 and subset == subsets[-1]
            scan = _draw((_THIN_SLICES, *shape[1:]) if thin else shape, nodules, decoys, rng)
            world = _World(scan.hu.shape, tuple(rng.uniform(-250, -100, 3).round(2)))
            reverse = -1 if number == 0 and subset == 3 else 1
            _write_scan(folder, scan, world, reverse)
            places = [(scan.uid, *world.xyz(c), d) for c, d in zip(scan.centres_mm, scan.diameters_mm, strict=True)]
            annotations += places
            found = [tuple(c + rng.uniform(-0.6, 0.6, 3)) for c in np.asarray(scan.centres_mm).reshape(-1, 3)]
            rows = [(scan.uid, *world.xyz(c), 0) for c in scan.decoys_mm] + [
                (scan.uid, *world.xyz(c), 1) for c in found
            ]
            candidates += [rows[k] for k in rng.permutation(len(rows))]
    write_csv(root / "candidates.csv", CANDIDATE_COLUMNS, candidates)
    write_csv(root / "annotations.csv", ANNOTATION_COLUMNS, annotations)


@dataclass(frozen=True)
class _World:
    """World millimetres of the canvas, whose zero is the centre of the grid."""

    shape: tuple[int, ...]
    origin_mm: tuple[float, ...]

    def xyz(self, centre_zyx: Sequence[float]) -> tuple[float, ...]:
        z, y, x = (c + (n - 1) / 2 * step for c, n, step in zip(centre_zyx, self.shape, _SPACING_MM, strict=True))
        return tuple(round(float(o + value), 4) for o, value in zip(self.origin_mm, (x, y, z), strict=True))


def _write_scan(folder: Path, scan: _Scan, world: _World, sign: int) -> None:
    _, height, width = scan.hu.shape
    voxels = scan.hu[:, ::sign, ::sign]
    corner = list(world.origin_mm)
    if sign < 0:
        corner[0] += (width - 1) * _SPACING_MM[2]
        corner[1] += (height - 1) * _SPACING_MM[1]
    write_mhd(folder / f"{scan.uid}.mhd", voxels, _SPACING_MM, corner, (sign, sign, 1))


def _draw(shape: tuple[int, int, int], nodules: int, decoys: int, rng: np.random.Generator) -> _Scan:
    canvas = Canvas(Grid(shape, _SPACING_MM), Placement((0, 0, 0), (1, 1, 1)), _LUNG_HU)
    canvas.hu += 40 * smooth_noise(rng, shape, 6)
    half = [(n - 1) / 2 * step for n, step in zip(shape, _SPACING_MM, strict=True)]
    inner = [0.8 * length for length in half]
    vessels = []
    for _ in range(max(decoys // 2, 1)):
        start, stop = rng.uniform(-1, 1, (2, 3)) * half
        canvas.capsule(_point(start), _point(stop), float(rng.uniform(0.8, 2.0)), _VESSEL_HU)
        vessels.append((start + stop) / 2)
    centres: list[Point] = []
    diameters: list[float] = []
    for _ in range(nodules):
        centre, radius = _point(rng.uniform(-1, 1, 3) * inner), float(rng.uniform(4, 8))
        canvas.ellipsoid(centre, (radius, radius, radius), _NODULE_HU)
        centres.append(centre)
        diameters.append(round(2 * radius, 3))
    canvas.hu += 25 * rng.standard_normal(shape, dtype=np.float32)
    places = [_point(-np.asarray(half)), _point(half), *map(_point, vessels)]
    while len(places) < decoys:
        place = rng.uniform(-1, 1, 3) * half
        if all(np.linalg.norm(place - centre) > 15 for centre in centres):
            places.append(_point(place))
    uid = f"{_UID_ROOT}.{int(rng.integers(10**17, 10**18))}"
    return _Scan(uid, np.rint(canvas.hu).clip(-1024, 3071).astype(np.int16), centres, diameters, places[:decoys])


def _point(values: Sequence[float] | np.ndarray) -> Point:
    z, y, x = (float(value) for value in values)
    return z, y, x
