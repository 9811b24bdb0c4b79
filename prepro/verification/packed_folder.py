"""Packed files as a set: which are there, which are missing, and whether they belong together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

from mg3d.datasets.arrow_files import find_arrow_files
from mg3d.datasets.arrow_schema import SPLITS
from mg3d.errors import DataError
from mg3d.paths import visible_files
from prepro.manifest import SUFFIX, read_head
from prepro.verification.arrows import FILE_NAME, ArrowResult
from prepro.verification.findings import Finding, bare_message, finding
from prepro.verification.leakage import Member, compare
from prepro.verification.manifests import manifest_path

LEFTOVERS: Final = (".*.partial", ".*.ready", ".*.tmp", ".*.journal.jsonl")


def arrow_files(folder: Path) -> list[Path]:
    """Return the packed files of a folder in order of their names; hidden ones are unfinished and left out."""
    return visible_files(folder, "*.arrow")


def leftovers(folder: Path) -> list[Path]:
    """Return what a packing run that did not finish left in a folder."""
    return sorted({path for pattern in LEFTOVERS for path in folder.glob(pattern)})


def check_names(folder: Path) -> Iterator[Finding]:
    """Look for missing shards and splits, lone manifests and what an unfinished run left behind.

    Args:
        folder: a folder of packed files, perhaps unfinished ones only.

    Yields:
        what is missing.
    """
    yield from _missing_files(folder)
    yield from _data_set_problems(folder)
    for path in visible_files(folder, f"*{SUFFIX}"):
        name = path.name.removesuffix(SUFFIX) + ".arrow"
        match = FILE_NAME.fullmatch(name)
        # with a list of the corpus' files the missing one was named already
        if match and not (folder / name).exists() and not (folder / f"{match['corpus']}{SUFFIX}").exists():
            yield finding("orphan_manifest", f"{name} is not there", path=str(path))
    for path in leftovers(folder):
        yield finding("unfinished_run", path.name, path=str(path))


def _missing_files(folder: Path) -> Iterator[Finding]:
    present: dict[str, set[str]] = defaultdict(set)
    for path in arrow_files(folder):
        if match := FILE_NAME.fullmatch(path.name):
            present[match["corpus"]].add(match["split"])
    for corpus, splits in sorted(present.items()):
        for split in SPLITS:
            if split not in splits:
                message = f"{corpus} has no {split} file, only {', '.join(sorted(splits))}"
                yield finding("missing_split", message, path=str(folder / f"{corpus}_{split}.arrow"))
                continue
            try:
                find_arrow_files(folder, corpus, split)
            except DataError as problem:
                yield finding("missing_shard", bare_message(problem), path=str(folder), remedy=problem.remedy)


def _data_set_problems(folder: Path) -> Iterator[Finding]:
    """Compare the files with the lists the packer left: one manifest per corpus names all its files."""
    for path in visible_files(folder, f"*{SUFFIX}"):
        if FILE_NAME.fullmatch(path.name.removesuffix(SUFFIX) + ".arrow"):
            continue
        try:
            listed = {item["file"]: item["sha256"] for item in (read_head(path) or {})["files"]}
        except (KeyError, TypeError):
            yield finding("manifest_unreadable", "not the list of a corpus' files", path=str(path))
            continue
        for name, sha256 in listed.items():
            arrow = folder / name
            if not arrow.exists():
                yield finding("missing_shard", f"{name} is listed and not there", path=str(path))
            elif (read_head(manifest_path(arrow)) or {}).get("sha256", sha256) != sha256:
                yield finding("manifest_differs", f"{name} is not of this packing", path=str(path))
        corpus = path.name.removesuffix(SUFFIX)
        for arrow in arrow_files(folder):
            match = FILE_NAME.fullmatch(arrow.name)
            if match and match["corpus"] == corpus and arrow.name not in listed:
                yield finding("manifest_differs", f"{arrow.name} is not of this packing", path=str(path))


def check_together(results: Sequence[ArrowResult]) -> list[Finding]:
    """Compare the files of one data set with each other.

    Args:
        results: the checked files.

    Returns:
        different settings, leakage between splits, duplicates.
    """
    found = list(_different_settings(results))
    for group in _data_sets(results):
        found += compare([member for result in group for member in _members(result)])
    return found


def _different_settings(results: Iterable[ArrowResult]) -> Iterator[Finding]:
    first: dict[tuple[Path, str], ArrowResult] = {}
    for result in results:
        known = first.setdefault((Path(result.path).parent, result.corpus), result)
        if result.metadata and known.metadata and result.metadata != known.metadata:
            message = f"other geometry, window, labels or version than {Path(known.path).name}"
            yield finding("metadata_differs", message, path=result.path)


def _data_sets(results: Sequence[ArrowResult]) -> list[list[ArrowResult]]:
    """All files form one data set; where names repeat (two packings side by side), each folder is one."""
    names = [Path(result.path).name for result in results]
    if len(set(names)) == len(names):
        return [list(results)]
    folders: dict[Path, list[ArrowResult]] = defaultdict(list)
    for result in results:
        folders[Path(result.path).parent].append(result)
    return list(folders.values())


def _members(result: ArrowResult) -> Iterator[Member]:
    clean = result.protocol != "reference"
    for facts in result.facts:
        names = (facts.image_id, result.corpus, result.split, result.path)
        yield Member(*names, facts.patient_id, facts.study, facts.digest, clean)
