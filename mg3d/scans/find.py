"""Scans below a folder: volume files, and folders that hold the slices of a DICOM series."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from mg3d.errors import DataError
from mg3d.scans.read import DICOM_SUFFIXES, SCAN_SUFFIXES

DICOM_MARK = (128, b"DICM")


@dataclass(frozen=True)
class FoundScan:
    """One scan on disk.

    Attributes:
        name: path below the searched folder with ``/``, or the file's own name.
        path: the file or DICOM folder.
    """

    name: str
    path: Path


def find_scans(root: str | Path) -> list[FoundScan]:
    """List scans without reading voxels.

    Hidden files and folders are left out, links to folders are not followed. The raw file beside a header
    (``.mhd``, ``.nhdr``) belongs to it.

    Args:
        root: a scan file, the folder of one DICOM series, or a folder to search through.

    Returns:
        scans in natural order of their names.

    Raises:
        DataError: nothing there, or no scan inside.
    """
    root = Path(root).expanduser()
    if root.is_file():
        return [FoundScan(root.name, root)]
    if not root.is_dir():
        raise DataError("no such file or folder", "give a scan or a folder of scans", path=str(root))
    found: list[FoundScan] = []
    for place, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        folder, visible = Path(place), [name for name in files if not name.startswith(".")]
        volumes = [folder / name for name in visible if name.lower().endswith(SCAN_SUFFIXES)]
        if not volumes and any(is_dicom(folder / name) for name in visible):
            volumes = [folder]
        found += [FoundScan(_name(path, root), path) for path in volumes]
    if not found:
        known = ", ".join(SCAN_SUFFIXES)
        raise DataError("no scan in this folder", f"known are {known} and DICOM folders", path=str(root))
    return sorted(found, key=lambda scan: _natural(scan.name))


def is_dicom(path: Path) -> bool:
    """Whether a file is a DICOM slice, by its ending or, without a known one, by its mark."""
    if path.name.lower().endswith(DICOM_SUFFIXES):
        return True
    if path.suffix and not path.suffix[1:].isdigit():
        return False
    place, mark = DICOM_MARK
    try:
        with open(path, "rb") as stream:
            stream.seek(place)
            return stream.read(len(mark)) == mark
    except OSError:
        return False


def _name(path: Path, root: Path) -> str:
    return root.name if path == root else path.relative_to(root).as_posix()


def _natural(name: str) -> list[tuple[int, int, str]]:
    parts = re.split(r"(\d+)", name)
    return [(0, int(part), part) if part.isdigit() else (1, 0, part) for part in parts]
