"""Arrays that are computed once: ``.npy`` files named by the digest of everything they were made from.

A changed setting, source file or program gives another name, so a stale array is never read.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mg3d.atomic import atomic_path, writing

REMEDY = "free some space, give work_dir= another place, or leave out cache=disk"


def digest_of(facts: Mapping[str, Any]) -> str:
    """SHA-256 of plain values, 32 hexadecimal digits; paths and tuples count by their text."""
    text = json.dumps(facts, sort_keys=True, default=str, ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:32]


def file_facts(path: str | Path) -> dict[str, Any]:
    """What tells that a file was replaced: path, bytes and time of change; a missing file has no bytes."""
    place = Path(path)
    try:
        found = place.stat()
    except OSError:
        return {"path": str(place), "bytes": None}
    return {"path": str(place), "bytes": found.st_size, "changed_ns": found.st_mtime_ns}


def function_facts(function: Callable[..., Any]) -> dict[str, Any]:
    """Name of a function and digest of the source file that holds it, as far as Python can tell."""
    name = f"{getattr(function, '__module__', '')}:{getattr(function, '__qualname__', repr(type(function)))}"
    try:
        source = Path(inspect.getsourcefile(function) or "").read_bytes()
    except (OSError, TypeError):
        return {"function": name}
    return {"function": name, "source_sha256": hashlib.sha256(source).hexdigest()}


class ArrayCache:
    """A folder of arrays by key; files appear whole or not at all, and a damaged one is made again.

    Args:
        folder: where the files lie; created with the first of them.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def path(self, key: str) -> Path:
        """File of a key."""
        return self.folder / f"{key}.npy"

    def get(self, key: str, make: Callable[[], np.ndarray]) -> np.ndarray:
        """Return the stored array, or make and store it.

        Args:
            key: digest of all that the array depends on, see `digest_of`.
            make: computes it.

        Raises:
            OutputError: the disk refused to store it.
        """
        stored = self._read(key)
        if stored is not None:
            return stored
        made = make()
        self._write(key, made)
        return made

    def _read(self, key: str) -> np.ndarray | None:
        try:
            return np.load(self.path(key), allow_pickle=False)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, EOFError):  # truncated or damaged
            return None

    def _write(self, key: str, array: np.ndarray) -> None:
        with writing(self.folder, REMEDY):
            self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(self.path(key), REMEDY, needed=array.nbytes) as partial, partial.open("wb") as stream:
            np.save(stream, array, allow_pickle=False)
