"""From a scan as stored to Hounsfield units on the wanted grid: the one path of packing and of inference.

``prepare_scan(read_scan(path), geometry)`` decides the intensity scale and the voxel size, fills what is not finite,
turns the array to canonical directions and resamples it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from nibabel.orientations import io_orientation

from mg3d.errors import DataError
from mg3d.scans.geometry import RAS_TO_LPS, Geometry, grid_spacing, plan_axes, resample_crop, to_canonical
from mg3d.scans.hounsfield import Rescale, decide_rescale
from mg3d.scans.raw_volume import UNKNOWN_DIRECTIONS, RawVolume, by, check_spacing

MAX_NONFINITE_SHARE = 0.1
MAX_OUTSIDE_SHARE = 0.6
SPACING_TOLERANCE = 0.02
AIR_HU = -1000

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class PreparedScan:
    """One scan on its final grid.

    Attributes:
        voxels_hu: [D,H,W] in HU, clipped to the geometry's window, canonical order; float32, or int16 when asked for.
        spacing_mm: (z, y, x) of this grid.
        record: what was decided on the way, plain values: rescale, spacing and its source, orientation, tilt, filled
            voxels, stored shape and spacing, digest of the source.
        warnings: oddities a person should look at.
    """

    voxels_hu: np.ndarray
    spacing_mm: Triple
    record: dict[str, Any]
    warnings: tuple[str, ...] = ()


def prepare_scan(
    raw: RawVolume,
    geometry: Geometry,
    *,
    rescale: str = "auto",
    table_rescale: tuple[float, float] | None = None,
    table_spacing_mm: Triple | None = None,
    table_shape: Sequence[int] | None = None,
    table_expected: bool = False,
    assumed_spacing_mm: Triple | None = None,
    orientation: str = "canonical",
    dtype: type[np.generic] = np.float32,
    grid: Callable[[Sequence[int], Triple], Geometry] | None = None,
) -> PreparedScan:
    """Bring a scan as stored to HU on the grid of ``geometry``.

    Values are clipped to the window before any interpolation, that of tilted scans included: metal must not bleed
    into its neighbours.

    Args:
        raw: from :func:`mg3d.scans.read.read_scan`; voxels that are not finite are overwritten in place.
        geometry: the grid to end on, and the window; ``store="native"`` keeps the whole resampled volume.
        rescale: ``auto`` looks at the voxels, ``apply`` and ``skip`` obey (:mod:`mg3d.scans.hounsfield`).
        table_rescale: slope and intercept of a metadata table; ignored where the format itself promises HU.
        table_spacing_mm: (z, y, x) of a metadata table, used where the header has no voxel size; NaN where the row
            is silent.
        table_shape: voxels (z, y, x) by the metadata table.
        table_expected: scans of this data have a row in a metadata table: without a whole voxel size there, a header
            that looks never filled in counts as none (:func:`believed`).
        assumed_spacing_mm: (z, y, x) used where neither header nor table has one.
        orientation: ``canonical`` or ``snap`` (:func:`mg3d.scans.geometry.to_canonical`).
        dtype: of the result; ``np.int16``, the stored form, rounds plane by plane, so that no float volume is made.
        grid: chooses the grid by the canonical shape (D, H, W) and spacing (z, y, x) in place of ``geometry``'s.

    Returns:
        the scan in HU with the record of what was done.

    Raises:
        DataError: no voxel size, no plausible intensity scale, or too many voxels that are not finite.
    """
    not_finite = nonfinite_voxels(raw)
    scale = _choose_scale(raw, table_rescale, rescale)
    raw = believed(raw, table_spacing_mm, table_expected)
    spacing_xyz, source, warnings = choose_spacing(raw, table_spacing_mm, assumed_spacing_mm, table_shape)
    if not scale.plausible:
        warnings.append("values do not look like a chest CT in HU")
    affine = raw.affine if source == "header" else _with_voxel_size(raw.affine, spacing_xyz)
    low, high, air = _as_stored(scale, *geometry.window_hu, max(AIR_HU, geometry.window_hu[0]))
    limits = min(low, high), max(low, high)
    if filled := fill_nonfinite(raw, not_finite, air):
        warnings.append(f"{filled} voxels that are not finite are filled with air")
    canonical, spacing_mm, tilt = to_canonical(raw.voxels_xyz, affine, spacing_xyz, orientation, air, limits)
    plans = plan_axes(canonical.shape, spacing_mm, grid(canonical.shape, spacing_mm) if grid else geometry)
    values_hu = resample_crop(canonical, plans, scale.slope, scale.intercept, geometry.window_hu, dtype)
    record = {
        "rescale": scale.decision,
        "spacing": source,
        "orientation": "header" if raw.oriented else "assumed LPS",
        "tilt_degrees": round(tilt, 3),
        "filled_voxels": filled,
        "stored_shape_DHW": list(canonical.shape),
        "stored_spacing_mm": [round(size, 6) for size in spacing_mm],
        "source_sha256": raw.source_sha256,
    }
    return PreparedScan(values_hu, grid_spacing(plans), record, (*warnings, *raw.warnings))


def _as_stored(scale: Rescale, *values_hu: float) -> list[float]:
    return [(value - scale.intercept) / scale.slope for value in values_hu]


def nonfinite_voxels(raw: RawVolume) -> np.ndarray | None:
    """Find the voxels that are NaN or infinite, and refuse what cannot be filled.

    Up to a tenth of the voxels may lie anywhere. Those outside the field of view do not count, while they are at most
    six tenths: the ones from which nothing finite lies on the way to the border of the axial slice, neither along
    their row nor along their column (which is all outside a round, or any convex, field of view).

    Args:
        raw: the scan as read.

    Returns:
        mask [X,Y,Z], None when all are finite.

    Raises:
        DataError: more are not finite.
    """
    voxels = raw.voxels_xyz
    if voxels.dtype.kind != "f":
        return None
    bad = ~np.isfinite(voxels)
    count = int(np.count_nonzero(bad))
    if count > MAX_NONFINITE_SHARE * voxels.size:
        inside = count - int(np.count_nonzero(_outside_field_of_view(bad, raw.affine)))
        if inside > MAX_NONFINITE_SHARE * voxels.size or count > MAX_OUTSIDE_SHARE * voxels.size:
            message = f"{count} of {voxels.size} voxels are not finite, {inside} of them inside the field of view"
            remedy = "set them to air (-1000 HU) where they lie outside the body; else make the volume again"
            raise DataError(message, remedy, path=raw.path)
    return bad if count else None


def fill_nonfinite(raw: RawVolume, bad: np.ndarray | None, value: float) -> int:
    """Set voxels in place.

    Args:
        raw: the scan as read.
        bad: from :func:`nonfinite_voxels`.
        value: air, in stored units.

    Returns:
        number of voxels set.
    """
    if bad is None:
        return 0
    raw.voxels_xyz[bad] = value
    return int(np.count_nonzero(bad))


def _outside_field_of_view(bad: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Voxels that bad ones alone join to the border of their axial slice, along both axes of the slice."""
    outside = bad.copy()
    for axis, world_axis in enumerate(io_orientation(RAS_TO_LPS @ affine)[:, 0]):
        if world_axis != 2:
            joined = np.logical_and.accumulate(bad, axis)
            joined |= np.flip(np.logical_and.accumulate(np.flip(bad, axis), axis), axis)
            outside &= joined
    return outside


