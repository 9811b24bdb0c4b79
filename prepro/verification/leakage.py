"""Rows against each other: what may be in one split only, and what may be there once only."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Final, NamedTuple

from mg3d.files import id_key
from prepro.verification.findings import Finding, Severity, finding

PUBLISHED: Final = "published splits share them; pack with --split-protocol clean to keep them apart"


class Member(NamedTuple):
    """One scan as the comparison sees it; empty keys are not compared.

    Attributes:
        image_id: unique name in its corpus.
        corpus: dataset key.
        split: train, val or test.
        path: file it was found in.
        patient: patient id.
        study: common name of the reconstructions of one study.
        content: digest of the voxels.
        clean: whether its split was made to share nothing with the others; published splits (``reference``) share
            patients on purpose.
    """

    image_id: str
    corpus: str
    split: str
    path: str
    patient: str
    study: str
    content: bytes
    clean: bool = True


def compare(members: Sequence[Member]) -> list[Finding]:
    """Look for shared patients, studies and volumes, and for duplicates.

    Args:
        members: all scans of a data set.

    Returns:
        one finding per patient, study or volume in two splits: an error, or a note where all splits concerned are
        published ones; one per duplicate.
    """
    found = list(_duplicates(members))
    for code, keyed in (
        ("patient_in_two_splits", (((m.corpus, id_key(m.patient)), m) for m in members if m.patient)),
        ("study_in_two_splits", (((m.corpus, m.study), m) for m in members if m.study)),
        ("content_in_two_splits", ((m.content, m) for m in members if m.content)),
    ):
        found += [_shared(code, key, places) for key, places in _groups(keyed) if _is_leak(code, places)]
    return found


def _is_leak(code: str, places: dict[str, Member]) -> bool:
    """One and the same scan in two splits counts once, for its patient."""
    names = {member.image_id for member in places.values()}
    return len(names) > 1 or code == "patient_in_two_splits"


def _groups(keyed: Iterable[tuple[Hashable, Member]]) -> Iterator[tuple[Hashable, dict[str, Member]]]:
    """For every key in several splits the first member of each."""
    first: dict[Hashable, Member] = {}
    groups: dict[Hashable, dict[str, Member]] = {}
    for key, member in keyed:
        known = first.setdefault(key, member)
        if known.split != member.split:
            groups.setdefault(key, {known.split: known}).setdefault(member.split, member)
    yield from groups.items()


def _shared(code: str, key: Hashable, places: dict[str, Member]) -> Finding:
    shown = " and ".join(f"{member.image_id} ({split})" for split, member in sorted(places.items()))
    name = key[1] if isinstance(key, tuple) else ""
    severity: Severity | None = None if any(member.clean for member in places.values()) else "note"
    first = min(places.values())
    message = f"{name}: {shown}" if name else shown
    remedy = PUBLISHED if severity else ""
    return finding(code, message, path=first.path, case=first.image_id, severity=severity, remedy=remedy)


def _duplicates(members: Sequence[Member]) -> Iterator[Finding]:
    ids: dict[tuple[str, str, str], str] = {}
    contents: dict[tuple[str, bytes], str] = {}
    for member in members:
        place = (member.corpus, member.split, member.image_id)
        if place in ids:
            where = "" if ids[place] == member.path else f"; it is in {ids[place]}, too"
            message = f"{member.image_id} more than once in {member.split or 'the file'}{where}"
            yield finding("duplicate_id", message, path=member.path, case=member.image_id)
            continue
        ids[place] = member.path
        twin = contents.setdefault((member.split, member.content), member.image_id) if member.content else ""
        if twin and twin != member.image_id:
            message = f"{member.image_id} equals {twin}"
            yield finding("duplicate_content", message, path=member.path, case=member.image_id)
