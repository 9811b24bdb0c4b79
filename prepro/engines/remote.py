"""The part of the Dask engine that runs on the workers: is this the same code, and read one scan."""

from __future__ import annotations

import hashlib
import platform
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from prepro.engines.base import Failure, load_case
from prepro.readers.base import Case, PackedImage, Reader

ROOT = Path(__file__).resolve().parents[2]
FOLDERS_THAT_COUNT = ("prepro", "mg3d/scans", "mg3d/datasets")


def _digest_of_code() -> str:
    digest = hashlib.sha256()
    for folder in FOLDERS_THAT_COUNT:
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


VERSIONS = {"code": _digest_of_code(), "Python": ".".join(platform.python_version_tuple()[:2]), "numpy": np.__version__}
"""What must be equal for equal rows, as it was when this process imported it."""


@dataclass(frozen=True)
class Job:
    """What every scan of a run has in common.

    Attributes:
        reader: the data set; small, as it travels with every scan.
        versions: :data:`VERSIONS` of the process that asks.
        place: a file or folder of the data that must be visible.
    """

    reader: Reader
    versions: dict[str, str]
    place: str


def complaint(job: Job) -> str:
    """Say why this process must not read for a job.

    Args:
        job: what is asked for.

    Returns:
        one clause, empty when nothing speaks against it.
    """
    names = [name for name in VERSIONS if job.versions.get(name) != VERSIONS[name]]
    if names:
        return "has " + ", ".join(f"{name} {VERSIONS[name]} instead of {job.versions.get(name)}" for name in names)
    return "" if Path(job.place).exists() else f"does not see {job.place}"


def read_case(job: Job, case: Case) -> PackedImage | Failure:
    """Read one case in this process.

    Args:
        job: reader and requirements.
        case: one of its cases, with absolute paths.

    Returns:
        the packed image or the reason against it.

    Raises:
        RuntimeError: this process must not read for the job; another may.
    """
    if problem := complaint(job):
        raise RuntimeError(f"{platform.node()} {problem}")
    return load_case(job.reader, case)
