"""Scans below a folder: volume files, and folders that hold the slices of a DICOM series."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mg3d.atomic import is_special
from mg3d.errors import DataError
from mg3d.scans.dicom_file import is_dicom
from mg3d.scans.folders import FOLLOW_LINKS, PassedOver, walk_folders
from mg3d.scans.read import SCAN_SUFFIXES

__all__ = ["FoundScan", "FoundScans", "find_scans"]


@dataclass(frozen=True)
class FoundScan:
    """One scan on disk.

    Attributes:
        name: path below the searched folder with ``/``, or the file's own name.
        path: the file or DICOM folder.
    """

    name: str
    path: Path


class FoundScans(list[FoundScan]):
    """The scans of a search, and what it left out.

    Attributes:
        passed_over: links, special files and folders that were not searched.
    """

    def __init__(self, scans: Sequence[FoundScan], passed_over: PassedOver) -> None:
        super().__init__(scans)
        self.passed_over = passed_over


def find_scans(root: str | Path, *, follow_links: bool = False) -> FoundScans:
    """List scans without reading voxels.

    Hidden files and folders are left out, links as :mod:`mg3d.scans.folders` says. The raw file beside a header
    (``.mhd``, ``.nhdr``) belongs to it.

    Args:
        root: a scan file, the folder of one DICOM series, or a folder to search through.
        follow_links: also search linked folders that lie outside the root.

    Returns:
        scans in natural order of their names.

    Raises:
        DataError: nothing there, or no scan inside.
    """
    root, passed_over = Path(root).expanduser(), PassedOver(FOLLOW_LINKS)
    if root.is_file():
        return FoundScans([FoundScan(root.name, root)], passed_over)
    if not root.is_dir():
        message = "neither a file nor a folder" if is_special(root) else "no such file or folder"
        raise DataError(message, "give a scan or a folder of scans", path=str(root))
    found: list[FoundScan] = []
    for folder, files in walk_folders(root, passed_over, follow_links=follow_links):
        volumes = [folder / name for name in files if name.lower().endswith(SCAN_SUFFIXES)]
        if not volumes and any(is_dicom(folder / name) for name in files):
            volumes = [folder]
        found += [FoundScan(_name(path, root), path) for path in volumes]
    if not found:
        known = ", ".join(SCAN_SUFFIXES)
        left_out = "".join(f"; {line}" for line in passed_over.lines())
        raise DataError(f"no scan in this folder{left_out}", f"known are {known} and DICOM folders", path=str(root))
    return FoundScans(sorted(found, key=lambda scan: _natural(scan.name)), passed_over)


def _name(path: Path, root: Path) -> str:
    return root.name if path == root else path.relative_to(root).as_posix()


def _natural(name: str) -> list[tuple[int, int, str]]:
    parts = re.split(r"(\d+)", name)
    return [(0, int(part), part) if part.isdigit() else (1, 0, part) for part in parts]
