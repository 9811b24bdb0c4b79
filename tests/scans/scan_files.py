"""Write one volume in every scan format and every orientation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import permutations, product
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
from nibabel.orientations import apply_orientation, inv_ornt_aff

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
SPACING_XYZ = (2.0, 2.5, 3.0)
AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)


def signed_permutations() -> list[np.ndarray]:
    """All 48 ways to store three axes, as nibabel orientations."""
    return [
        np.column_stack((order, signs)).astype(float)
        for order, signs in product(permutations(range(3)), product((1, -1), repeat=3))
    ]


def save_volume(
    path: Path,
    voxels_lps: np.ndarray,
    spacing: Sequence[float] = SPACING_XYZ,
    orientation: np.ndarray | None = None,
    compress: bool = True,
) -> Path:
    """Write an LPS volume [X,Y,Z] with its array reordered and a header that says so; the suffix is the format."""
    affine = LPS @ np.diag([*spacing, 1.0])
    stored = voxels_lps
    if orientation is not None:
        stored = np.ascontiguousarray(apply_orientation(voxels_lps, orientation))
        affine = affine @ inv_ornt_aff(orientation, voxels_lps.shape)
    if path.name.endswith((".nii", ".nii.gz")):
        nib.save(nib.Nifti1Image(stored, affine), path)
        return path
    SimpleITK.WriteImage(itk_image(stored, affine), str(path), compress)
    return path


def itk_image(stored_xyz: np.ndarray, affine: np.ndarray) -> SimpleITK.Image:
    """Return an ITK image of an array [X,Y,Z] with an RAS affine."""
    affine_lps = LPS @ affine
    sizes = np.linalg.norm(affine_lps[:3, :3], axis=0)
    image = SimpleITK.GetImageFromArray(np.ascontiguousarray(stored_xyz.transpose(2, 1, 0)))
    image.SetSpacing(sizes.tolist())
    image.SetDirection((affine_lps[:3, :3] / sizes).ravel().tolist())
    image.SetOrigin(affine_lps[:3, 3].tolist())
    return image


def made_scan(path: Path) -> Path:
    """Write a chest in voxels of 4 mm; with ``turned`` in its name the header turns it by 20 degrees in plane."""
    from prepro_builders import chest

    affine = LPS @ np.diag([4.0, 4.0, 4.0, 1.0])
    if "turned" in path.name:
        cosine, sine = np.cos(np.radians(20)), np.sin(np.radians(20))
        affine[:2, :2] = np.array([[cosine, -sine], [sine, cosine]]) @ affine[:2, :2]
    path.parent.mkdir(parents=True, exist_ok=True)
    voxels = chest(shape=(64, 64, 48))
    if path.name.endswith((".nii", ".nii.gz")):
        nib.save(nib.Nifti1Image(voxels, affine), path)
    else:
        SimpleITK.WriteImage(itk_image(voxels, affine), str(path), True)
    return path


def real(*names: str) -> list[object]:
    """Parameters of ``scan_file`` for files below the folder of real scans."""
    return [pytest.param(f"data/{name}", marks=pytest.mark.realdata) for name in names]


def save_series(
    folder: Path,
    planes: Sequence[np.ndarray],
    positions: Sequence[Sequence[float]],
    tags: Mapping[str, str] | None = None,
    directions: Sequence[float] = AXIAL,
    pixel_spacing: tuple[float, float] = (2.5, 2.0),
    series: str = "1.2.3.4",
    first: int = 0,
) -> list[Path]:
    """Write a DICOM series, one file per plane [rows, columns] of HU; every slice has another rescale intercept.

    File names run against the order of the positions. An empty tag value leaves the tag out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, (plane, position) in enumerate(zip(planes, positions, strict=True), start=first):
        image = SimpleITK.GetImageFromArray(plane[None])
        image.SetSpacing((pixel_spacing[1], pixel_spacing[0], 1.0))
        values = {
            "0008|0060": "CT",
            "0008|0018": f"{series}.{number + 1}",
            "0020|000d": "1.2.3",
            "0020|000e": series,
            "0008|103e": f"series {series}",
            "0020|0032": "\\".join(f"{value:.6f}" for value in position),
            "0020|0037": "\\".join(f"{value:.9f}" for value in directions),
            "0028|1053": "1",
            "0028|1052": str(-1024 - number),
        }
        for tag, value in (values | dict(tags or {})).items():
            if value:
                image.SetMetaData(tag, value)
        path = folder / f"{1000 - number}.dcm"
        writer = SimpleITK.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.SetFileName(str(path))
        writer.Execute(image)
        paths.append(path)
    return paths


def axial_series(
    folder: Path, voxels_lps: np.ndarray, spacing: Sequence[float] = SPACING_XYZ, **kind: object
) -> list[Path]:
    """Write an LPS volume [X,Y,Z] as an axial DICOM series."""
    planes = [plane.T.copy() for plane in voxels_lps.transpose(2, 0, 1)]
    positions = [(-10.0, 20.0, 5.0 + spacing[2] * index) for index in range(len(planes))]
    return save_series(folder, planes, positions, pixel_spacing=(spacing[1], spacing[0]), **kind)  # type: ignore[arg-type]
