"""Directions and voxel size of a NIfTI header, and what counts where its parts contradict each other.

One rule for images and label maps. Its warnings are recorded per volume (``RawVolume.warnings``):

* The sform counts where its code is above 0, else the qform where its code is, as for nibabel; with neither the
  directions are unknown and the voxel size is that of pixdim. SimpleITK differs: its voxel size is always pixdim's, and
  of two forms that are not alike it takes the qform.
* Axes of sform and qform more than 45 degrees apart (a flip or another order) are REFUSED: left could be right. More
  than one degree, or a qform that cannot be read: a warning, the sform counts.
* A pixdim that differs from the sform by more than one per cent, or holds no size: a warning, the sform counts.
* Axes sheared by more than one degree: a warning; more than any gantry tilts (35 degrees): REFUSED.
* xyzt_units of metres or micrometres: converted with a warning, as by SimpleITK (nibabel ignores them). Where that
  gives no voxel size of a CT and millimetres do, the sizes are taken as millimetres, with a warning. Codes the standard
  does not know count as millimetres, with a warning.
* pixdim[0] (qfac) of a qform alone: 1 and -1 as they are; 0 is 1, as the standard says, and so are NaN and other
  positive values, with a warning. Other negative values are REFUSED: nibabel reads them as 1, SimpleITK as -1.
* A quaternion up to 0.1 % longer than 1 is rounding; longer ones, codes beyond 0 to 5, matrices that are not finite or
  cannot be inverted are REFUSED.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from nibabel.nifti1 import Nifti1Header
from nibabel.quaternions import fillpositive, quat2mat

from mg3d.errors import DataError
from mg3d.scans.raw_volume import (
    MAX_STRAIGHT_DEGREES,
    UNKNOWN_DIRECTIONS,
    by,
    check_affine,
    check_spacing,
    shear_warnings,
    shortest_decimals,
    unit_in_mm,
)

KNOWN_CODES = range(6)
UNITS = {0: "", 1: "metres", 2: "", 3: "micrometres"}
SAME_SIZE = 1e-3
MAX_SIZE_DIFFERENCE = 0.01
MAX_QUATERNION_EXCESS = 1e-3
ELSEWHERE_DEGREES = 45.0

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class NiftiGeometry:
    """What a header says about place and size.

    Attributes:
        affine: 4 x 4 voxel to world millimetres (RAS); LPS directions with unit voxels where nothing is said.
        spacing_mm: voxel size along the stored axes; None where there is none.
        oriented: whether the header states directions.
        warnings: contradictions that were settled.
    """

    affine: np.ndarray
    spacing_mm: Triple | None
    oriented: bool
    warnings: tuple[str, ...]


def nifti_geometry(header: Nifti1Header, path: Path) -> NiftiGeometry:
    """Settle the geometry of a header by the rule above.

    Args:
        header: NIfTI-1 or NIfTI-2, unchecked.
        path: the file, for messages.

    Returns:
        the geometry, with a warning for every contradiction that was settled.

    Raises:
        DataError: a part is impossible, or sform and qform leave open what is left and right.
    """
    warnings: list[str] = []
    sform, qform = (_has_form(header, name, path) for name in ("sform", "qform"))
    pixdim = np.asarray(header["pixdim"][1:4], dtype=np.float64)
    sizes = pixdim if np.isfinite(pixdim).all() and (pixdim > 0).all() else None
    affine = None
    if sform:
        affine = np.asarray(header.get_sform(), dtype=np.float64)
        sizes = _sizes_beside_sform(affine, pixdim, sizes is not None, warnings)
    elif qform:
        affine = _qform(header, path, warnings)
    unit = _unit(header, sizes, warnings)
    if affine is not None:
        affine[:3] *= unit
        check_affine(affine, str(path))
        warnings += shear_warnings(affine)
    if affine is not None and sform and qform:
        _compare_forms(affine, header, path, warnings)
    spacing_mm = None
    if sizes is not None:
        decimals = shortest_decimals(sizes)
        decimals = decimals if unit == 1.0 else shortest_decimals(size * unit for size in decimals)
        spacing_mm = check_spacing(decimals, str(path))
    directions = UNKNOWN_DIRECTIONS if affine is None else affine
    return NiftiGeometry(directions, spacing_mm, affine is not None, tuple(warnings))


def _has_form(header: Nifti1Header, name: str, path: Path) -> bool:
    code = int(header[f"{name}_code"])
    if code not in KNOWN_CODES:
        remedy = "set it to 0 (no such form) or 1 (scanner) after checking the geometry"
        raise DataError(f"{name}_code {code} is none of the standard (0 to 5)", remedy, path=str(path))
    return code > 0


def _sizes_beside_sform(affine: np.ndarray, pixdim: np.ndarray, usable: bool, warnings: list[str]) -> np.ndarray:
    """Lengths of the sform's columns, as written in pixdim where that means the same."""
    lengths = np.linalg.norm(affine[:3, :3], axis=0)
    if usable and np.allclose(lengths, pixdim, rtol=SAME_SIZE):
        return pixdim
    if not usable or not np.allclose(lengths, pixdim, rtol=MAX_SIZE_DIFFERENCE):
        warnings.append(f"pixdim says {by(pixdim)}, the sform {by(lengths)}: the sform is used")
    return lengths


