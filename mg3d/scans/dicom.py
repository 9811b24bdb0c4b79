"""Read one DICOM series from the folder that holds its slices.

Slices are ordered by their position along the slice normal, never by file name. The grid must be complete: doubled,
missing, shifted or unlike slices are refused with the files named. Pixels go through SimpleITK (GDCM), which applies
each slice's own rescale slope and intercept, so that values are Hounsfield units.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from mg3d.errors import DataError
from mg3d.scans.byte_stream import damage_named, digest_of_files
from mg3d.scans.dicom_slice import Slice, read_pixels, read_slice
from mg3d.scans.itk_image import ras_affine
from mg3d.scans.raw_volume import RawVolume, check_affine, check_layout, check_spacing

SAME_PLACE_MM = 1e-3
MAX_UNEVENNESS = 0.1  # of the usual distance between slices
MAX_SIDE_STEP_MM = 1.0
MAX_TILT_DEGREES = 1.0
LIKENESS = {"size": ("matrix size", 0.0), "spacing_mm": ("pixel spacing", 1e-4), "directions": ("orientation", 1e-3)}
ONE_SERIES = "give the folder of one series"
CONVERT = "convert the series to one NIfTI file with a DICOM converter"


def read_dicom_series(folder: Path, max_volume_gib: float = 4.0) -> RawVolume:
    """Read the one series of a folder.

    Args:
        folder: holds the slices directly; other files are left out with a warning.
        max_volume_gib: refuse series that claim more voxel data than this, before any of it is read.

    Returns:
        the voxels in Hounsfield units, [X,Y,Z] with Z along the slice normal.

    Raises:
        DataError: no slice, several series, an incomplete or uneven stack, or a slice that cannot be read.
    """
    with damage_named(folder):
        slices, warnings = _slices_in(folder)
        _check_one_series(slices, folder)
        slices = _in_order(slices, folder, warnings)
        _check_alike(slices, folder)
        dtype = np.result_type(*{item.dtype for item in slices})
        stored_bytes = sum(item.path.stat().st_size for item in slices)
        shape = check_layout((*slices[0].size, len(slices)), dtype, stored_bytes, max_volume_gib, str(folder))
        affine, spacing_mm = _geometry(slices, folder, warnings)
        voxels_zyx = _stack(slices, shape, dtype)
    in_hu = all(item.has_rescale for item in slices)
    if not in_hu:
        warnings.append("slices without rescale slope and intercept: their values are taken as stored")
    digest = digest_of_files(item.sha256 for item in slices)
    voxels_xyz = voxels_zyx.transpose(2, 1, 0)
    return RawVolume(
        voxels_xyz, affine, spacing_mm, 1.0, 0.0, True, tuple(warnings), digest, str(folder), hounsfield=in_hu
    )


def _slices_in(folder: Path) -> tuple[list[Slice], list[str]]:
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    found = {path: read_slice(path) for path in files}
    slices = [item for item in found.values() if item is not None]
    if not slices:
        below = sorted(path.name for path in folder.iterdir() if path.is_dir())
        where = f"here, but {len(below)} sub-folders ({_some(below)})" if below else "in this folder"
        raise DataError(f"no DICOM slice {where}", ONE_SERIES, path=str(folder))
    others = [path.name for path, item in found.items() if item is None]
    return slices, [f"{len(others)} files that are no CT slice left out ({_some(others)})"] if others else []


def _check_one_series(slices: Sequence[Slice], folder: Path) -> None:
    sizes = Counter(item.series for item in slices)
    if len(sizes) > 1:
        names = {item.series: item.description for item in slices}
        listed = [f"{uid or 'no UID'} {names[uid]!r} of {count} slices" for uid, count in sizes.most_common()]
        message = f"{len(sizes)} series in one folder: {_some(listed)}"
        raise DataError(message, "keep one series per folder", path=str(folder))
    frames = max(item.frames for item in slices)
    if frames > 1:
        raise DataError(f"multi-frame DICOM file of {frames} frames", CONVERT, path=str(folder))
    if len(slices) == 1:
        raise DataError("one DICOM slice is no volume", "give the folder of the whole series", path=str(folder))


def _in_order(slices: Sequence[Slice], folder: Path, warnings: list[str]) -> list[Slice]:
    lacking = [item.path.name for item in slices if not (item.position and item.directions)]
    if lacking:
        message = f"no usable image position or orientation in {len(lacking)} slices ({_some(lacking)})"
        raise DataError(f"{message}: their order is unknown", CONVERT, path=str(folder))
    kept = {item.sha256: item for item in reversed(slices)}
    if len(kept) < len(slices):
        warnings.append(f"{len(slices) - len(kept)} copies of slices left out")
    normal = _normal(slices[0])
    return sorted(kept.values(), key=lambda item: float(normal @ np.asarray(item.position)))


def _check_alike(slices: Sequence[Slice], folder: Path) -> None:
    for kind, (words, tolerance) in LIKENESS.items():
        values = [getattr(item, kind) for item in slices]
        usual = Counter(values).most_common(1)[0][0]
        odd = [
            item.path.name
            for item, value in zip(slices, values, strict=True)
            if len(value) != len(usual) or not np.allclose(value, usual, rtol=0, atol=tolerance)
        ]
        if odd:
            remedy = "remove localizer slices, or keep one acquisition per folder"
            raise DataError(f"{len(odd)} slices differ in {words} ({_some(odd)})", remedy, path=str(folder))


def _geometry(
    slices: Sequence[Slice], folder: Path, warnings: list[str]
) -> tuple[np.ndarray, tuple[float, float, float] | None]:
    positions = np.array([item.position for item in slices])
    normal = _normal(slices[0])
    heights = (positions - positions[0]) @ normal
    _check_steps(slices, heights, folder)
    whole = positions[-1] - positions[0]
    beside = positions - positions[0] - np.outer(heights / heights[-1], whole)
    if np.linalg.norm(beside, axis=1).max() > MAX_SIDE_STEP_MM:
        raise DataError("the slices are not stacked along one line", CONVERT, path=str(folder))
    tilt = float(np.degrees(np.arccos(min(heights[-1] / np.linalg.norm(whole), 1.0))))
    if tilt > MAX_TILT_DEGREES:
        warnings.append(f"gantry tilt of {tilt:.1f} degrees")
    step = whole / (len(slices) - 1)
    between_rows, between_columns = slices[0].spacing_mm or (1.0, 1.0)
    sizes = (between_columns, between_rows, float(np.linalg.norm(step)))
    row, column = np.reshape(slices[0].directions, (2, 3))
    affine = ras_affine(np.column_stack((row, column, step / sizes[2])), sizes, slices[0].position)
    spacing_mm = check_spacing(sizes, str(folder)) if slices[0].spacing_mm else None
    return check_affine(affine, str(folder)), spacing_mm


def _check_steps(slices: Sequence[Slice], heights: np.ndarray, folder: Path) -> None:
    steps = np.diff(heights)
    pairs = [f"{low.path.name} and {high.path.name}" for low, high in pairwise(slices)]
    doubled = [pair for pair, step in zip(pairs, steps, strict=True) if step < SAME_PLACE_MM]
    if doubled:
        message = f"{len(doubled)} pairs of slices at the same position ({_some(doubled)})"
        raise DataError(message, "keep one acquisition per folder", path=str(folder))
    usual = float(np.median(steps))
    gaps = [f"{step:.2f} mm between {pair}" for pair, step in zip(pairs, steps, strict=True) if step > 1.5 * usual]
    if gaps:
        missing = int(np.rint(steps / usual - 1).sum())
        message = f"{missing} slices are missing ({_some(gaps)}; usual distance {usual:.2f} mm)"
        raise DataError(message, "download the whole series", path=str(folder))
    if np.abs(steps - usual).max() > MAX_UNEVENNESS * usual:
        message = f"uneven slice distances of {steps.min():.2f} to {steps.max():.2f} mm"
        raise DataError(message, "resample the series to even slices first", path=str(folder))


def _stack(slices: Sequence[Slice], shape: tuple[int, int, int], dtype: np.dtype[Any]) -> np.ndarray:
    """Stack the slices; whole numbers of 32 bits, as GDCM gives for any intercept, are kept in 16 where they fit."""
    narrow = np.iinfo(np.int16)
    voxels_zyx = np.empty(shape[::-1], dtype=np.int16 if dtype.kind in "iu" else dtype)
    for index, item in enumerate(slices):
        pixels = read_pixels(item)
        if voxels_zyx.dtype == np.int16 and not narrow.min <= pixels.min() <= pixels.max() <= narrow.max:
            voxels_zyx = voxels_zyx.astype(dtype)
        voxels_zyx[index] = pixels
    return voxels_zyx


def _normal(item: Slice) -> np.ndarray:
    row, column = np.reshape(item.directions, (2, 3))
    return np.cross(row, column)


def _some(names: Sequence[str], limit: int = 3) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")
