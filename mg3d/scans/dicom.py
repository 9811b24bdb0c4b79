"""Read one DICOM series: from the folder that holds its slices, or from one enhanced multi-frame file.

Slices are ordered by their position along the slice normal, never by file name. The stack must be complete: doubled,
missing, shifted or unlike slices are refused with the files named. A distance of about twice the usual one (the median)
is a missing slice; distances that vary by less are interpolated linearly onto even ones, with a warning.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from mg3d.errors import DataError
from mg3d.scans.byte_stream import damage_named, digest_of_files
from mg3d.scans.dicom_pixels import read_pixels
from mg3d.scans.dicom_series import normal_of, slices_at, some
from mg3d.scans.dicom_slice import CONVERT, Slice
from mg3d.scans.itk_image import ras_affine
from mg3d.scans.raw_volume import DOWNLOAD_AGAIN, RawVolume, check_affine, check_layout, check_spacing

SAME_PLACE_MM = 1e-3
MAX_UNEVENNESS = 0.1  # of the usual distance between slices
INTERPOLATED_STEPS = (0.5, 1.9)  # shortest and longest distance that is interpolated, of the usual one
MAX_SIDE_STEP_MM = 1.0
MAX_TILT_DEGREES = 1.0
LIKENESS = {"size": ("matrix size", 0.0), "spacing_mm": ("pixel spacing", 1e-4), "directions": ("orientation", 1e-3)}


def read_dicom_series(place: Path, max_volume_gib: float = 4.0, series: str = "") -> RawVolume:
    """Read one series.

    Args:
        place: folder that holds the slices directly, or one multi-frame file.
        max_volume_gib: refuse series that claim more voxel data than this, before any of it is read.
        series: which of several: SeriesInstanceUID or ``largest`` (most slices, then the lowest number).

    Returns:
        the voxels in Hounsfield units, [X,Y,Z] with Z along the slice normal.

    Raises:
        DataError: no CT slice, several series and no choice, an incomplete stack, or a slice that cannot be read.
    """
    warnings: list[str] = []
    with damage_named(place):
        slices = _in_order(slices_at(place, series, warnings), place, warnings)
        _check_alike(slices, place)
        in_hu = _check_rescale(slices, place)
        heights = _heights(slices, place)
        targets = _even_heights(slices, heights, place, warnings)
        dtype = np.result_type(*{item.dtype for item in slices})
        stored_bytes = sum({item.path: item.path.stat().st_size for item in slices}.values())
        shape = check_layout((*slices[0].size, len(targets)), dtype, stored_bytes, max_volume_gib, str(place))
        affine, spacing_mm = _geometry(slices, len(targets), float(heights[-1]), place, warnings)
        voxels_zyx = _stack(_planes(slices, heights, targets), shape, dtype)
    if not in_hu:
        warnings.append("slices without rescale slope and intercept: their values are taken as stored")
    digest = digest_of_files({item.sha256 for item in slices})
    voxels_xyz = voxels_zyx.transpose(2, 1, 0)
    return RawVolume(
        voxels_xyz, affine, spacing_mm, 1.0, 0.0, True, tuple(warnings), digest, str(place), hounsfield=in_hu
    )


def _in_order(slices: Sequence[Slice], place: Path, warnings: list[str]) -> list[Slice]:
    lacking = [item.name for item in slices if not (item.position and item.directions)]
    if lacking:
        message = f"no usable image position or orientation in {len(lacking)} slices ({some(lacking)})"
        raise DataError(f"{message}: their order is unknown", CONVERT, path=str(place))
    kept = {(item.sha256, item.frame): item for item in reversed(slices)}
    if len(kept) < len(slices):
        warnings.append(f"{len(slices) - len(kept)} copies of slices left out")
    normal = normal_of(slices[0])
    return sorted(kept.values(), key=lambda item: float(normal @ np.asarray(item.position)))


def _check_alike(slices: Sequence[Slice], place: Path) -> None:
    for kind, (words, tolerance) in LIKENESS.items():
        values = [getattr(item, kind) for item in slices]
        usual = Counter(values).most_common(1)[0][0]
        odd = [
            item.name
            for item, value in zip(slices, values, strict=True)
            if len(value) != len(usual) or not np.allclose(value, usual, rtol=0, atol=tolerance)
        ]
        if odd:
            remedy = "keep one acquisition per folder"
            raise DataError(f"{len(odd)} slices differ in {words} ({some(odd)})", remedy, path=str(place))


def _check_rescale(slices: Sequence[Slice], place: Path) -> bool:
    """Whether the slices state their rescaling: all of them or none."""
    lacking = [item.name for item in slices if item.rescale is None]
    if lacking and len(lacking) < len(slices):
        message = f"{len(lacking)} slices have no rescale slope and intercept, the others do ({some(lacking)})"
        raise DataError(message, CONVERT, path=str(place))
    return not lacking


def _heights(slices: Sequence[Slice], place: Path) -> np.ndarray:
    """Places along the normal, the first one 0."""
    positions = np.array([item.position for item in slices])
    heights = (positions - positions[0]) @ normal_of(slices[0])
    doubled = [pair for pair, step in zip(_pairs(slices), np.diff(heights), strict=True) if step < SAME_PLACE_MM]
    if doubled:
        message = f"{len(doubled)} pairs of slices at the same position ({some(doubled)})"
        raise DataError(message, "keep one acquisition (phase, time point) per folder", path=str(place))
    whole = positions[-1] - positions[0]
    beside = positions - positions[0] - np.outer(heights / heights[-1], whole)
    if np.linalg.norm(beside, axis=1).max() > MAX_SIDE_STEP_MM:
        raise DataError("the slices are not stacked along one line", CONVERT, path=str(place))
    return heights


def _pairs(slices: Sequence[Slice]) -> list[str]:
    return [f"{low.name} and {high.name}" for low, high in pairwise(slices)]


def _even_heights(slices: Sequence[Slice], heights: np.ndarray, place: Path, warnings: list[str]) -> np.ndarray:
    """Places of the volume's planes: those of the slices, or evenly spaced ones between the first and the last."""
    steps = np.diff(heights)
    usual = float(np.median(steps))
    shortest, longest = (limit * usual for limit in INTERPOLATED_STEPS)
    gaps = [f"{step:.2f} mm between {pair}" for pair, step in zip(_pairs(slices), steps, strict=True) if step > longest]
    if gaps:
        missing = int(np.rint(steps / usual - 1).clip(0).sum())
        message = f"{missing} slices are missing ({some(gaps)}; usual distance {usual:.2f} mm)"
        raise DataError(message, DOWNLOAD_AGAIN.replace("file", "whole series"), path=str(place))
    if np.abs(steps - usual).max() <= MAX_UNEVENNESS * usual:
        return heights
    span = f"uneven slice distances of {steps.min():.2f} to {steps.max():.2f} mm"
    acquisitions = {item.acquisition for item in slices}
    if steps.min() < shortest or len(acquisitions) > 1:
        several = f" in {len(acquisitions)} acquisitions" if len(acquisitions) > 1 else ""
        remedy = "keep one acquisition per folder, or resample the series to even slices first"
        raise DataError(f"{span}{several}", remedy, path=str(place))
    count = round(float(heights[-1]) / usual) + 1
    warnings.append(f"{span}: interpolated linearly to {count} slices {heights[-1] / (count - 1):.3f} mm apart")
    return np.linspace(0.0, heights[-1], count)


