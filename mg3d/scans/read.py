"""One door for every scan format: the name of the file, or being a folder, decides which reader opens it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mg3d.atomic import is_special
from mg3d.errors import DataError
from mg3d.scans.dicom import read_dicom_series
from mg3d.scans.dicom_file import DICOM_SUFFIXES, is_dicom
from mg3d.scans.nifti import read_nifti
from mg3d.scans.npz import read_npz
from mg3d.scans.raw_volume import RawVolume
from mg3d.scans.simple_itk import FORMATS, read_itk_image

__all__ = ["DICOM_SUFFIXES", "READERS", "SCAN_SUFFIXES", "read_scan"]

READERS: dict[str, Callable[[Path, float], RawVolume]] = {
    ".nii.gz": read_nifti,
    ".nii": read_nifti,
    **dict.fromkeys(FORMATS, read_itk_image),
    ".npz": read_npz,
}
SCAN_SUFFIXES = tuple(READERS)


def read_scan(path: Path, max_volume_gib: float = 4.0, series: str = "") -> RawVolume:
    """Read one scan as stored, whatever its format.

    Args:
        path: a NIfTI, NRRD, MetaImage or published ``.npz`` file, the folder of a DICOM series, or one multi-frame
            DICOM file.
        max_volume_gib: refuse what claims more voxel data than this, before any of it is read.
        series: of a DICOM folder that holds several: SeriesInstanceUID, or ``largest``.

    Returns:
        the stored voxels with their geometry and the digest of the bytes.

    Raises:
        DataError: unknown format, or the format's reader refuses the content.
    """
    name = path.name.lower()
    suffix = next((ending for ending in SCAN_SUFFIXES if name.endswith(ending)), None)
    if is_special(path):
        raise DataError("neither a file nor a folder", "give a scan", path=str(path))
    if path.is_dir() or (suffix is None and (name.endswith(DICOM_SUFFIXES) or is_dicom(path))):
        return read_dicom_series(path, max_volume_gib, series)
    if suffix is None:
        known = ", ".join(SCAN_SUFFIXES)
        raise DataError("not a known scan format", f"known are {known} and DICOM", path=str(path))
    return READERS[suffix](path, max_volume_gib)
