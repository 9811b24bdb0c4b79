"""Run the adapter of every entry and say what came of it."""

from __future__ import annotations

import importlib
import math
import traceback
from dataclasses import dataclass
from pathlib import Path

from tools.golden.adapters import FAMILIES
from tools.golden.bundle import Bundle
from tools.golden.index import Entry, GoldenError, load_directory

PASSIVE_ROLES = ("state", "input")
"""Roles of entries that hold nothing to compare: another entry has to consume them."""

NOT_CONSUMED = "no partner entry consumes it"


@dataclass(frozen=True)
class Outcome:
    """Result of one entry.

    Attributes:
        name: entry name.
        compared: number of values compared.
        uncompared: names never read or compared.
        worst: largest error over allowed; infinity for another shape or a non-finite value.
        problem: what went wrong, empty when the entry passed.
    """

    name: str
    compared: int
    uncompared: list[str]
    worst: float
    problem: str

    @property
    def passed(self) -> bool:
        """Whether everything was compared and within tolerance."""
        return not self.problem

    def line(self) -> str:
        """The line printed for the entry."""
        word = "PASS" if self.passed else "FAIL"
        text = f"{self.name:40s} {word}  compared {self.compared:4d}  not compared {len(self.uncompared):3d}"
        return f"{text}  worst error/allowed {self.worst:.3g}" + (f"  {self.problem}" if self.problem else "")


def _failed(entry: Entry, problem: str) -> Outcome:
    return Outcome(entry.name, 0, entry.value_names(), math.inf, problem)


def _judge(entry: Entry, bundle: Bundle) -> Outcome:
    compared, untouched, worst = bundle.outcome(entry)
    others = [partner for partner in bundle.entries if partner is not entry]
    if untouched:
        problem = f"never read: {', '.join(untouched[:3])}"
    elif not worst <= 1.0:
        tally = bundle.tallies[entry.name].compared
        problem = f"differs: {max(tally, key=lambda name: tally[name])}"
    elif compared == 0 and not any(bundle.outcome(partner)[0] for partner in others):
        problem = NOT_CONSUMED
    else:
        problem = ""
    return Outcome(entry.name, compared, untouched, worst, problem)


def run_group(family: str, entries: list[Entry]) -> Bundle:
    """Run one family's adapter on the entries of one run.

    Args:
        family: name the adapter is chosen by.
        entries: the entry and its partners.

    Raises:
        GoldenError: if no adapter serves the family.
    """
    if family not in FAMILIES:
        raise GoldenError(f"unknown family {family!r}")
    bundle = Bundle(entries)
    module, _, function = FAMILIES[family].partition(":")
    getattr(importlib.import_module(f"tools.golden.adapters.{module}"), function)(bundle)
    return bundle


def _group(entry: Entry, entries: list[Entry]) -> list[Entry]:
    """The entry and its partners; a state or input that names none belongs to the run of the entry that uses it."""
    by_name = {member.name: member for member in entries}
    if not entry.uses and entry.role in PASSIVE_ROLES:
        entry = next((user for user in entries if entry.name in user.uses and user.family == entry.family), entry)
    return [entry, *(by_name[name] for name in entry.uses if name in by_name and name != entry.name)]


def _run_safely(family: str, group: list[Entry], details: bool) -> Bundle | str:
    """The finished run, or what stopped it."""
    try:
        return run_group(family, group)
    except Exception as error:  # one broken adapter or entry must not hide the others
        if details:
            traceback.print_exc()
        return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def check_directory(directory: Path, *, details: bool = False) -> list[Outcome]:
    """Check every entry of a directory.

    Args:
        directory: folder with ``index.json``.
        details: print the traceback of an adapter that raised.

    Returns:
        One outcome per entry, in file order.

    Raises:
        GoldenError: if the index itself cannot be used.
    """
    entries, broken = load_directory(directory)
    finished: dict[frozenset[str], Bundle | str] = {}
    outcomes = []
    for entry in entries:
        group = _group(entry, entries)
        bad = next((broken[member.name] for member in group if member.name in broken), None)
        if bad is None and entry.role in PASSIVE_ROLES and len(group) == 1:
            bad = NOT_CONSUMED
        if bad is not None:
            outcomes.append(_failed(entry, bad))
            continue
        key = frozenset(member.name for member in group) | {f"family {entry.family}"}
        if key not in finished:
            finished[key] = _run_safely(entry.family, group, details)
        result = finished[key]
        outcomes.append(_failed(entry, result) if isinstance(result, str) else _judge(entry, result))
    return outcomes