def _geometry(
    slices: Sequence[Slice], count: int, height: float, place: Path, warnings: list[str]
) -> tuple[np.ndarray, tuple[float, float, float] | None]:
    whole = np.asarray(slices[-1].position) - np.asarray(slices[0].position)
    tilt = float(np.degrees(np.arccos(min(height / float(np.linalg.norm(whole)), 1.0))))
    if tilt > MAX_TILT_DEGREES:
        warnings.append(f"gantry tilt of {tilt:.1f} degrees")
    step = whole / (count - 1)
    between_rows, between_columns = slices[0].spacing_mm or (1.0, 1.0)
    sizes = (between_columns, between_rows, float(np.linalg.norm(step)))
    row, column = np.reshape(slices[0].directions, (2, 3))
    affine = ras_affine(np.column_stack((row, column, step / sizes[2])), sizes, slices[0].position)
    spacing_mm = check_spacing(sizes, str(place)) if slices[0].spacing_mm else None
    return check_affine(affine, str(place)), spacing_mm


def _planes(slices: Sequence[Slice], heights: np.ndarray, targets: np.ndarray) -> Iterator[np.ndarray]:
    """The slices in order; where the places differ, mixed from the slice below and the one above."""
    if targets is heights:
        yield from map(read_pixels, slices)
        return
    above = np.searchsorted(heights, targets, side="right").clip(1, len(heights) - 1)
    low, high = read_pixels(slices[0]), read_pixels(slices[1])
    number = 1
    for target, index in zip(targets, above, strict=True):
        while number < index:
            number += 1
            low, high = high, read_pixels(slices[number])
        share = (target - heights[number - 1]) / (heights[number] - heights[number - 1])
        mixed = low + share * (high.astype(np.float64) - low)
        yield mixed if low.dtype.kind == "f" else np.rint(mixed).astype(low.dtype)


def _stack(planes: Iterator[np.ndarray], shape: tuple[int, int, int], dtype: np.dtype[Any]) -> np.ndarray:
    """Stack the planes; whole numbers of 32 bits, as an intercept may give, are kept in 16 where they fit."""
    narrow = np.iinfo(np.int16)
    voxels_zyx = np.empty(shape[::-1], dtype=np.int16 if dtype.kind in "iu" else dtype)
    for index, pixels in enumerate(planes):
        if voxels_zyx.dtype == np.int16 and not narrow.min <= pixels.min() <= pixels.max() <= narrow.max:
            voxels_zyx = voxels_zyx.astype(dtype)
        voxels_zyx[index] = pixels
    return voxels_zyx
