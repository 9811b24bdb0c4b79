"""Readers that misbehave on purpose, importable by worker processes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mg3d.errors import DataError
from prepro.readers.base import Case, CaseList, PackedImage


def number_of(case: Case) -> int:
    return int(case.image_id.rpartition("_")[2])


def cases(folder: Path, count: int) -> Iterator[Case]:
    for number in range(count):
        yield Case(f"scan_{number}", f"patient_{number}", "train", (folder,), "", "", splits=("train",))


@dataclass(frozen=True)
class NumberReader:
    """Gives the number of the case as its voxels; later cases are quicker, so that order is no accident.

    Attributes:
        folder: marks of what happened are left here.
        kills: cases that kill their process every time.
        kills_once: cases that do so the first time.
    """

    folder: Path
    kills: tuple[int, ...] = ()
    kills_once: tuple[int, ...] = ()

    corpus = "clm_numbers"
    label_names = ()
    window = "[-1000,1000]"

    def find_cases(self) -> CaseList:
        return CaseList(list(cases(self.folder, 8)))

    def load(self, case: Case) -> PackedImage:
        number = number_of(case)
        time.sleep(max(0.0, 0.02 * (5 - number)))
        if number in self.kills:
            os.kill(os.getpid(), signal.SIGKILL)
        if number in self.kills_once and not (self.folder / f"killed_{number}").exists():
            (self.folder / f"killed_{number}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        record = {"pid": os.getpid(), "threads": os.environ.get("OMP_NUM_THREADS"), "others": self._others(number)}
        return PackedImage(np.full((2, 2, 2), number, dtype=np.int16), (1.0, 1.0, 1.0), record)

    def _others(self, number: int) -> int:
        """Return how many other cases are being read at this moment."""
        mark = self.folder / f"reading_{number}"
        mark.touch()
        time.sleep(0.05)
        seen = len(list(self.folder.glob("reading_*"))) - 1
        mark.unlink()
        return seen


class DamagedReader:
    """Every case fails in another way."""

    problems = (
        DataError("bits are missing", "copy it again"),
        MemoryError(),
        OSError("Input/output error"),
        TypeError("a decoder stumbled"),
        RuntimeError("another decoder stumbled"),
    )
    corpus = "clm_damaged"
    label_names = ()
    window = "[-1000,1000]"

    def find_cases(self) -> CaseList:
        return CaseList()

    def load(self, case: Case) -> PackedImage:
        raise self.problems[number_of(case)]


class UnstartableReader(NumberReader):
    """Cannot be unpickled, so that no worker process comes up."""

    def __setstate__(self, state: object) -> None:
        raise ImportError("a library is missing")


class SleepingReader(NumberReader):
    """Leaves its process id behind and reads for ever."""

    def load(self, case: Case) -> PackedImage:
        (self.folder / f"pid_{os.getpid()}").touch()
        time.sleep(3600)
        raise AssertionError("not reached")
