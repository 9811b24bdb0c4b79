"""One door for every scan format: the name of the file or the folder decides which reader opens it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mg3d.errors import DataError
from mg3d.scans.nifti import read_nifti
from mg3d.scans.raw_volume import RawVolume

READERS: dict[str, Callable[[Path, float], RawVolume]] = {".nii.gz": read_nifti, ".nii": read_nifti}
SCAN_SUFFIXES = tuple(READERS)


def read_scan(path: Path, max_volume_gib: float = 4.0) -> RawVolume:
    """Read one scan as stored, whatever its format.

    Args:
        path: a volume file.
        max_volume_gib: refuse what claims more voxel data than this, before any of it is read.

    Returns:
        the stored voxels with their geometry and the digest of the bytes.

    Raises:
        DataError: unknown format, or the format's reader refuses the content.
    """
    suffix = next((ending for ending in SCAN_SUFFIXES if path.name.lower().endswith(ending)), None)
    if suffix is None:
        known = ", ".join(SCAN_SUFFIXES)
        raise DataError("not a known scan format", f"known are {known}", path=str(path))
    return READERS[suffix](path, max_volume_gib)
