"""Room for the result: the check before a run, and words for a disk that fails during one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mg3d.atomic import FULL, readable_size
from mg3d.errors import EnvironmentProblem, RunFailedError
from mg3d.scans.geometry import Geometry
from prepro.plan import Shard
from prepro.shard_writer import ShardFiles

ROW_OVERHEAD = 8192
"""Bytes of a row beside its voxels: text, Arrow metadata, its lines in journal and manifest."""
NATIVE_BYTES_PER_VOXEL = 1.0
NATIVE_EXTENT_MM = (320.0, 360.0, 360.0)


def estimated_row_bytes(geometry: Geometry, window: str) -> int:
    """Return the size of a row: exact for crops, that of a typical chest for native rows.

    Args:
        geometry: the grid of every row.
        window: the schema's window text; ``grey8`` is one byte a voxel.
    """
    if geometry.store == "native":
        spacing = geometry.target_spacing_mm or (1.5, 0.75, 0.75)
        voxels = 1.0
        for extent, step in zip(NATIVE_EXTENT_MM, spacing, strict=True):
            voxels *= extent / step
        return int(voxels * NATIVE_BYTES_PER_VOXEL) + ROW_OVERHEAD
    depth, height, width = geometry.size
    return depth * height * width * (1 if window == "grey8" else 2) + ROW_OVERHEAD


def needed_bytes(folder: Path, shards: Iterable[Shard], row_bytes: int) -> int:
    """Return what is still to be written.

    Args:
        folder: the output folder.
        shards: unfinished files.
        row_bytes: from :func:`estimated_row_bytes`.
    """
    needed = 0
    for shard in shards:
        partial = ShardFiles(folder, shard.name).partial
        written = partial.stat().st_size if partial.exists() else 0
        needed += max(0, len(shard.cases) * row_bytes - written)
    return needed


def check_free_space(folder: Path, needed: int) -> None:
    """Refuse a run that cannot fit.

    Args:
        folder: the output folder.
        needed: bytes to write.

    Raises:
        EnvironmentProblem: the disk is too small.
    """
    free = shutil.disk_usage(folder).free
    if needed > free:
        message = f"{folder} has {readable_size(free)} free, the rows need {readable_size(needed)}"
        raise EnvironmentProblem(message, "free some space or choose another --out")


def make_folder(folder: Path) -> None:
    """Make the output folder and make sure that it can be written.

    Args:
        folder: the output folder; missing parents are made, too.

    Raises:
        EnvironmentProblem: it cannot be made, or is read-only.
    """
    probe = folder / f".write_test.{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as problem:
        message = f"cannot write in {folder}: {problem.strerror}"
        raise EnvironmentProblem(message, "make it writable, or choose another --out") from problem


@contextmanager
def explained(folder: Path, needed: int) -> Iterator[None]:
    """Say what a failing disk means for the run.

    Args:
        folder: the output folder.
        needed: bytes the run had to write at its start.

    Raises:
        RunFailedError: writing failed; what was written before is kept and taken up again.
    """
    try:
        yield
    except OSError as problem:
        reason = f"{problem.strerror or problem}"
        if problem.errno in FULL:
            free = shutil.disk_usage(folder).free
            reason += f", {readable_size(free)} free, this run needed {readable_size(needed)} at its start"
        remedy = "free some space, then run the same command: it goes on from here"
        raise RunFailedError(f"cannot write in {folder}: {reason}", remedy) from problem
