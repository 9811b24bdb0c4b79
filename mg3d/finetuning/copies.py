"""Copy a file of a download to its prepared place, once and whole."""

from __future__ import annotations

import shutil
from pathlib import Path

from mg3d.atomic import atomic_path, writing
from mg3d.errors import DataError

__all__ = ["copy_once"]


def copy_once(source: Path, target: Path) -> None:
    """Copy the bytes unless the target has the size and time of the source already; a kill leaves no half file.

    Args:
        source: the file.
        target: its new place and name; missing folders are made.

    Raises:
        DataError: there is no such source.
        OutputError: the target cannot be written.
    """
    if not source.is_file():
        raise DataError("missing", "download it again; --check-data lists everything that is wrong", path=str(source))
    wanted = source.stat()
    found = target.stat() if target.is_file() else None
    if found is not None and (found.st_size, int(found.st_mtime)) == (wanted.st_size, int(wanted.st_mtime)):
        return
    remedy = "free some space, or give work_dir= a place that can be written"
    with writing(target, remedy):
        target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(target, remedy, needed=wanted.st_size) as partial:
        shutil.copy2(source, partial)
