"""What every reader gives to the packer: a list of cases, cheap to make, and the voxels of one case on demand."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True)
class Case:
    """One scan with its report, before any voxel is read.

    Attributes:
        image_id: unique name of the scan in its corpus.
        patient_id: what keeps one patient in one split.
        origin: the split the publishers put it in (train, valid, val, test); "" when nobody did.
        source: one volume file, or the slice files in order.
        findings: cleaned findings text, may be empty.
        impression: cleaned impression text, may be empty.
        labels: 0 / 1 / -1 per label name; empty when the corpus has none.
        rescale: slope and intercept of the metadata table, None without a row.
        table_spacing_mm: (z, y, x) of the metadata table, NaN where the row is silent; None without one.
        table_shape: voxels (z, y, x) by the metadata table, None where it does not count them.
        position: 0-based place in the annotation file, for positional splits; row number of an own table.
        splits: the splits it is packed into; set by :mod:`prepro.splits`.
    """

    image_id: str
    patient_id: str
    origin: str
    source: tuple[Path, ...]
    findings: str
    impression: str
    labels: tuple[int, ...] = ()
    rescale: tuple[float, float] | None = None
    table_spacing_mm: tuple[float, float, float] | None = None
    table_shape: tuple[int, int, int] | None = None
    position: int = 0
    splits: tuple[str, ...] = ()


@dataclass(frozen=True)
class Exclusion:
    """A scan that is left out, and why."""

    image_id: str
    path: str
    reason: str


@dataclass
class CaseList:
    """Everything a reader found.

    Attributes:
        cases: usable scans in a fixed order.
        exclusions: scans left out before reading voxels.
        entries: number of entries of the annotation file, usable or not.
        notes: counts worth knowing, for the manifest.
    """

    cases: list[Case] = field(default_factory=list)
    exclusions: list[Exclusion] = field(default_factory=list)
    entries: int = 0
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PackedImage:
    """One scan on the final grid.

    Attributes:
        voxels: [D,H,W] int16 HU or uint8 grey, canonical order.
        spacing_mm: (z, y, x) of this grid.
        record: what was decided on the way (rescale, tilt, filled voxels), for the manifest.
        warnings: oddities a person should look at.
    """

    voxels: np.ndarray
    spacing_mm: tuple[float, float, float]
    record: dict[str, Any]
    warnings: tuple[str, ...] = ()


class Reader(Protocol):
    """A data set in its published layout; picklable, so that workers can load."""

    @property
    def corpus(self) -> str:
        """Dataset key: first part of the file names."""

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names of the labels, in the order of the rows' labels."""

    @property
    def window(self) -> str:
        """Intensity window of the voxels, as in the schema metadata."""

    def find_cases(self) -> CaseList:
        """List the scans with their reports, in a fixed order, without reading voxels."""

    def load(self, case: Case) -> PackedImage:
        """Read one scan and bring it onto the final grid.

        Raises:
            DataError: the scan cannot be used.
        """
