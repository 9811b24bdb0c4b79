"""Label maps as NIfTI files in the geometry of the image they belong to, written whole or not at all."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from mg3d.atomic import atomic_path, writing
from mg3d.scans.nifti import NIBABEL_ERRORS
from mg3d.scans.read import read_scan

__all__ = ["write_label_map"]


def write_label_map(path: Path, labels: np.ndarray, image: Path) -> Path:
    """Write a label map over an image.

    For a NIfTI image every geometry field of its header is kept bit by bit (sform, qform, their codes, units); for
    other formats the affine that was read is stored.

    Args:
        path: target, ending in ``.nii.gz``; its folder is created.
        labels: uint8 [X,Y,Z] in the stored order of the image.
        image: file (or DICOM folder) of the image.

    Returns:
        ``path``.

    Raises:
        ValueError: the label map has not the shape of the image.
        OutputError: the file cannot be written.
    """
    volume = _as_nifti(np.asarray(labels, dtype=np.uint8), image)
    remedy = "free some space, then predict again"
    with writing(path, remedy):
        path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path, remedy, ending=".nii.gz") as partial:
        nib.save(volume, partial)
    return path


def _as_nifti(labels: np.ndarray, image: Path) -> nib.Nifti1Image:
    source = _opened(image)
    if source is None:
        raw = read_scan(image)
        _check_shape(labels, raw.voxels_xyz.shape, image)
        return nib.Nifti1Image(labels, raw.affine)
    _check_shape(labels, source.shape, image)
    header = source.header.copy()
    header.set_data_dtype(np.uint8)
    header.set_slope_inter(1.0, 0.0)
    header["cal_min"] = header["cal_max"] = 0
    header["descrip"] = b"label map predicted by mg3d"
    return type(source)(labels.reshape(source.shape), header.get_best_affine(), header)


def _opened(image: Path) -> Any:
    """The image by nibabel; None for other formats, and where nibabel refuses a header that could be read here."""
    if image.name.lower().endswith((".nii", ".nii.gz")):
        with contextlib.suppress(*NIBABEL_ERRORS):
            return nib.load(image)
    return None


def _check_shape(labels: np.ndarray, shape: tuple[int, ...], image: Path) -> None:
    wanted = tuple(shape)
    while len(wanted) > 3 and wanted[-1] == 1:
        wanted = wanted[:-1]
    if labels.shape != wanted:
        raise ValueError(f"label map of shape {labels.shape} for an image of shape {wanted} ({image})")
