"""Checks of a downloaded segmentation set: every problem at once, each one line that names the file and the mend.

The quick check reads all headers, the stored length of compressed files, and the label maps; the full one also every
image voxel with the checksum.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mg3d.errors import DataError
from mg3d.finetuning.benchmark import Case
from mg3d.scans.label_maps import MAX_SHIFT_VOXELS, largest_shift_mm, turned_grid, whole_labels

__all__ = ["check_pairs", "check_scan", "missing_names", "problem", "problem_of", "unexpected_files", "unreadable"]

_THREADS = 4
_SHOWN = 8
_AGAIN = "download the file again"


def problem(path: Path | str, what: str, mend: str) -> str:
    """One line of a list of problems."""
    return f"{path}: {what}; mend: {mend}"


def problem_of(error: DataError) -> str:
    """The line of an error that names a file."""
    return problem(error.path, error.message.removeprefix(f"{error.path}: "), error.remedy or _AGAIN)


def unreadable(items: Iterable[Any], read: Callable[[Any], object]) -> list[str]:
    """Lines of what a function refuses to read."""
    lines = []
    for item in items:
        try:
            read(item)
        except DataError as error:
            lines.append(problem_of(error))
    return lines


def check_pairs(cases: Iterable[Case], labels: Collection[int], *, full: bool = False) -> list[str]:
    """Check images and label maps of a segmentation set.

    Args:
        cases: cases with a label map each.
        labels: raw label values that may occur.
        full: read the images too, to their last byte.

    Returns:
        problems in the order of the cases: a file that is missing, damaged or cut short, images and label maps of
        different shape or place, label values that are not known or no integers, label maps without foreground. Order
        and direction of the stored axes do not matter, see :mod:`mg3d.scans.label_maps`.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        found = pool.map(partial(_check_pair, labels=sorted(labels), full=full), cases)
        return [line for lines in found for line in lines]


def check_scan(path: Path, *, full: bool = False) -> list[str]:
    """Problems of one NIfTI file: missing, damaged, cut short; with ``full`` also a wrong checksum or NaN."""
    if not path.is_file():
        return [problem(path, "missing", "download it, or leave the whole case out")]
    try:
        _shape_and_affine(path)
        if full or _looks_cut(path):
            _read(path)
    except DataError as error:
        return [problem_of(error)]
    return []


def unexpected_files(folder: Path, belongs: Callable[[str], object]) -> list[str]:
    """One line that names the files of a folder that do not belong there; hidden ones are not looked at."""
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")) if folder.is_dir() else []
    extra = [name for name in names if not belongs(name)]
    return [problem(folder, f"holds what does not belong there: {_listed(extra)}", "move it away")] if extra else []


def missing_names(place: Path, found: Collection[str], expected: Sequence[str]) -> list[str]:
    """One line that names which of the expected cases are not there."""
    missing = [name for name in expected if name not in found]
    what = f"{len(missing)} of {len(expected)} are missing: {_listed(missing)}"
    return [problem(place, what, "complete the download")] if missing else []


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _check_pair(case: Case, labels: Sequence[int], full: bool) -> list[str]:
    if case.label is None:
        return [problem(case.image, "has no label map", "complete the download")]
    found = [*check_scan(case.image, full=full), *check_scan(case.label)]
    if found:
        return found
    (shape, affine), (stored_shape, stored_affine) = _shape_and_affine(case.image), _shape_and_affine(case.label)
    label_shape, label_affine, _ = turned_grid(stored_shape, stored_affine, affine)
    if shape != label_shape:
        return [problem(case.label, f"shape {stored_shape}, but the image has {shape}", _AGAIN)]
    shift = largest_shift_mm(affine, label_affine, shape) / np.linalg.norm(affine[:3, :3], axis=0).min()
    if shift > MAX_SHIFT_VOXELS:
        found.append(problem(case.label, f"lies up to {shift:.3g} voxels beside its image (affine)", _AGAIN))
    return found + _check_label_values(case.label, labels)


def _check_label_values(path: Path, labels: Sequence[int]) -> list[str]:
    from mg3d.scans.read import read_scan

    try:
        voxels = whole_labels(read_scan(path), path)
    except DataError as error:
        return [problem_of(error)]
    unknown = np.ones(voxels.shape, dtype=bool)
    for value in labels:
        unknown &= voxels != value
    odd = np.unique(voxels[unknown])
    if odd.size:
        what = f"label values {_listed([f'{value:g}' for value in odd])} are not among {list(labels)}"
        return [problem(path, what, "use the published label maps")]
    if not voxels.any():
        return [problem(path, "all background", "repair the label map or leave the case out")]
    return []


def _read(path: Path) -> np.ndarray:
    """All voxels of a scan, with the checksum verified."""
    from mg3d.scans.read import read_scan

    voxels = read_scan(path).voxels_xyz
    if voxels.dtype.kind == "f" and not np.isfinite(voxels).all():
        remedy = "give them the value of air where they lie outside the body, or leave the case out"
        raise DataError("holds NaN or infinite voxels", remedy, path=str(path))
    return voxels


def _shape_and_affine(path: Path) -> tuple[tuple[int, ...], np.ndarray]:
    import nibabel as nib

    from mg3d.scans.nifti import NIBABEL_ERRORS

    try:
        image = nib.Nifti1Image.from_filename(path)
    except (OSError, EOFError, zlib.error, *NIBABEL_ERRORS) as error:
        raise DataError(f"no readable NIfTI header ({error})", _AGAIN, path=str(path)) from error
    affine = np.asarray(image.affine, dtype=np.float64)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise DataError("the affine is singular or not finite", "repair the header", path=str(path))
    shape = tuple(int(size) for size in image.shape)
    while len(shape) > 3 and shape[-1] == 1:  # as the readers do
        shape = shape[:-1]
    if len(shape) != 3:
        raise DataError(f"expected one 3-D volume, found shape {shape}", "keep one 3-D frame", path=str(path))
    return shape, affine


def _looks_cut(path: Path) -> bool:
    """Whether a compressed file does not end with the length that its header promises (several members may not)."""
    import nibabel as nib

    stored: Any = nib.Nifti1Image.from_filename(path).dataobj
    promised = int(stored.offset) + math.prod(stored.shape) * stored.dtype.itemsize
    if not path.name.endswith(".gz"):
        return path.stat().st_size < promised
    with path.open("rb") as stream:
        stream.seek(-4, 2)
        return int.from_bytes(stream.read(4), "little") != promised % 2**32
