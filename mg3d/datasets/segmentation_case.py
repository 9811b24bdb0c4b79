"""One labelled image of a segmentation benchmark: read, brought onto the working grid, intensities, crop. No torch.

Order as published (spec downstream 1 to 3): orientation, spacing, intensities, foreground crop. Nothing here is random,
so the result can be cached. Shape legend: X/Y/Z axes of the working grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mg3d.datasets.fitting import cut_block
from mg3d.errors import DataError, MG3DError
from mg3d.scans.label_maps import grid_affine, on_axes_of, whole_labels
from mg3d.scans.raw_volume import RawVolume
from mg3d.scans.read import read_scan
from mg3d.scans.working_grid import WorkingGrid, plan_grid

if TYPE_CHECKING:
    from mg3d.finetuning.benchmark import Case, SegmentationTask

__all__ = ["PreparedCase", "prepare_case", "read_label_map"]

MEND = "mend or download the file again, or go on without it: on_bad_sample=skip"
FILL = "give them the value of air where they lie outside the body, or go on without it: on_bad_sample=skip"
_MAX_LABEL = 65535


@dataclass(frozen=True, eq=False)
class PreparedCase:
    """An image as the network sees it, before anything random.

    Attributes:
        image: float32 [X,Y,Z].
        label: uint8 [X,Y,Z] of class indices; None for an image without labels.
        grid: place of these voxels in the stored image.
    """

    image: np.ndarray
    label: np.ndarray | None
    grid: WorkingGrid


def prepare_case(case: Case, task: SegmentationTask) -> PreparedCase:
    """Read and preprocess one case.

    Raises:
        DataError: naming case and file: unreadable, NaN, unknown label values, label and image on other grids.
    """
    stored = _read(case, case.image)
    affine, image = grid_affine(stored), np.asarray(_scaled(stored), dtype=np.float32)
    if not np.isfinite(image).all():
        raise DataError("the image holds NaN or infinity", FILL, case_id=case.id, path=str(case.image))
    grid = plan_grid(image.shape, affine, task.orientation, task.spacing_mm)
    stored_label = read_label_map(case, task, image.shape, affine) if case.label is not None else None
    raw = np.ascontiguousarray(grid.resample(image, linear=True))
    label = None if stored_label is None else np.ascontiguousarray(grid.resample(stored_label, linear=False))
    scaled = _window(raw, task.window) if task.window is not None else _z_score(raw)
    start, shape = _foreground(raw, scaled, task)
    if (start, shape) != ((0, 0, 0), scaled.shape):
        grid = grid.part(start, shape)
        scaled = cut_block(scaled, start, shape, 0.0)
        label = None if label is None else cut_block(label, start, shape, 0)
    return PreparedCase(scaled, label, grid)


def read_label_map(
    case: Case, task: SegmentationTask, shape: Sequence[int] | None = None, affine: np.ndarray | None = None
) -> np.ndarray:
    """Read the label map of a case on the stored grid of its image, with the task's fixed class indices.

    Args:
        case: has a label file.
        task: its ``label_map`` says what each raw value is; 0 is background unless it says otherwise.
        shape: voxels of the image, which the label map must share; None: not checked.
        affine: its voxel-to-world matrix, likewise; a map whose axes are stored in another order or direction is
            brought into that of the image.

    Returns:
        uint8 array of class indices in the stored order of the image.

    Raises:
        DataError: unreadable, no integers, a value the task does not know, or another grid than the image's.
    """
    if case.label is None:
        raise DataError("has no label map", "give the case a label", case_id=case.id)
    stored, path = _read(case, case.label), str(case.label)
    raw, own_affine = whole_labels(stored, Path(path), case.id), grid_affine(stored)
    if affine is not None:
        raw, own_affine = on_axes_of(raw, own_affine, affine)
    if shape is not None and tuple(raw.shape) != tuple(shape):
        found = f"label map of shape {tuple(raw.shape)}, the image has {tuple(shape)}"
        raise DataError(found, "pair the files that belong together", case_id=case.id, path=path)
    if affine is not None and _apart(raw.shape, affine, own_affine) > 0.5:
        remedy = "copy the image's geometry to the label map if the arrays do fit"
        raise DataError("label map and image lie elsewhere in space", remedy, case_id=case.id, path=path)
    if raw.min() < 0 or raw.max() > _MAX_LABEL:
        found = f"label values from {raw.min()} to {raw.max()}"
        raise DataError(found, f"labels are 0 to {_MAX_LABEL}", case_id=case.id, path=path)
    return _mapped(raw.astype(np.uint16), task.label_map, case, path)


def _read(case: Case, path: Path) -> RawVolume:
    try:
        return read_scan(Path(path))
    except MG3DError as error:
        raise DataError(error.message, error.remedy or MEND, case_id=case.id) from error
    except OSError as error:
        raise DataError(error.strerror or str(error), MEND, case_id=case.id, path=str(path)) from error


def _scaled(raw: RawVolume) -> np.ndarray:
    """Stored values, scaled as the header says."""
    if (raw.slope, raw.intercept) == (1.0, 0.0):
        return raw.voxels_xyz
    return raw.voxels_xyz.astype(np.float32) * np.float32(raw.slope) + np.float32(raw.intercept)


def _apart(shape: Sequence[int], one: np.ndarray, other: np.ndarray) -> float:
    """Largest distance of corresponding corners of two grids, in voxels of the first."""
    corners = np.array(np.meshgrid(*[(0, size - 1) for size in shape], indexing="ij")).reshape(3, -1)
    homogeneous = np.vstack([corners, np.ones_like(corners[:1])])
    moved = np.linalg.inv(one) @ (np.asarray(other) @ homogeneous)
    return float(np.abs(moved[:3] - corners).max())


def _mapped(values: np.ndarray, label_map: Mapping[int, int], case: Case, path: str) -> np.ndarray:
    known = {0: 0, **{int(raw): int(index) for raw, index in label_map.items()}}
    table = np.zeros(_MAX_LABEL + 1, dtype=np.uint8)
    allowed = np.zeros(_MAX_LABEL + 1, dtype=bool)
    for raw, index in known.items():
        table[raw], allowed[raw] = index, True
    present = np.bincount(values.ravel(order="K"), minlength=1).nonzero()[0]
    unknown = [int(value) for value in present if not allowed[value]]
    if unknown:
        shown = ", ".join(map(str, unknown[:8]))
        raise DataError(
            f"label values {shown} are none of {sorted(known)}", "add them to label_map", case_id=case.id, path=path
        )
    return table[values]


def _window(image: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    low, high = window
    scaled = (image - np.float32(low)) * np.float32(1.0 / (high - low))
    return np.clip(scaled, 0.0, 1.0, out=scaled)


def _z_score(image: np.ndarray) -> np.ndarray:
    """Zero mean and unit deviation of the non-zero voxels; zeros stay zero."""
    inside = image != 0
    values = image[inside].astype(np.float64)
    scaled = np.zeros_like(image)
    if values.size:
        scaled[inside] = (values - values.mean()) / (values.std() or 1.0)
    return scaled


def _foreground(
    raw: np.ndarray, scaled: np.ndarray, task: SegmentationTask
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """First voxel and size of the crop; the published one, rounded up to whole windows, may reach outside."""
    whole = (0, 0, 0), (scaled.shape[0], scaled.shape[1], scaled.shape[2])
    if task.foreground_crop == "none":
        return whole
    published = task.foreground_crop == "reference_zscore"
    mask = scaled > 0 if published or task.window is not None else raw > 0
    if not mask.any():
        return whole
    starts, sizes = [], []
    for axis in range(3):
        used = np.flatnonzero(mask.any(axis=tuple(other for other in range(3) if other != axis)))
        start, size = int(used[0]), int(used[-1] - used[0] + 1)
        if published:
            full = -(-size // task.roi[axis]) * task.roi[axis]
            start, size = start - (full - size) // 2, full
        starts.append(start)
        sizes.append(size)
    return (starts[0], starts[1], starts[2]), (sizes[0], sizes[1], sizes[2])
