"""From a stored grid to the wanted one: canonical directions, then one fused separable resampling.

Legend: D depth (z, to superior), H rows (y, to posterior), W columns (x, to the patient's left): the LPS order of
increasing indices. Trilinear interpolation is separable, so the published chain (resample to a fixed spacing, centre
crop, resize) is folded into one small matrix per axis; no intermediate volume is ever made. The matrices hold two to
four weights per output voxel and are applied as sparse ones, plane by plane: faster than dense products, and the sums
do not depend on threads or kernels of a matrix library. The constants and the published two-step functions live in
:mod:`mg3d.datasets.volume`; tests hold both ways together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.orientations import inv_ornt_aff, io_orientation
from scipy import sparse

from mg3d.datasets.volume import CROP_FRACTIONS_DHW, PRETRAIN_SIZE_DHW, TARGET_SPACING_MM, WINDOW_HU, resampled_size
from mg3d.errors import DataError

MAX_TILT_DEGREES = 1.0
MAX_RESAMPLED_GROWTH = 8
ORIENTATION_MODES = ("canonical", "snap")
ROW_PADDING = 16  # float32 values, a cache line: rows of 2^n bytes would be slow to transpose
PLANES_AT_ONCE = 32  # of 16-bit voxels stored side by side along depth: a cache line each
WHOLE = (1.0, 1.0, 1.0)
RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True)
class Geometry:
    """The grid every packed volume ends on.

    Attributes:
        size: output voxels (D, H, W); not used by ``native``.
        target_spacing_mm: spacing (z, y, x) of the intermediate resampling; None leaves it out.
        crop_fractions: kept central part per axis (D, H, W); rows of ``native`` are cropped when they are read.
        store: what a row holds; ``crop`` is the pre-training crop, ``native`` the whole volume at the target spacing.
        window_hu: values are clipped to these limits before any interpolation.
    """

    size: tuple[int, int, int] = PRETRAIN_SIZE_DHW
    target_spacing_mm: tuple[float, float, float] | None = TARGET_SPACING_MM
    crop_fractions: tuple[float, float, float] = CROP_FRACTIONS_DHW
    store: str = "crop"
    window_hu: tuple[int, int] = WINDOW_HU

    def metadata(self) -> dict[str, Any]:
        """Plain values for the Arrow schema and the manifest; the window has an entry of its own there."""
        grid = {key: value for key, value in asdict(self).items() if key != "window_hu"}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in grid.items()}


def to_canonical(
    voxels_xyz: np.ndarray,
    affine: np.ndarray,
    spacing_mm: Sequence[float],
    mode: str = "canonical",
    fill: float = 0.0,
    limits: tuple[float, float] | None = None,
) -> tuple[np.ndarray, tuple[float, float, float], float]:
    """Bring a stored array into canonical order.

    Flips and permutations are views and exact. Directions tilted by more than one degree are resampled (linear) onto
    canonical axes that hold the whole scan, unless ``mode`` is ``snap``, which only reorders as the published code.
    Like every other interpolation this one sees clipped values (``limits``).

    Args:
        voxels_xyz: array [X,Y,Z].
        affine: 4 x 4 voxel to world millimetres, right-anterior-superior.
        spacing_mm: voxel size along X, Y, Z.
        mode: ``canonical`` or ``snap``.
        fill: value outside the scan where resampling needs one.
        limits: stored values to clip a tilted scan to before it is resampled, lower first; None leaves them.

    Returns:
        array [D,H,W], its spacing (z, y, x) in mm, and the tilt in degrees that was found.

    Raises:
        DataError: the canonical box of a tilted scan would be absurdly large.
    """
    affine_lps = RAS_TO_LPS @ affine
    tilt = tilt_degrees(affine_lps)
    orientation = io_orientation(affine_lps)
    spacing_lps = [0.0, 0.0, 0.0]
    for axis, (world_axis, _) in enumerate(orientation):
        spacing_lps[int(world_axis)] = float(spacing_mm[axis])
    if tilt > MAX_TILT_DEGREES and mode == "canonical":
        stored_lps = [voxels_xyz.shape[axis] for axis in np.argsort(orientation[:, 0])]
        clipped = voxels_xyz if limits is None else _clipped(voxels_xyz, *limits)
        voxels_lps = _resample_tilted(clipped, affine_lps, spacing_lps, stored_lps, fill)
    else:
        voxels_lps = nib.apply_orientation(voxels_xyz, orientation)
    return voxels_lps.transpose(2, 1, 0), (spacing_lps[2], spacing_lps[1], spacing_lps[0]), tilt


def canonical_with_affine(voxels_xyz: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Reorder a stored array to canonical order and keep the way to world millimetres; nothing is interpolated.

    Args:
        voxels_xyz: array [X,Y,Z].
        affine: 4 x 4 voxel to world millimetres, right-anterior-superior.

    Returns:
        a view [D,H,W], and the 4 x 4 matrix from its indices (x, y, z) to left-posterior-superior millimetres.
    """
    affine_lps = RAS_TO_LPS @ affine
    orientation = io_orientation(affine_lps)
    voxels_lps = nib.apply_orientation(voxels_xyz, orientation)
    return voxels_lps.transpose(2, 1, 0), affine_lps @ inv_ornt_aff(orientation, voxels_xyz.shape)


