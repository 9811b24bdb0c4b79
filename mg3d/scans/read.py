"""One door for every scan format: the name of the file, or being a folder, decides which reader opens it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mg3d.errors import DataError
from mg3d.scans.dicom import read_dicom_series
from mg3d.scans.nifti import read_nifti
from mg3d.scans.npz import read_npz
from mg3d.scans.raw_volume import RawVolume
from mg3d.scans.simple_itk import FORMATS, read_itk_image

READERS: dict[str, Callable[[Path, float], RawVolume]] = {
    ".nii.gz": read_nifti,
    ".nii": read_nifti,
    **dict.fromkeys(FORMATS, read_itk_image),
    ".npz": read_npz,
}
SCAN_SUFFIXES = tuple(READERS)
DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")


def read_scan(path: Path, max_volume_gib: float = 4.0) -> RawVolume:
    """Read one scan as stored, whatever its format.

    Args:
        path: a NIfTI, NRRD, MetaImage or published ``.npz`` file, or the folder of one DICOM series.
        max_volume_gib: refuse what claims more voxel data than this, before any of it is read.

    Returns:
        the stored voxels with their geometry and the digest of the bytes.

    Raises:
        DataError: unknown format, or the format's reader refuses the content.
    """
    if path.is_dir():
        return read_dicom_series(path, max_volume_gib)
    name = path.name.lower()
    suffix = next((ending for ending in SCAN_SUFFIXES if name.endswith(ending)), None)
    if suffix is None and name.endswith(DICOM_SUFFIXES):
        raise DataError("one DICOM slice is no volume", "give the folder of the whole series", path=str(path))
    if suffix is None:
        known = ", ".join(SCAN_SUFFIXES)
        raise DataError("not a known scan format", f"known are {known} and DICOM folders", path=str(path))
    return READERS[suffix](path, max_volume_gib)
