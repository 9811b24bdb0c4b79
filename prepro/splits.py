"""Which scan goes into which split, and the check that no patient is on both sides.

``clean`` (default): validation is a seeded share of the training patients, test is what the publishers hold out.
``reference``: what the published runs did, CT-RATE's validation set in both roles and CTRG cut by position
(spec pretraining 2.2); overlaps are reported there instead of refused.
Own data keep the splits of their table; what the table lacks is drawn by patient: test first, then validation.
Patient ids that differ only as spreadsheets rewrite them ("001", "1", "1.0") or in case count as one patient.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from mg3d.atomic import write_text_atomically
from mg3d.datasets.seeding import draw_patients
from mg3d.errors import DataError
from mg3d.files import id_key
from prepro.readers.base import Case, CaseList, Exclusion

SPLITS = ("train", "val", "test")
PROTOCOLS = ("clean", "reference")
VAL_FRACTIONS = {"clm_ct_rate": 0.02, "clm_chest_ctrg": 0.10}
OWN_FRACTION = 0.10
HELD_OUT = {"clm_ct_rate": "valid", "clm_chest_ctrg": "test"}
MAX_PAIR_TEXT = 200
MAX_SPELLINGS = 5
logger = logging.getLogger(__name__)


def assign_splits(
    found: CaseList, corpus: str, protocol: str = "clean", seed: int = 0, val_fraction: float | None = None
) -> tuple[list[Case], list[Exclusion]]:
    """Give every case the splits it is packed into.

    Args:
        found: the reader's cases.
        corpus: dataset key.
        protocol: ``clean`` or ``reference``.
        seed: seed of the validation draw.
        val_fraction: share of training patients drawn for validation, and in own data without splits also for test;
            None takes 2 % for CT-RATE and 10 % elsewhere.

    Returns:
        cases with ``splits`` set, in the given order, and those that belong to no split of this protocol.
    """
    fraction = VAL_FRACTIONS.get(corpus, OWN_FRACTION) if val_fraction is None else val_fraction
    one_name = _one_spelling(case.patient_id for case in found.cases)
    merged = [replace(case, patient_id=one_name[case.patient_id]) for case in found.cases]
    for first, second in spelled_twice(found.cases)[:MAX_SPELLINGS]:
        logger.warning("%s", spelling_message(first, second))
    if corpus not in HELD_OUT:
        rule = _own(merged, seed, fraction)
    elif protocol == "reference":
        rule = _ct_rate_reference if corpus == "clm_ct_rate" else _positional(found.entries)
    elif any(case.origin for case in found.cases):
        rule = _held_out(merged, HELD_OUT[corpus], seed, fraction)
    else:
        rule = _positional(found.entries)
    cases = [replace(case, splits=rule(same)) for case, same in zip(found.cases, merged, strict=True)]
    unused = [
        Exclusion(case.image_id, str(case.source[0]), f"only in list {case.origin!r}, unused by this protocol")
        for case in cases
        if not case.splits
    ]
    return [case for case in cases if case.splits], unused


def limit_splits(cases: list[Case], limit: int | None) -> list[Case]:
    """Keep the first scans of each split, for a quick trial.

    Args:
        cases: cases with splits.
        limit: scans to keep per split; None keeps all.

    Returns:
        the kept cases, each with the splits it still counts for.
    """
    if limit is None:
        return cases
    left = dict.fromkeys(SPLITS, limit)
    kept = []
    for case in cases:
        splits = tuple(split for split in case.splits if left[split] > 0)
        for split in splits:
            left[split] -= 1
        if splits:
            kept.append(replace(case, splits=splits))
    return kept


def overlaps(owners: Iterable[tuple[str, str, str]]) -> list[str]:
    """List what occurs in more than one split.

    Args:
        owners: (key, split, image id) triples; the key is a patient or a content digest.

    Returns:
        one line per key, naming every scan of it in every split.
    """
    seen: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for key, split, image_id in owners:
        seen[key][split].append(image_id)
    return [
        " and ".join(f"{', '.join(image_ids)} ({split})" for split, image_ids in sorted(places.items()))
        for _, places in sorted(seen.items())
        if len(places) > 1
    ]


def refuse_overlaps(pairs: list[str], what: str, listing: Path | None = None) -> None:
    """Stop a clean run in which splits share something.

    Args:
        pairs: from :func:`overlaps`.
        what: what is shared, for the message.
        listing: file that receives all pairs when the message cannot show them.

    Raises:
        DataError: there is at least one pair.
    """
    if not pairs:
        return
    shown = "; ".join(pair if len(pair) <= MAX_PAIR_TEXT else pair[:MAX_PAIR_TEXT] + "..." for pair in pairs[:3])
    if shown != "; ".join(pairs):
        shown += " ..."
        if listing is not None:
            listing.parent.mkdir(parents=True, exist_ok=True)
            write_text_atomically(listing, "".join(f"{pair}\n" for pair in pairs))
            shown += f"; all of them in {listing}"
    remedy = "repair the split lists, --exclude one of each, or use --split-protocol reference to pack anyway"
    raise DataError(f"{len(pairs)} {what} in more than one split: {shown}", remedy)


def patient_overlaps(cases: Iterable[Case]) -> list[str]:
    """List patients whose scans are in more than one split.

    Args:
        cases: cases with splits.

    Returns:
        one line per patient.
    """
    return overlaps((id_key(case.patient_id), split, case.image_id) for case in cases for split in case.splits)


def _one_spelling(patients: Iterable[str]) -> dict[str, str]:
    """Patient id -> the id that stands for all its spellings; itself, where there is one."""
    groups: dict[str, set[str]] = defaultdict(set)
    for patient in patients:
        groups[id_key(patient)].add(patient)
    return {patient: min(group) for group in groups.values() for patient in group}


def spelled_twice(cases: Iterable[Case]) -> list[tuple[Case, Case]]:
    """List patient ids that look like another one, written differently.

    Args:
        cases: of one data set.

    Returns:
        the first case of each further spelling, behind the first case of that patient.
    """
    first: dict[str, Case] = {}
    seen: dict[str, Case] = {}
    pairs = []
    for case in cases:
        known = first.setdefault(id_key(case.patient_id), case)
        if case.patient_id not in seen and known is not case:
            pairs.append((known, case))
        seen.setdefault(case.patient_id, case)
    return pairs


def spelling_message(first: Case, second: Case) -> str:
    """Say that two ids count as one patient, naming a scan (and in own data the row) of each."""
    one, other = (f"{case.patient_id!r} ({case.image_id}, entry {case.position})" for case in (first, second))
    return f"patients {one} and {other} differ in spelling only: they count as one patient for the splits"


Rule = Callable[[Case], tuple[str, ...]]


def _ct_rate_reference(case: Case) -> tuple[str, ...]:
    return ("train",) if case.origin == "train" else ("val", "test")


def _held_out(cases: list[Case], held_out: str, seed: int, fraction: float) -> Rule:
    drawn = draw_patients((case.patient_id for case in cases if case.origin == "train"), fraction, seed)

    def rule(case: Case) -> tuple[str, ...]:
        if case.origin == held_out:
            return ("test",)
        if case.origin != "train":
            return ()
        return ("val",) if case.patient_id in drawn else ("train",)

    return rule


def _own(cases: list[Case], seed: int, fraction: float) -> Rule:
    given = {case.origin for case in cases}
    patients = {case.patient_id for case in cases if case.origin in ("", "train")}
    test = draw_patients(patients, fraction, seed) if given == {""} else set()
    val = draw_patients(patients - test, fraction, seed) if "val" not in given else set()

    def rule(case: Case) -> tuple[str, ...]:
        if case.origin in ("val", "test"):
            return (case.origin,)
        if case.patient_id in test:
            return ("test",)
        return ("val",) if case.patient_id in val else ("train",)

    return rule


def positional_split(position: int, entries: int) -> str:
    """Published CTRG rule: the split of the entry at a 0-based position among ``entries`` (spec pretraining 2.2)."""
    if position <= int(0.8 * entries):
        return "train"
    return "test" if position <= int(0.9 * entries) else "val"


def _positional(entries: int) -> Rule:
    return lambda case: (positional_split(case.position, entries),)
