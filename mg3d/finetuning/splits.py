"""Splits of a benchmark's cases: folds of whole patients, blocks of names, shares of the training patients.

Everything is decided by the names and a seed, so that two machines get the same parts.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar

from mg3d.errors import ConfigError, DataError
from mg3d.files import id_key
from mg3d.finetuning.benchmark import Case, Splits

if TYPE_CHECKING:
    from mg3d.finetuning.config import FinetuneConfig

__all__ = [
    "case_digests",
    "contiguous_blocks",
    "data_fraction",
    "leakage_report",
    "nested_splits",
    "patient_kfold",
    "permuted_images",
    "permuted_labels",
    "refuse_leakage",
]

Item = TypeVar("Item", str, Case)
PARTS = ("train", "val", "test")


def contiguous_blocks(items: Sequence[Item], k: int) -> list[tuple[Item, ...]]:
    """Sort by name and cut into ``k`` contiguous blocks, the first ``n mod k`` of them one longer (downstream 2 and 3).

    Args:
        items: names, or cases (by their id).
        k: number of blocks.

    Raises:
        DataError: fewer items than blocks.
    """
    _check_count(len(items), k, "cases")
    ordered = sorted(items, key=lambda item: item if isinstance(item, str) else item.id)
    short, longer = divmod(len(ordered), k)
    ends = [block * short + min(block, longer) for block in range(k + 1)]
    return [tuple(ordered[start:end]) for start, end in itertools.pairwise(ends)]


def patient_kfold(cases: Sequence[Case], k: int, seed: int = 0, stratify: bool = True) -> list[tuple[Case, ...]]:
    """Deal whole patients into ``k`` folds, each stratum evenly; every case is in exactly one fold.

    Args:
        cases: the cases; a patient belongs to the strata of all of its cases together.
        k: number of folds.
        seed: another seed deals differently.
        stratify: keep the strata in proportion.

    Returns:
        k tuples of cases, sorted by id; their numbers of patients differ by one at most.

    Raises:
        DataError: fewer patients than folds.
    """
    groups = _patients(cases)
    _check_count(len(groups), k, "patients")
    dealt = [patient for stratum in _shuffled_strata(groups, seed, stratify) for patient in stratum]
    fold_of = {patient: place % k for place, patient in enumerate(dealt)}
    return [tuple(case for case in _by_id(cases) if fold_of[case.patient] == fold) for fold in range(k)]


def nested_splits(folds: Sequence[Sequence[Case]], cfg: FinetuneConfig) -> Splits:
    """The parts of a fold.

    ``clean``: fold ``cfg.fold`` is reported, the next one selects, the others train. ``reference``: fold ``cfg.fold``
    selects and is reported, all others train, as published.

    Raises:
        ConfigError: too few folds for three parts.
    """
    held = cfg.fold % len(folds)
    if cfg.protocol == "reference":
        train = tuple(case for index, fold in enumerate(folds) if index != held for case in fold)
        return Splits(train, tuple(folds[held]), tuple(folds[held]), ("selection = reporting",))
    if len(folds) < 3:
        raise ConfigError(
            f"num_folds={len(folds)}: one fold is reported, one selects, none is left to train on",
            "write num_folds=3 or more",
        )
    selecting = (held + 1) % len(folds)
    train = tuple(case for index, fold in enumerate(folds) if index not in (held, selecting) for case in fold)
    return Splits(train, tuple(folds[selecting]), tuple(folds[held]))


def case_digests(splits: Splits) -> dict[str, str]:
    """Part of the benchmark -> digest of its cases: their names, patients, targets, and the size of their files."""

    def about(case: Case) -> str:
        files = (path for path in (case.image, case.label) if path is not None and path.is_file())
        return repr((case.id, case.patient, case.targets, [path.stat().st_size for path in files]))

    named = {"training cases": splits.train, "validation cases": splits.val}
    return {name: hashlib.sha256("\n".join(map(about, cases)).encode()).hexdigest() for name, cases in named.items()}


def data_fraction(cases: Sequence[Case], fraction: float, seed: int = 0) -> tuple[Case, ...]:
    """A share of the patients of every stratum, at least one; a smaller share is part of a larger one.

    Args:
        cases: training cases.
        fraction: share of the patients, above 0 and at most 1.
        seed: another seed chooses others.
    """
    if fraction >= 1.0:
        return tuple(cases)
    groups = _patients(cases)
    kept: set[str] = set()
    for stratum in _shuffled_strata(groups, seed, stratify=True):
        kept |= set(stratum[: max(1, round(fraction * len(stratum)))])
    return tuple(case for case in cases if case.patient in kept)


def permuted_labels(cases: Sequence[Case], seed: int = 0) -> tuple[Case, ...]:
    """The control of a classification: the targets of the patients change hands, so that nothing can be learned.

    Where the cases of a patient have different targets, those of the cases do.

    Raises:
        ConfigError: the cases have no targets.
    """
    if not all(case.targets for case in cases):
        raise ConfigError("shuffle_labels=True: these cases have no targets to shuffle", "leave shuffle_labels out")
    groups = _patients(cases)
    if any(len({case.targets for case in group}) > 1 for group in groups.values()):  # candidates of one scan
        targets = [case.targets for case in cases]
        random.Random(f"labels {seed}").shuffle(targets)
        return tuple(dataclasses.replace(case, targets=own) for case, own in zip(cases, targets, strict=True))
    givers = list(groups)
    random.Random(f"labels {seed}").shuffle(givers)
    source = dict(zip(groups, givers, strict=True))
    return tuple(dataclasses.replace(case, targets=groups[source[case.patient]][0].targets) for case in cases)


def permuted_images(cases: Sequence[Case], seed: int = 0) -> tuple[Case, ...]:
    """The control of report generation: every report and its labels go with the image of another case.

    Args:
        cases: training cases.
        seed: another seed deals other images.
    """
    order = list(range(len(cases)))
    random.Random(f"images {seed}").shuffle(order)
    following = dict(zip(order, order[1:] + order[:1], strict=True))  # one cycle: nobody keeps his own
    return tuple(dataclasses.replace(case, image=cases[following[k]].image) for k, case in enumerate(cases))


def leakage_report(splits: Splits) -> tuple[str, ...]:
    """What parts share: one line for each pair of parts with common patients or cases; empty when none has.

    Ids that differ only as spreadsheets rewrite them ("001", "1") are one patient.
    """
    lines = []
    for first, second in (("train", "val"), ("train", "test"), ("val", "test")):
        mine, theirs = getattr(splits, first), getattr(splits, second)
        people = {id_key(case.patient) for case in mine} & {id_key(case.patient) for case in theirs}
        if not people:
            continue
        if {case.id for case in mine} == {case.id for case in theirs}:
            lines.append("selection = reporting" if first == "val" else f"leak: {first} = {second}")
            continue
        count = sum(id_key(case.patient) in people for case in theirs)
        total = len({id_key(case.patient) for case in theirs})
        lines.append(
            f"leak: {count} of {len(theirs)} {second} cases are of patients in {first} ({len(people)} of {total})"
        )
    return tuple(lines)


def refuse_leakage(splits: Splits, protocol: str) -> tuple[str, ...]:
    """Notes on what the parts share; with ``protocol=clean`` a shared patient is an error.

    Raises:
        DataError: the same id twice in a part, or, in ``clean``, parts that share patients.
    """
    for part in PARTS:
        counts = Counter(case.id for case in getattr(splits, part))
        twice = sorted(name for name, count in counts.items() if count > 1)
        if twice:
            raise DataError(f"{len(twice)} ids occur twice in {part}, first {twice[0]}", "ids must tell cases apart")
    found = leakage_report(splits)
    if found and protocol == "clean":
        raise DataError(f"the parts of the split are not apart: {'; '.join(found)}", "mend the split")
    return tuple(line for line in found if line not in splits.notes)


def _check_count(count: int, k: int, what: str) -> None:
    if count < k:
        raise DataError(f"{count} {what} cannot be cut into {k} folds", f"write num_folds={max(count, 2)} or fewer")


def _by_id(cases: Iterable[Case]) -> list[Case]:
    return sorted(cases, key=lambda case: case.id)


def _patients(cases: Iterable[Case]) -> dict[str, list[Case]]:
    """Patient -> cases, both sorted."""
    groups: dict[str, list[Case]] = {}
    for case in sorted(cases, key=lambda case: (case.patient, case.id)):
        groups.setdefault(case.patient, []).append(case)
    return groups


def _shuffled_strata(groups: dict[str, list[Case]], seed: int, stratify: bool) -> list[list[str]]:
    """Patients by stratum, each stratum in a seeded order of its own."""
    strata: dict[str, list[str]] = {}
    for patient, cases in groups.items():
        name = "|".join(sorted({case.stratum for case in cases})) if stratify else ""
        strata.setdefault(name, []).append(patient)
    for name in sorted(strata):
        random.Random(f"{name} {seed}").shuffle(strata[name])
    return [strata[name] for name in sorted(strata)]