def _qform(header: Nifti1Header, path: Path, warnings: list[str]) -> np.ndarray:
    """Voxel-to-world matrix of the quaternion; sizes that are none count as 1."""
    qfac = float(header["pixdim"][0])
    if qfac < 0 and qfac != -1:
        message = f"pixdim[0] (qfac) is {qfac:g}: it is open whether the slices are mirrored"
        raise DataError(message, "set it to 1 or -1", path=str(path))
    if qfac not in (1.0, -1.0):
        warnings.append(f"pixdim[0] (qfac) is {qfac:g}, taken as 1")
        qfac = 1.0
    imaginary = np.array([header[f"quatern_{part}"] for part in "bcd"], dtype=np.float64).reshape(3)
    length = float(np.linalg.norm(imaginary)) if np.isfinite(imaginary).all() else np.inf
    if length > 1 + MAX_QUATERNION_EXCESS:
        shown = ", ".join(f"{value:g}" for value in imaginary)
        raise DataError(f"quaternion ({shown}) is no rotation", "repair the qform, or add an sform", path=str(path))
    rotation = quat2mat(fillpositive(imaginary / max(length, 1.0), header.quaternion_threshold))
    pixdim = np.asarray(header["pixdim"][1:4], dtype=np.float64)
    sizes = np.where(np.isfinite(pixdim) & (pixdim > 0), pixdim, 1.0)
    affine = np.eye(4)
    affine[:3, :3] = rotation @ np.diag(sizes * (1.0, 1.0, qfac))
    affine[:3, 3] = [float(header[f"qoffset_{axis}"]) for axis in "xyz"]
    return affine


def _unit(header: Nifti1Header, sizes: np.ndarray | None, warnings: list[str]) -> float:
    code = int(header["xyzt_units"]) & 7
    if code not in UNITS:
        warnings.append(f"xyzt_units names no unit of length (code {code}), taken as millimetres")
    factor, said = unit_in_mm(UNITS.get(code, ""), sizes)
    warnings += said
    return factor


def _compare_forms(sform: np.ndarray, header: Nifti1Header, path: Path, warnings: list[str]) -> None:
    try:
        qform = _qform(header, path, [])
    except DataError as problem:
        warnings.append(f"the qform cannot be read ({problem.message.removeprefix(f'{path}: ')}), the sform is used")
        return
    one, other = (matrix[:3, :3] / np.linalg.norm(matrix[:3, :3], axis=0) for matrix in (sform, qform))
    degrees = float(np.degrees(np.arccos(np.clip(np.sum(one * other, axis=0).min(), -1.0, 1.0))))
    if degrees > ELSEWHERE_DEGREES:
        raise DataError(
            f"the axes of sform and qform lie {degrees:.0f} degrees apart: left and right could be mistaken",
            "find out which is right, give both its matrix, or set the code of the wrong one to 0",
            path=str(path),
        )
    if degrees > MAX_STRAIGHT_DEGREES:
        warnings.append(f"sform and qform lie {degrees:.1f} degrees apart: the sform is used")
