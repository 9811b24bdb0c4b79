"""The part of the Dask engine that runs on the workers: is this the same code, and read one scan."""

from __future__ import annotations

import hashlib
import platform
from pathlib import Path

import numpy as np

from prepro.engines.base import Failure, load_case
from prepro.readers.base import Case, PackedImage, Reader

ROOT = Path(__file__).resolve().parents[2]
FOLDERS_THAT_COUNT = ("prepro", "mg3d/scans", "mg3d/datasets")
READERS: dict[str, Reader] = {}
"""Reader of every run that uses this process, by the name of the run."""


def _digest_of_code() -> str:
    digest = hashlib.sha256()
    for folder in FOLDERS_THAT_COUNT:
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


VERSIONS = {"code": _digest_of_code(), "Python": ".".join(platform.python_version_tuple()[:2]), "numpy": np.__version__}
"""What must be equal for equal rows, as it was when this process imported it."""


def difference(versions: dict[str, str]) -> str:
    """Say how this process differs from the one that asks.

    Args:
        versions: its :data:`VERSIONS`.

    Returns:
        the differing entries, here and there; empty when there are none.
    """
    names = [name for name in VERSIONS if versions.get(name) != VERSIONS[name]]
    return ", ".join(f"{name} {VERSIONS[name]} instead of {versions.get(name)}" for name in names)


def read_case(run: str, case: Case) -> PackedImage | Failure:
    """Read one case in this process.

    Args:
        run: name under which the reader came here.
        case: one of its cases, with absolute paths.

    Returns:
        the packed image or the reason against it.
    """
    return load_case(READERS[run], case)
