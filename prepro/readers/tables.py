"""Paths of a table or JSON, without guessing; the tables themselves are read by :mod:`mg3d.files`."""

from __future__ import annotations

import re
from pathlib import Path

from mg3d.errors import DataError

SCAN_SUFFIXES = (".nii.gz.npz", ".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd", ".npz")
_DRIVE = re.compile(r"[A-Za-z]:[\\/]|\\\\")


def confined_path(root: Path, relative: str) -> Path:
    r"""Join a path taken from a table or JSON to its root and refuse to leave that root.

    Args:
        root: folder the entry belongs to.
        relative: path as written in the table; one written on Windows (``scans\a.nii.gz``) is understood where no
            file has such a name.

    Returns:
        the resolved path.

    Raises:
        DataError: the path is absolute elsewhere, climbs out with ``..``, follows a link out of the root, or names a
            Windows drive.
    """
    base = root.resolve()
    try:
        path = (base / relative).resolve()
        if "\\" in relative and not path.exists():
            if _DRIVE.match(relative):
                raise DataError(f"path {relative!r} names a Windows drive", "write it relative to --root, with /")
            path = (base / relative.replace("\\", "/")).resolve()
        path.exists()  # a name too long for the file system is refused here
    except (OSError, ValueError) as problem:
        raise DataError(f"path {relative[:200]!r} is unusable ({problem})", "repair the entry") from problem
    if not path.is_relative_to(base):
        raise DataError(f"path {relative!r} leaves the data root {base}", "use paths below --root")
    return path


def strip_suffix(name: str) -> str:
    """Drop the ending of a scan file: ``train_1_a_1.nii.gz`` gives ``train_1_a_1``.

    Args:
        name: a file name; other endings stay.
    """
    lower = name.lower()
    ending = next((suffix for suffix in SCAN_SUFFIXES if lower.endswith(suffix)), "")
    return name[: len(name) - len(ending)]
