"""Paths and names that come from tables, lists and archives: nothing leaves its root, hidden files are no data."""

from __future__ import annotations

import re
from pathlib import Path

from mg3d.atomic import is_special
from mg3d.errors import DataError

__all__ = ["confined_path", "is_plain_name", "visible_files"]

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
        raise DataError(f"path {relative!r} leaves the data root {base}", "use paths below the data root")
    return path


def is_plain_name(text: str) -> bool:
    """Whether a name from a table may become part of a file name: no folder, no way up, nothing empty."""
    return text not in ("", ".", "..") and not any(letter in text for letter in "/\\\0")


def visible_files(folder: Path, pattern: str) -> list[Path]:
    """Sorted files of a pattern without hidden ones (the ``._NAME`` companions of macOS), pipes, sockets and devices.

    Args:
        folder: where to look; may be absent.
        pattern: as for :meth:`pathlib.Path.glob`.
    """
    return sorted(path for path in folder.glob(pattern) if not path.name.startswith(".") and not is_special(path))
