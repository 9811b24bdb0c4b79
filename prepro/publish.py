"""The last step of a run: all files of a corpus are ready; check them against each other and give them their names.

Whichever process finds every file finished does it, alone. Nothing of a corpus appears under a final name before that,
so a folder never mixes two runs; a ``clean`` set in which splits share a volume stays unpublished.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mg3d.atomic import sync_directory
from mg3d.errors import DataError
from mg3d.locks import FileLock
from prepro.manifest import SUFFIX, code_version, iterate_cases, manifest_name, read_head, write_manifest
from prepro.plan import Plan, Shard
from prepro.readers.base import Exclusion
from prepro.shard_writer import ShardFiles
from prepro.splits import SPLITS, overlaps, refuse_overlaps
from prepro.text_statistics import TextStatistics

MAX_LISTED_OVERLAPS = 100
LISTED_OF_A_FILE = ("file", "split", "rows", "bytes", "sha256", "rows_sha256")
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataSet:
    """What the data-set manifest says beside the files.

    Attributes:
        exclusions: scans left out before reading.
        clean: refuse equal volumes in two splits.
        about: settings and notes.
    """

    exclusions: tuple[Exclusion, ...]
    clean: bool
    about: Mapping[str, Any]


def data_set_manifest(folder: Path, corpus: str) -> Path:
    """Return the place of the manifest over all files of a corpus."""
    return folder / f"{corpus}{SUFFIX}"


def leak_list(folder: Path, corpus: str) -> Path:
    """Return the place of the list of volumes that two splits share."""
    return folder / f"{corpus}.shared.txt"


def publish(
    folder: Path, plan: Plan, data_set: DataSet, statistics: Mapping[str, TextStatistics]
) -> dict[str, Any] | list[str]:
    """Publish a corpus if all its files are finished.

    Args:
        folder: the output folder.
        plan: all files.
        data_set: for the manifest.
        statistics: empty text statistics per split, to be filled.

    Returns:
        the data-set manifest once everything is published, before that the names of the files not finished yet.

    Raises:
        DataError: no row at all, or equal volumes in two splits of a clean set.
    """
    lock = FileLock(folder / f".{plan.corpus}.publish.lock")
    lock.acquire(wait=True)
    try:
        heads = {
            shard: ShardFiles(folder, shard.name).finished_head(shard, check_sources=False) for shard in plan.shards
        }
        missing = [shard.name for shard, head in heads.items() if head is None]
        if missing:
            return missing
        return _publish_all(folder, plan, data_set, statistics, {s: head for s, head in heads.items() if head})
    finally:
        lock.release()


def _publish_all(
    folder: Path,
    plan: Plan,
    data_set: DataSet,
    statistics: Mapping[str, TextStatistics],
    heads: Mapping[Shard, Mapping[str, Any]],
) -> dict[str, Any]:
    _refuse_nothing(folder, heads, data_set)
    shared = _shared_contents(folder, plan)
    listing = leak_list(folder, plan.corpus)
    if data_set.clean:
        refuse_overlaps(shared, "volumes with equal content", listing)
    listing.unlink(missing_ok=True)
    manifest = data_set_manifest(folder, plan.corpus)
    content = _manifest(folder, plan, data_set, statistics, heads, shared)
    files = [ShardFiles(folder, shard.name) for shard in plan.shards]
    if any(names.is_unpublished() for names in files) or read_head(manifest) != content:
        _remove_obsolete(folder, plan)
        manifest.unlink(missing_ok=True)
        for names in files:
            names.publish()
        unsynced = folder / f".{manifest.name}.unsynced"
        write_manifest(unsynced, content)
        os.replace(unsynced, manifest)
        sync_directory(folder)
    for names in files:
        names.tidy()
    return content


def _refuse_nothing(folder: Path, heads: Mapping[Shard, Mapping[str, Any]], data_set: DataSet) -> None:
    if any(head["rows"] for head in heads.values()):
        return
    reasons = [item["reason"] for head in heads.values() for item in head["exclusions"]]
    reasons += [item.reason for item in data_set.exclusions]
    for shard in heads:
        ShardFiles(folder, shard.name).discard()
    raise DataError("no scan could be packed", f"first reason: {reasons[0]}" if reasons else "check the root")


def _shared_contents(folder: Path, plan: Plan) -> list[str]:
    """Volumes of equal content in two splits; one short key per volume is kept to find them."""
    first: dict[bytes, str] = {}
    leaking = set()
    for digest, split, _ in _contents(folder, plan):
        key = bytes.fromhex(digest)
        if first.setdefault(key, split) != split:
            leaking.add(digest)
    return overlaps(entry for entry in _contents(folder, plan) if entry[0] in leaking) if leaking else []


def _contents(folder: Path, plan: Plan) -> Iterator[tuple[str, str, str]]:
    for shard in plan.shards:
        for case in iterate_cases(ShardFiles(folder, shard.name).current_manifest):
            yield case["image_sha256"], shard.split, case["image_id"]


def _manifest(
    folder: Path,
    plan: Plan,
    data_set: DataSet,
    statistics: Mapping[str, TextStatistics],
    heads: Mapping[Shard, Mapping[str, Any]],
    shared: list[str],
) -> dict[str, Any]:
    failures = [item for head in heads.values() for item in head["exclusions"]]
    content = {
        "corpus": plan.corpus,
        "plan": plan.digest,
        "code": code_version(),
        **data_set.about,
        "rows": {split: sum(head["rows"] for s, head in heads.items() if s.split == split) for split in SPLITS},
        "files": [{key: head[key] for key in LISTED_OF_A_FILE} for head in heads.values()],
        "text": _text(folder, plan, statistics),
        "exclusions": [*(asdict(item) for item in data_set.exclusions), *failures],
        "failed": len(failures),
        "shared_between_splits": {"count": len(shared), "pairs": shared[:MAX_LISTED_OVERLAPS]},
    }
    return json.loads(json.dumps(content))


def _text(folder: Path, plan: Plan, statistics: Mapping[str, TextStatistics]) -> dict[str, Any]:
    for shard in plan.shards:
        packed = (case["image_id"] for case in iterate_cases(ShardFiles(folder, shard.name).current_manifest))
        wanted = next(packed, None)
        for case in shard.cases:  # the rows keep the order of the cases
            if case.image_id == wanted:
                statistics[shard.split].add(case.findings, case.impression)
                wanted = next(packed, None)
    return {split: filled.result() for split, filled in statistics.items()}


def _remove_obsolete(folder: Path, plan: Plan) -> None:
    names = {shard.name for shard in plan.shards}
    old = [name for name in published_names(folder, plan.corpus) if name not in names]
    for name in old:
        (folder / name).unlink(missing_ok=True)
        (folder / manifest_name(name)).unlink(missing_ok=True)
    if old:
        logger.info("removed %d files of the set that this one replaces: %s ...", len(old), old[0])


def published_names(folder: Path, corpus: str) -> list[str]:
    """Return the Arrow files that the data-set manifest of a corpus lists; none without one."""
    head = read_head(data_set_manifest(folder, corpus)) or {}
    return [str(entry["file"]) for entry in head.get("files", ())]


def refuse_competitors(folder: Path, plan: Plan) -> None:
    """Refuse files of the same corpus that nobody would replace: readers could not tell the two sets apart.

    Args:
        folder: the output folder.
        plan: all files.

    Raises:
        DataError: there is one.
    """
    known = {shard.name for shard in plan.shards} | set(published_names(folder, plan.corpus))
    pattern = re.compile(rf"{plan.corpus}_(?:train|val|test)(?:-\d{{5}}-of-\d{{5}})?\.arrow")
    others = sorted(p.name for p in folder.glob(f"{plan.corpus}_*.arrow") if pattern.fullmatch(p.name))
    others = [name for name in others if name not in known]
    if others:
        remedy = "move them away, or choose another --out or the old --rows-per-shard"
        raise DataError(
            f"{len(others)} files of another packing are here, for example {others[0]}", remedy, path=str(folder)
        )