def is_unfilled(raw: RawVolume) -> bool:
    """Whether a header holds just what a toolkit writes when nobody gives a geometry: 1 mm and no turned axis."""
    return raw.spacing_mm == (1.0, 1.0, 1.0) and np.array_equal(np.abs(raw.affine[:3, :3]), np.eye(3))


def believed(raw: RawVolume, table_mm: Triple | None, table_expected: bool = False) -> RawVolume:
    """Drop the geometry of a header that was never filled in (1 x 1 x 1 mm, identity), as in the first CT-RATE release.

    It is believed where the table gives 1 mm too. Where no table is to be expected it stays, with a warning.

    Args:
        raw: the scan as read.
        table_mm: (z, y, x) of a metadata table, NaN where the row is silent.
        table_expected: a row without a whole voxel size, or none, does not leave the header in force either.

    Returns:
        the scan, without voxel size and directions where they are not believed, and with a warning that says why.
    """
    if not is_unfilled(raw):
        return raw
    sizes = table_mm or ()
    whole = bool(sizes) and bool(np.isfinite(sizes).all())
    if whole and np.allclose(sizes, 1.0, rtol=SPACING_TOLERANCE):
        return raw
    warnings = (*raw.warnings, "the header says 1 x 1 x 1 mm and identity, as one that was never filled in")
    if not (whole or table_expected):
        return replace(raw, warnings=warnings)
    return replace(raw, affine=UNKNOWN_DIRECTIONS, spacing_mm=None, oriented=False, warnings=warnings)