def _clipped(voxels: np.ndarray, low: float, high: float) -> np.ndarray:
    """A clipped copy, of the stored type where that can hold the limits."""
    if voxels.dtype.kind in "iu" and float(low).is_integer() and float(high).is_integer():
        kind = np.iinfo(voxels.dtype)
        lowest, highest = (min(max(int(limit), kind.min), kind.max) for limit in (low, high))
        return np.clip(voxels, lowest, highest)
    values = voxels.astype(np.float32)
    return np.clip(values, low, high, out=values)


def tilt_degrees(affine: np.ndarray) -> float:
    """Largest angle between a voxel axis and the world axis it is nearest to.

    Args:
        affine: 4 x 4 voxel to world matrix.

    Returns:
        degrees, 0 for a scan along the world axes.
    """
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    # the sine keeps its precision near zero, where the cosine has none
    largest = np.abs(directions).max(axis=0)
    sine = np.sqrt(np.maximum(np.sum(directions**2, axis=0) - largest**2, 0.0))
    return float(np.degrees(np.arctan2(sine, largest)).max())


def _resample_tilted(
    voxels_xyz: np.ndarray,
    affine_lps: np.ndarray,
    spacing_lps: Sequence[float],
    stored_lps: Sequence[int],
    fill: float,
) -> np.ndarray:
    from scipy import ndimage

    corners = np.array(np.meshgrid(*[(0, size - 1) for size in voxels_xyz.shape], indexing="ij")).reshape(3, -1)
    world = affine_lps[:3, :3] @ corners + affine_lps[:3, 3:]
    low, high = world.min(axis=1), world.max(axis=1)
    shape = np.ceil((high - low) / spacing_lps - 1e-3).astype(np.int64) + 1
    # grown by an even count, the centred grid falls onto that of the same scan without the tilt
    shape += (shape - np.asarray(stored_lps)) % 2
    if np.prod(shape, dtype=np.float64) > MAX_RESAMPLED_GROWTH * voxels_xyz.size:
        raise DataError(f"straightening the tilted axes would need a grid of {tuple(shape)}", "use --orientation snap")
    inverse = np.linalg.inv(affine_lps[:3, :3])
    matrix = inverse @ np.diag(spacing_lps)
    first = (low + high) / 2 - (shape - 1) / 2 * np.asarray(spacing_lps)
    offset = inverse @ (first - affine_lps[:3, 3])
    # "constant" would lose a whole border slice to the fill for a rounding error of 1e-16
    return ndimage.affine_transform(
        voxels_xyz,
        matrix,
        offset,
        output_shape=tuple(shape),
        output=np.float32,
        order=1,
        mode="grid-constant",
        cval=fill,
    )


@dataclass(frozen=True)
class AxisPlan:
    """One axis of the fused resampling.

    Attributes:
        source: the stored voxels that are needed.
        weights: float32 [output, source] interpolation matrix.
        spacing_mm: distance between output voxels.
    """

    source: slice
    weights: np.ndarray
    spacing_mm: float


def plan_axes(
    shape: Sequence[int], spacing_mm: Sequence[float], geometry: Geometry, align_corners: bool = False
) -> tuple[AxisPlan, AxisPlan, AxisPlan]:
    """Fold resample, centre crop and resize into one matrix per axis; ``native`` has the resampling alone.

    Args:
        shape: stored voxels (D, H, W).
        spacing_mm: stored spacing (z, y, x).
        geometry: the grid to end on.
        align_corners: corner-to-corner resize, as the published loader of CTRG NIfTI volumes does.

    Returns:
        the plans for D, H and W.
    """
    target = geometry.target_spacing_mm
    middle = tuple(shape) if target is None else resampled_size(shape, spacing_mm, target)
    size, fractions = (middle, WHOLE) if geometry.store == "native" else (geometry.size, geometry.crop_fractions)
    plans = [
        _plan_axis(shape[axis], middle[axis], size[axis], fractions[axis], spacing, align_corners)
        for axis, spacing in enumerate(spacing_mm)
    ]
    return plans[0], plans[1], plans[2]


