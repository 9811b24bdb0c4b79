"""Write small NIfTI files whose bytes depend on their content alone."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np

__all__ = ["write_nifti"]


def write_nifti(
    path: Path,
    voxels: np.ndarray,
    spacing_mm: Sequence[float],
    *,
    axes: str = "LPS",
    origin_mm: Sequence[float] = (0.0, 0.0, 0.0),
) -> None:
    """Write a ``.nii.gz`` file without a time stamp; missing folders are made.

    Args:
        path: the file.
        voxels: [X,Y,Z], or [X,Y,Z,T] of a film, in the number type to store.
        spacing_mm: voxel size (x, y, z) in mm, or (x, y, z, seconds).
        axes: directions of increasing indices, letters of R/L, A/P, S/I in this order.
        origin_mm: world position (right, anterior, superior) of the first voxel.
    """
    signs = [1.0 if letter in "RAS" else -1.0 for letter in axes]
    affine = np.diag([*(sign * step for sign, step in zip(signs, spacing_mm[:3], strict=True)), 1.0])
    affine[:3, 3] = origin_mm
    image = nib.Nifti1Image(voxels, affine)
    image.header.set_zooms(tuple(spacing_mm))
    image.header.set_xyzt_units("mm", "sec" if voxels.ndim == 4 else None)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(image.to_bytes(), compresslevel=1, mtime=0))
