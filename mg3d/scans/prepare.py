"""From a scan as stored to Hounsfield units on the wanted grid: the one path of packing and of inference.

``prepare_scan(read_scan(path), geometry)`` decides the intensity scale and the voxel size, fills what is not finite,
turns the array to canonical directions and resamples it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from nibabel.orientations import io_orientation

from mg3d.errors import DataError
from mg3d.scans.geometry import RAS_TO_LPS, Geometry, grid_spacing, plan_axes, resample_crop, to_canonical
from mg3d.scans.hounsfield import Rescale, decide_rescale
from mg3d.scans.raw_volume import DOWNLOAD_AGAIN, RawVolume, check_spacing

MAX_NONFINITE_SHARE = 0.1
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
        table_spacing_mm: (z, y, x) of a metadata table, used where the header has no voxel size.
        assumed_spacing_mm: (z, y, x) used where neither header nor table has one.
        orientation: ``canonical`` or ``snap`` (:func:`mg3d.scans.geometry.to_canonical`).
        dtype: of the result; ``np.int16``, the stored form, rounds plane by plane, so that no float volume is made.
        grid: chooses the grid by the canonical shape (D, H, W) and spacing (z, y, x) in place of ``geometry``'s.

    Returns:
        the scan in HU with the record of what was done.

    Raises:
        DataError: no voxel size, no plausible intensity scale, or too many voxels that are not finite.
    """
    filled = fill_nonfinite(raw)
    scale = _choose_scale(raw, table_rescale, rescale)
    spacing_xyz, source, warnings = choose_spacing(raw, table_spacing_mm, assumed_spacing_mm)
    if not scale.plausible:
        warnings.append("values do not look like a chest CT in HU")
    affine = raw.affine if source == "header" else _with_voxel_size(raw.affine, spacing_xyz)
    low, high, air = _as_stored(scale, *geometry.window_hu, max(AIR_HU, geometry.window_hu[0]))
    limits = min(low, high), max(low, high)
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


def fill_nonfinite(raw: RawVolume) -> int:
    """Replace NaN and infinity by the smallest finite value (air or padding), in place.

    Args:
        raw: the scan as read.

    Returns:
        number of voxels replaced.

    Raises:
        DataError: more than a tenth of the voxels are not finite.
    """
    voxels = raw.voxels_xyz
    if voxels.dtype.kind != "f":
        return 0
    bad = ~np.isfinite(voxels)
    count = int(np.count_nonzero(bad))
    if count > MAX_NONFINITE_SHARE * voxels.size:
        raise DataError(f"{count} of {voxels.size} voxels are not finite", DOWNLOAD_AGAIN, path=raw.path)
    if count:
        voxels[bad] = np.min(voxels, where=~bad, initial=np.inf)
    return count


def choose_spacing(raw: RawVolume, table_mm: Triple | None, assumed_mm: Triple | None) -> tuple[Triple, str, list[str]]:
    """Take the header's voxel size, the table's where the header has none, the assumed one as a last resort.

    Args:
        raw: the scan as read.
        table_mm: (z, y, x) of a metadata table.
        assumed_mm: (z, y, x) given by the user.

    Returns:
        voxel size along the stored axes X, Y, Z in mm, its source (``header``, ``table`` or ``assumed``), warnings.

    Raises:
        DataError: no source has a voxel size, or the one used is not that of a CT.
    """
    if raw.spacing_mm is not None:
        return raw.spacing_mm, "header", _disagreement(raw.spacing_mm, table_mm)
    if table_mm is not None:
        return _along_stored_axes(raw, table_mm), "table", ["voxel size taken from the metadata table"]
    if assumed_mm is not None:
        return _along_stored_axes(raw, assumed_mm), "assumed", ["voxel size assumed as told"]
    raise DataError("no voxel size in the header or the metadata table", "give --assume-spacing Z Y X", path=raw.path)


def _disagreement(header_xyz: Triple, table_mm: Triple | None) -> list[str]:
    if table_mm is None or np.allclose(sorted(header_xyz), sorted(table_mm), rtol=SPACING_TOLERANCE):
        return []
    seen = "x".join(f"{value:g}" for value in table_mm[::-1])
    return [f"metadata table says {seen} mm (x, y, z), the header is used"]


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