def _plan_axis(stored: int, middle: int, out: int, fraction: float, spacing_mm: float, align_corners: bool) -> AxisPlan:
    kept = max(int(middle * fraction), 1)
    start = max(middle // 2 - kept // 2, 0)
    first = linear_matrix(stored, middle)[start : start + kept]
    weights = linear_matrix(kept, out, align_corners) @ first
    used = np.flatnonzero(weights.any(axis=0))
    source = slice(int(used[0]), int(used[-1]) + 1)
    step = (kept - 1) / max(out - 1, 1) if align_corners else kept / out
    matrix = np.ascontiguousarray(weights[:, source], dtype=np.float32)
    return AxisPlan(source, matrix, max(spacing_mm * stored / middle * step, 1e-3))


def linear_matrix(stored: int, out: int, align_corners: bool = False) -> np.ndarray:
    """Linear interpolation along one axis as a matrix, with torch's single-precision positions.

    Args:
        stored: input length.
        out: output length.
        align_corners: map the first and last samples onto each other instead of using half-pixel centres.

    Returns:
        float64 [out, stored]; every row sums to one.
    """
    index = np.arange(out, dtype=np.float32)
    if align_corners:
        position = index * (np.float32(stored - 1) / np.float32(max(out - 1, 1)))
    else:
        position = np.maximum((index + np.float32(0.5)) * (np.float32(stored) / np.float32(out)) - np.float32(0.5), 0)
    lower = np.minimum(position.astype(np.int64), stored - 1)
    upper = np.minimum(lower + 1, stored - 1)
    share = (position - lower.astype(np.float32)).astype(np.float64)
    matrix = np.zeros((out, stored))
    rows = np.arange(out)
    np.add.at(matrix, (rows, lower), 1.0 - share)
    np.add.at(matrix, (rows, upper), share)
    return matrix


def resample_crop(
    voxels_DHW: np.ndarray,
    plans: tuple[AxisPlan, AxisPlan, AxisPlan],
    slope: float = 1.0,
    intercept: float = 0.0,
    window: tuple[float, float] = WINDOW_HU,
    dtype: type[np.generic] = np.float32,
) -> np.ndarray:
    """Scale, clip and resample a volume plane by plane.

    Values are clipped to the window before interpolation, as published: metal must not bleed into its neighbours.
    Beside the input and the output only a few planes are in memory.

    Args:
        voxels_DHW: stored values, any real type, any strides.
        plans: from :func:`plan_axes`.
        slope: scale to the unit of ``window``.
        intercept: offset to the unit of ``window``.
        window: lower and upper limit.
        dtype: of the result; an integer type gets rounded values.

    Returns:
        [D,H,W] in the unit of ``window``.
    """
    depth, rows, columns = plans
    region = voxels_DHW[depth.source, rows.source, columns.source]
    out = np.empty((len(depth.weights), len(rows.weights), len(columns.weights)), dtype=dtype)
    into_rows = sparse.csr_array(rows.weights)
    into_columns = sparse.csr_array(np.pad(columns.weights, ((0, 0), (0, ROW_PADDING))))
    last_source = [int(np.flatnonzero(weights)[-1]) for weights in depth.weights]
    unfinished: dict[int, np.ndarray] = {}
    for index, stored in _needed_planes(region, depth.weights):
        plane = _windowed(stored, slope, intercept, window)
        plane = into_columns @ np.ascontiguousarray((into_rows @ plane).T)  # [W,H]
        for k in map(int, np.flatnonzero(depth.weights[:, index])):
            share = depth.weights[k, index] * plane
            unfinished[k] = unfinished[k] + share if k in unfinished else share
            if last_source[k] == index:
                finished = unfinished.pop(k).T
                out[k] = finished if np.issubdtype(dtype, np.floating) else np.rint(finished)
    return out


def _needed_planes(region_DHW: np.ndarray, weights: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the planes [H,W] that carry weight; those stored side by side along depth are fetched many at a time."""
    step_depth, *steps = (abs(stride) for stride in region_DHW.strides)
    many = PLANES_AT_ONCE if step_depth < max(steps) else 1
    needed = set(np.flatnonzero(weights.any(axis=0)).tolist())
    for first in range(0, len(region_DHW), many):
        block = region_DHW[first : first + many]
        if many > 1:
            block = np.ascontiguousarray(block)
        yield from ((first + place, plane) for place, plane in enumerate(block) if first + place in needed)


def _windowed(stored_HW: np.ndarray, slope: float, intercept: float, window: tuple[float, float]) -> np.ndarray:
    height, width = stored_HW.shape
    plane = np.zeros((height, width + ROW_PADDING), dtype=np.float32)
    plane[:, :width] = stored_HW
    if (slope, intercept) != (1.0, 0.0):
        plane *= np.float32(slope)
        plane += np.float32(intercept)
    return np.clip(plane, window[0], window[1], out=plane)


def grid_spacing(plans: tuple[AxisPlan, AxisPlan, AxisPlan]) -> tuple[float, float, float]:
    """Spacing (z, y, x) in mm of the grid that the plans end on."""
    return plans[0].spacing_mm, plans[1].spacing_mm, plans[2].spacing_mm
