"""What the gallery shows: studies with their text, voxels on demand, and where both come from."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from mg3d.datasets.volume import WINDOW_HU
from mg3d.errors import DataError

MAX_LISTED_IDS = 3


@dataclass(frozen=True)
class Study:
    """Everything about one study but its voxels.

    Attributes:
        number: place in the whole data set, from 0.
        image_id: name of the scan.
        patient_id: identifier of the patient.
        corpus: data-set key.
        split: train, val, test, or what the publishers call it.
        findings: findings text, may be empty.
        impression: impression text, may be empty.
        findings_sen: stored comma fragments of the findings.
        impression_sen: stored comma fragments of the impression.
        labels: 0 / 1 / -1 per label name; empty without labels.
        label_names: names of the labels.
        shape: stored voxels (D, H, W), None before the voxels are read.
        spacing_mm: (z, y, x) of the stored grid, None before the voxels are read.
        content: fingerprint of the voxels where one is stored.
        place: file and row, or file, for messages.
    """

    number: int
    image_id: str
    patient_id: str
    corpus: str
    split: str
    findings: str
    impression: str
    findings_sen: tuple[str, ...] = ()
    impression_sen: tuple[str, ...] = ()
    labels: tuple[int, ...] = ()
    label_names: tuple[str, ...] = ()
    shape: tuple[int, int, int] | None = None
    spacing_mm: tuple[float, float, float] | None = None
    content: str = ""
    place: str = ""


@dataclass(frozen=True)
class Voxels:
    """The volume of one study.

    Attributes:
        array: ``[D, H, W]`` int16 HU or uint8 grey, canonical order.
        spacing_mm: (z, y, x).
        facts: what else is known of the file, name to value.
        warnings: oddities a person should look at.
        checked: what was verified while reading.
        assumed_spacing: the millimetres are a convention, not a measurement.
        window_hu: HU values were clipped to when the volume was packed.
    """

    array: np.ndarray
    spacing_mm: tuple[float, float, float]
    facts: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    checked: str = ""
    assumed_spacing: bool = False
    window_hu: tuple[int, int] = WINDOW_HU

    @property
    def unit(self) -> str:
        """``HU``, or ``grey`` for 8-bit volumes."""
        return "grey" if self.array.dtype == np.uint8 else "HU"


@dataclass(frozen=True)
class Problem:
    """Something of the data set that cannot be used, and why."""

    where: str
    reason: str


class Ticket(NamedTuple):
    """The little that is kept of every study to draw a sample from."""

    number: int
    image_id: str
    corpus: str
    split: str


class Source(Protocol):
    """A data set."""

    kind: str

    def __len__(self) -> int:
        """Number of studies."""

    def scan(self) -> Iterator[Study | Problem]:
        """Yield every study in order, without touching voxels, and the rows that cannot be read."""

    def study(self, number: int) -> Study:
        """Return one study again.

        Raises:
            DataError: its row is damaged.
        """

    def voxels(self, study: Study) -> Voxels:
        """Read the volume of a study and verify what can be verified.

        Raises:
            DataError: it cannot be read.
        """

    def manifests(self) -> list[dict[str, Any]]:
        """Return what the packing wrote beside the files, or what the reader found out about a raw tree."""


def choose(tickets: Sequence[Ticket], limit: int, seed: int, ids: Sequence[str] = ()) -> list[Ticket]:
    """Choose the studies to draw: the named ones, or a seeded sample with every corpus and split in it.

    Args:
        tickets: all studies, in order.
        limit: how many at most, 0 for all.
        seed: seed of the draw.
        ids: image ids; the limit does not apply to them.

    Returns:
        the chosen studies in the order of the data set.

    Raises:
        DataError: an id is not in the data set.
    """
    if ids:
        wanted = set(ids)
        missing = [name for name in ids if name not in {ticket.image_id for ticket in tickets}]
        if missing:
            near = ", ".join(ticket.image_id for ticket in tickets[:MAX_LISTED_IDS])
            raise DataError(f"no study named {missing[0]!r}", f"ids look like {near}")
        return [ticket for ticket in tickets if ticket.image_id in wanted]
    if not limit or limit >= len(tickets):
        return list(tickets)
    groups: dict[tuple[str, str], list[Ticket]] = defaultdict(list)
    for ticket in tickets:
        groups[ticket.corpus, ticket.split].append(ticket)
    draw = random.Random(seed)
    queues = [draw.sample(group, len(group)) for group in groups.values()]
    shares = _shares([len(queue) for queue in queues], limit)
    chosen = [ticket for queue, share in zip(queues, shares, strict=True) for ticket in queue[:share]]
    return sorted(chosen)


def _shares(sizes: Sequence[int], limit: int) -> list[int]:
    """Split ``limit`` over groups: proportional to the square root of the size, at least one each while they last."""
    shares = [0] * len(sizes)
    for _ in range(limit):
        open_groups = [group for group, size in enumerate(sizes) if shares[group] < size]
        shares[min(open_groups, key=lambda group: (shares[group] / sizes[group] ** 0.5, -sizes[group]))] += 1
    return shares
