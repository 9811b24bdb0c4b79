"""What a run will write: the Arrow files of a corpus, the cases of each, and digests that tell whether one changed."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from mg3d.datasets.arrow_schema import FORMAT_VERSION
from mg3d.errors import DataError
from prepro.readers.base import Case
from prepro.splits import SPLITS

PLACE_FIELDS = ("source", "splits", "origin", "position")
"""Fields of a case that say where it came from, not what its row holds."""


@dataclass(frozen=True, eq=False)
class Shard:
    """One Arrow file to write.

    Attributes:
        name: file name, ``<corpus>_<split>.arrow`` or ``<corpus>_<split>-00000-of-00064.arrow``.
        split: train, val or test.
        cases: its cases, in the order of the rows.
        config_digest: digest of the settings that change what rows hold.
    """

    name: str
    split: str
    cases: Sequence[Case]
    config_digest: str

    @cached_property
    def content_digest(self) -> str:
        """Digest of the settings and of everything known of the cases before their voxels are read."""
        digest = hashlib.sha256(f"{self.config_digest} {self.name}\n".encode())
        names = [field.name for field in fields(Case) if field.name not in PLACE_FIELDS]
        for case in self.cases:
            known = {name: getattr(case, name) for name in names}
            known["files"] = [path.name for path in case.source]
            digest.update(json.dumps(known, sort_keys=True, default=str).encode() + b"\n")
        return digest.hexdigest()

    @cached_property
    def source_digest(self) -> str:
        """Digest of size and time of change of every source file, so that a mended scan is noticed."""
        digest = hashlib.sha256()
        for case in self.cases:
            for path in case.source:
                digest.update(f"{_state_of(path)}\n".encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class Plan:
    """All files of a corpus.

    Attributes:
        corpus: dataset key.
        shards: every file, in the order train, val, test and by number.
    """

    corpus: str
    shards: tuple[Shard, ...]

    @cached_property
    def digest(self) -> str:
        """Digest of all files, equal for all processes that may share a folder."""
        return hashlib.sha256("".join(shard.content_digest for shard in self.shards).encode()).hexdigest()

    def part(self, shard: tuple[int, int] | None) -> tuple[Shard, ...]:
        """Return the files that one of several processes writes.

        Args:
            shard: (i, n) for the i-th of n parts, counted from 1; None for all.

        Returns:
            every n-th file.

        Raises:
            DataError: more parts than files.
        """
        if shard is None:
            return self.shards
        number, parts = shard
        if parts > len(self.shards):
            files = f"{len(self.shards)} files" if len(self.shards) > 1 else "one file"
            raise DataError(
                f"--shard {number}/{parts} of {files}", "give --rows-per-shard N to write more, smaller files"
            )
        return self.shards[number - 1 :: parts]


def make_plan(cases: Sequence[Case], corpus: str, config: Mapping[str, Any], rows_per_shard: int = 0) -> Plan:
    """Spread cases over files.

    Args:
        cases: cases with splits, in the order of the rows.
        corpus: dataset key, the first part of every name.
        config: the settings that change what rows hold, plain values.
        rows_per_shard: cases per file; 0 makes one file per split.

    Returns:
        the plan; a split without cases has one empty file.
    """
    text = json.dumps({"format": FORMAT_VERSION, **config}, sort_keys=True, default=str)
    config_digest = hashlib.sha256(text.encode()).hexdigest()
    shards = []
    for split in SPLITS:
        chosen = [case for case in cases if split in case.splits]
        for name, part in _blocks(f"{corpus}_{split}", chosen, rows_per_shard):
            shards.append(Shard(name, split, part, config_digest))
    return Plan(corpus, tuple(shards))


def _blocks(stem: str, cases: list[Case], rows: int) -> Iterator[tuple[str, list[Case]]]:
    if not rows:
        yield f"{stem}.arrow", cases
        return
    count = max(1, math.ceil(len(cases) / rows))
    for number in range(count):
        yield f"{stem}-{number:05d}-of-{count:05d}.arrow", cases[number * rows : (number + 1) * rows]


def _state_of(path: Path) -> str:
    try:
        state = path.stat()
    except OSError:
        return "missing"
    return f"{state.st_size} {state.st_mtime_ns}"
