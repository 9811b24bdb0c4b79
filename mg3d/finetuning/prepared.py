"""Turn a download into arrays once: resumable, atomic, and one bad file never stops the others.

The folder of the arrays is named by the settings that made them, so arrays made with other settings are never read.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mg3d.atomic import atomic_path, write_text_atomically, writing
from mg3d.errors import DataError, OutputError, RunFailedError

__all__ = ["Job", "file_digest", "pending", "prepare_arrays", "prepared_folder"]

FAILURES = "failures.json"
REMEDY = "free some space, or give work_dir= a place that can be written"
_LOG = logging.getLogger(__name__)
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Job:
    """One array to make.

    Attributes:
        name: path of the array below the folder, without ``.npy``.
        source: what the convert function needs, picklable.
    """

    name: str
    source: Any


def prepared_folder(work_dir: str | Path, settings: Mapping[str, Any]) -> Path:
    """Folder of the arrays made with these settings: ``work_dir/prepared_<digest>``."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return Path(work_dir) / f"prepared_{hashlib.sha256(text.encode()).hexdigest()[:10]}"


def file_digest(path: Path) -> str:
    """SHA-256 of a file, for settings that depend on a table; empty when there is no file."""
    if not path.is_file():
        return ""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_CHUNK):
            digest.update(block)
    return digest.hexdigest()


def prepare_arrays(
    folder: Path,
    settings: Mapping[str, Any],
    jobs: Sequence[Job],
    convert: Callable[[Any], np.ndarray],
    workers: int = 0,
) -> dict[str, str]:
    """Make every array that is not there yet.

    Args:
        folder: from `prepared_folder`.
        settings: written beside the arrays for people to read.
        jobs: the arrays.
        convert: source -> array; a module-level function (or a partial of one) when ``workers`` is above 1.
        workers: processes; 0 and 1 work in this one.

    Returns:
        name -> reason of the jobs that failed; also written to ``failures.json``, and tried again the next time.

    Raises:
        DataError: not one array could be made.
        RunFailedError: a worker was killed, or the disk is full.
    """
    with writing(folder, REMEDY):
        folder.mkdir(parents=True, exist_ok=True)
    write_text_atomically(folder / "settings.json", json.dumps(settings, indent=1, default=str) + "\n", REMEDY)
    left = pending(folder, jobs)
    failures: dict[str, str] = {}
    with tqdm(total=len(jobs), initial=len(jobs) - len(left), desc="prepare", unit="scan", disable=None) as bar:
        for name, reason in _run(partial(_make, folder, convert), left, workers):
            bar.update()
            if reason:
                failures[name] = reason
                _LOG.warning("left out %s: %s", name, reason)
    write_text_atomically(folder / FAILURES, json.dumps(failures, indent=1) + "\n", REMEDY)
    _LOG.info("%s: %d of %d arrays ready, %d made now", folder, len(jobs) - len(failures), len(jobs), len(left))
    if len(failures) == len(jobs):
        first = next(iter(failures.items()), ("", "no scan was found"))
        raise DataError(f"nothing could be prepared ({first[0]}: {first[1]})", "look at the download with --check-data")
    return failures


def pending(folder: Path, jobs: Iterable[Job]) -> list[Job]:
    """Jobs whose array is not there."""
    return [job for job in jobs if not _target(folder, job).is_file()]


def _target(folder: Path, job: Job) -> Path:
    return folder / f"{job.name}.npy"


def _run(make: Callable[[Job], tuple[str, str]], jobs: Sequence[Job], workers: int) -> Iterator[tuple[str, str]]:
    if workers <= 1 or len(jobs) < 2:
        yield from map(make, jobs)
        return
    try:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            yield from pool.map(make, jobs)
    except BrokenProcessPool:
        raise RunFailedError(
            "a process that prepared scans was killed, probably for want of memory",
            "run the same command again, what is done is kept; num_workers=1 needs the least memory",
        ) from None


def _make(folder: Path, convert: Callable[[Any], np.ndarray], job: Job) -> tuple[str, str]:
    """Make one array; returns its name and why it failed, or an empty text."""
    target = _target(folder, job)
    try:
        array = convert(job.source)
    except (MemoryError, OutputError):
        raise
    except Exception as problem:  # readers of damaged files raise all kinds of errors
        return job.name, str(problem).splitlines()[0] if isinstance(problem, DataError) else repr(problem)
    with writing(target, REMEDY, needed=array.nbytes):
        target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(target, REMEDY, needed=array.nbytes) as partial_file, partial_file.open("wb") as stream:
        np.save(stream, array, allow_pickle=False)
    return job.name, ""
