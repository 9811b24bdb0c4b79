"""One CTRG scan on the network's grid: a folder of grey slices, or the NIfTI made of them (spec downstream 8.2).

The geometry is that of pre-training; D/H/W are the canonical axes (z to superior, y to posterior, x to the left).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mg3d.datasets.volume import CROP_FRACTIONS_DHW, PRETRAIN_SIZE_DHW, ctrg_stack
from mg3d.errors import DataError
from mg3d.scans.geometry import Geometry, plan_axes, resample_crop
from mg3d.scans.grey_slices import SliceFiles, folder_slices
from mg3d.scans.read import read_scan

GREY_RANGE = (0.0, 255.0)
NO_SPACING_MM = (1.0, 1.0, 1.0)


def read_ctrg(path: Path, size_dhw: Sequence[int] = PRETRAIN_SIZE_DHW) -> np.ndarray:
    """Read a scan, crop its centre, resize it, and turn it upside up.

    Slices are cropped to 336 x 448 of 512 x 512, resized bicubically and picked along depth; NIfTI volumes are resized
    trilinearly from corner to corner. Both are stored from head to feet, so depth is reversed once.

    Args:
        path: folder of jpg or png slices, or a NIfTI file with grey values 0..255.
        size_dhw: output size (D, H, W).

    Returns:
        float32 [D, H, W] in [0, 1].

    Raises:
        DataError: nothing there, a slice or the volume is damaged, or values leave 0..255.
    """
    size = (int(size_dhw[0]), int(size_dhw[1]), int(size_dhw[2]))
    if not path.exists():
        raise DataError("no such file or folder", "download it again, or leave the case out", path=str(path))
    return _from_slices(path, size) if path.is_dir() else _from_nifti(path, size)


def _from_slices(folder: Path, size: tuple[int, int, int]) -> np.ndarray:
    slices = SliceFiles(folder_slices(folder))
    crop = [int(pixels * part) for pixels, part in zip(slices.shape, CROP_FRACTIONS_DHW[1:], strict=True)]
    try:
        return ctrg_stack(slices, size, crop)[:, 0]
    except ValueError as problem:
        raise DataError(str(problem), "check the slice files", path=str(folder)) from problem


def _from_nifti(path: Path, size: tuple[int, int, int]) -> np.ndarray:
    raw = read_scan(path)
    low, high = (float(limit) * raw.slope + raw.intercept for limit in (raw.voxels_xyz.min(), raw.voxels_xyz.max()))
    if not GREY_RANGE[0] <= low <= high <= GREY_RANGE[1]:
        raise DataError(f"values {low:g}..{high:g} are not 8-bit grey", "give CTRG's own volumes", path=str(path))
    stored_DHW = raw.voxels_xyz.transpose(2, 1, 0)[::-1]
    geometry = Geometry(size=size, target_spacing_mm=None)
    plans = plan_axes(stored_DHW.shape, NO_SPACING_MM, geometry, align_corners=True)
    grey = resample_crop(stored_DHW, plans, raw.slope, raw.intercept, GREY_RANGE)
    return np.clip(grey / np.float32(GREY_RANGE[1]), 0.0, 1.0)