def choose_spacing(
    raw: RawVolume, table_mm: Triple | None, assumed_mm: Triple | None, table_shape: Sequence[int] | None = None
) -> tuple[Triple, str, list[str]]:
    """Take the header's voxel size, the table's where the header has none, the assumed one as a last resort.

    The table's is used only if it is whole and its row counts the voxels that the file holds.

    Args:
        raw: the scan as read.
        table_mm: (z, y, x) of a metadata table, NaN where the row is silent.
        assumed_mm: (z, y, x) given by the user.
        table_shape: voxels (z, y, x) by the table.

    Returns:
        voxel size along the stored axes X, Y, Z in mm, its source (``header``, ``table`` or ``assumed``), warnings.

    Raises:
        DataError: no source has a voxel size, or the one used is not that of a CT.
    """
    contradictions = _contradictions(raw, table_mm, table_shape)
    if raw.spacing_mm is not None:
        return raw.spacing_mm, "header", contradictions
    if table_mm is not None and np.isfinite(table_mm).all() and not contradictions:
        return _along_stored_axes(raw, table_mm), "table", ["voxel size taken from the metadata table"]
    if assumed_mm is not None:
        return _along_stored_axes(raw, assumed_mm), "assumed", [*contradictions, "voxel size assumed as told"]
    reasons = [*raw.warnings, *contradictions]
    if table_mm is not None and not np.isfinite(table_mm).all():
        reasons.append(f"the metadata table says {_shown(table_mm)} mm (x, y, z)")
    why = f" ({'; '.join(reasons)})" if reasons else ""
    raise DataError(
        f"no voxel size in the header or the metadata table{why}", "give --assume-spacing Z Y X", path=raw.path
    )


def _contradictions(raw: RawVolume, table_mm: Triple | None, table_shape: Sequence[int] | None) -> list[str]:
    """Where the row of the metadata table is not that of the file; one that was resampled keeps its extent."""
    found, stored = [], raw.voxels_xyz.shape
    lines_up = table_shape is None or sorted(table_shape) == sorted(stored)
    if raw.spacing_mm is not None and table_mm is not None:
        if table_shape is not None and np.isfinite(table_mm).all():
            by_row, by_file = sorted(np.multiply(table_shape, table_mm)), sorted(np.multiply(stored, raw.spacing_mm))
            rounding_mm = 2 * max(raw.spacing_mm)
            if not lines_up and np.allclose(by_row, by_file, rtol=SPACING_TOLERANCE, atol=rounding_mm):
                return []
        if not _holds(raw.spacing_mm, table_mm):
            found.append(f"metadata table says {_shown(table_mm)} mm (x, y, z), the header is used")
    if not lines_up and table_shape is not None:
        found.append(f"the metadata table counts {by(table_shape[::-1])} voxels, the file holds {by(stored)}")
    return found


def _holds(header_xyz: Triple, table_mm: Triple) -> bool:
    """Whether every size of a row, as far as it is known, is one of the header's."""
    left = list(header_xyz)
    for size in sorted(size for size in table_mm if np.isfinite(size)):
        fitting = [each for each in left if np.isclose(each, size, rtol=SPACING_TOLERANCE)]
        if not fitting:
            return False
        left.remove(min(fitting))
    return True


def _shown(table_mm: Triple) -> str:
    return "x".join(f"{size:g}" if np.isfinite(size) else "?" for size in table_mm[::-1])


def _along_stored_axes(raw: RawVolume, spacing_mm: Triple) -> Triple:
    world_axes = io_orientation(RAS_TO_LPS @ raw.affine)[:, 0].astype(int)
    x, y, z = (spacing_mm[::-1][axis] for axis in world_axes)
    return check_spacing((x, y, z), raw.path)


def _with_voxel_size(affine: np.ndarray, spacing_xyz: Triple) -> np.ndarray:
    sized = affine.copy()
    sized[:3, :3] *= np.asarray(spacing_xyz) / np.linalg.norm(affine[:3, :3], axis=0)
    return sized


def _choose_scale(raw: RawVolume, table: tuple[float, float] | None, mode: str) -> Rescale:
    if raw.hounsfield:
        table, mode = None, "skip" if mode == "apply" else mode
    try:
        return decide_rescale(raw.voxels_xyz, (raw.slope, raw.intercept), table, mode)
    except DataError as problem:
        raise DataError(problem.message, problem.remedy, path=raw.path) from problem
