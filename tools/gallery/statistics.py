"""Counts over every study of a data set, gathered in one pass over text and geometry without touching voxels."""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import numpy as np

from mg3d.datasets.labels import UNKNOWN_LABEL
from prepro.text import split_sentences
from prepro.tokens import TokenCounter, WordCounter
from tools.gallery.items import MAX_LISTED_IDS, Problem, Study, Voxels

TOKEN_LIMIT: Final = 250
HU_EDGES: Final = np.arange(-1010.0, 1011.0, 20.0)
GREY_EDGES: Final = np.arange(-0.5, 256.0, 4.0)
MAX_LISTED_GROUPS: Final = 10
_SPLIT_ORDER: Final = ("train", "val", "valid", "test")


class SplitCount(NamedTuple):
    """Studies and patients of one split."""

    split: str
    studies: int
    patients: int
    empty: int


class LabelCount(NamedTuple):
    """How often a label is present, absent and unknown."""

    name: str
    present: int
    absent: int
    unknown: int


@dataclass(frozen=True)
class VoxelSummary:
    """Intensities of one volume.

    Attributes:
        unit: HU or grey.
        low: smallest value.
        high: largest value.
        mean: mean value.
        percentiles: 1, 50 and 99 per cent.
        counts: voxels per bin of :func:`edges`; values outside fall into the first and last bin.
    """

    unit: str
    low: int
    high: int
    mean: float
    percentiles: tuple[float, float, float]
    counts: np.ndarray


@dataclass
class CorpusStatistics:
    """Everything counted for one corpus.

    Attributes:
        tokens: tokens per report (or their lower bound), [CLS] and [SEP] included -> studies.
        sentences: sentences per report -> studies.
        sentence_words: words per sentence -> sentences.
        fragments: stored fragments per report -> studies.
        spacing: per axis (z, y, x): mm -> studies.
        sizes: per axis (D, H, W): voxels -> studies.
        empty: ids of studies without any text.
        without: studies that lack findings, and those that lack an impression.
        volumes: intensities of the studies that were drawn.
    """

    tokens: Counter[int] = field(default_factory=Counter)
    sentences: Counter[int] = field(default_factory=Counter)
    sentence_words: Counter[int] = field(default_factory=Counter)
    fragments: Counter[int] = field(default_factory=Counter)
    spacing: tuple[Counter[float], ...] = field(default_factory=lambda: tuple(Counter() for _ in range(3)))
    sizes: tuple[Counter[int], ...] = field(default_factory=lambda: tuple(Counter() for _ in range(3)))
    empty: list[str] = field(default_factory=list)
    without: Counter[str] = field(default_factory=Counter)
    volumes: list[VoxelSummary] = field(default_factory=list)
    _labels: dict[str, Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    _patients: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    _splits: Counter[str] = field(default_factory=Counter)
    _empty_by_split: Counter[str] = field(default_factory=Counter)

    @property
    def studies(self) -> int:
        """Number of studies."""
        return sum(self._splits.values())

    @property
    def patients(self) -> int:
        """Number of patients over all splits."""
        return len(set().union(*self._patients.values())) if self._patients else 0

    def splits(self) -> list[SplitCount]:
        """One entry per split, training first."""
        order = sorted(self._splits, key=lambda name: (_SPLIT_ORDER.index(name) if name in _SPLIT_ORDER else 9, name))
        return [
            SplitCount(name, self._splits[name], len(self._patients[name]), self._empty_by_split[name])
            for name in order
        ]

    def labels(self) -> list[LabelCount]:
        """One entry per label, in stored order."""
        return [LabelCount(name, seen[1], seen[0], seen[UNKNOWN_LABEL]) for name, seen in self._labels.items()]

    def shared_patients(self) -> int:
        """Patients that occur in more than one split."""
        return sum(len(group) for group in self._patients.values()) - self.patients

    def add(self, study: Study, counter: TokenCounter) -> None:
        """Count one study."""
        self._splits[study.split] += 1
        self._patients[study.split].add(_digest(study.patient_id))
        self._add_text(study, counter)
        for name, value in zip(study.label_names, study.labels, strict=True):
            self._labels[name][value] += 1
        self.add_geometry(study.shape, study.spacing_mm)

    def add_geometry(self, shape: Sequence[int] | None, spacing_mm: Sequence[float] | None) -> None:
        """Count the grid of one study, when it is known."""
        for counter, size in zip(self.sizes, shape or (), strict=False):
            counter[int(size)] += 1
        for steps, step in zip(self.spacing, spacing_mm or (), strict=False):
            steps[round(float(step), 3)] += 1

    def _add_text(self, study: Study, counter: TokenCounter) -> None:
        text = f"{study.findings} {study.impression}".strip()
        fragments = (*study.findings_sen, *study.impression_sen)
        self.tokens[counter.count(fragments)[0]] += 1
        self.fragments[len(fragments)] += 1
        self.without["findings"] += not study.findings.strip()
        self.without["impression"] += not study.impression.strip()
        if not text:
            self._empty_by_split[study.split] += 1
            self.empty.append(study.image_id)
        sentences = [*split_sentences(study.findings), *split_sentences(study.impression)]
        self.sentences[len(sentences)] += 1
        self.sentence_words.update(len(sentence.split()) for sentence in sentences)

    def intensities(self) -> np.ndarray:
        """Mean over the drawn volumes of the share of voxels per bin, in per cent."""
        same = [volume.counts for volume in self.volumes if volume.unit == self.volumes[0].unit]
        return np.mean([100.0 * counts / counts.sum() for counts in same], axis=0)


@dataclass
class DatasetStatistics:
    """All corpora, and what only shows over the whole data set.

    Attributes:
        counter: counts the tokens of a report.
        corpora: key to its counts.
        problems: rows and files that cannot be read.
    """

    counter: TokenCounter = field(default_factory=WordCounter)
    corpora: dict[str, CorpusStatistics] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    _texts: dict[int, list[Any]] = field(default_factory=dict)
    _volumes: dict[int, list[Any]] = field(default_factory=dict)
    _ids: dict[int, list[Any]] = field(default_factory=dict)

    @property
    def studies(self) -> int:
        """Number of readable studies."""
        return sum(part.studies for part in self.corpora.values())

    def add(self, entry: Study | Problem) -> None:
        """Count one study, or note a row that cannot be read."""
        if isinstance(entry, Problem):
            self.problems.append(entry)
            return
        self.corpora.setdefault(entry.corpus, CorpusStatistics()).add(entry, self.counter)
        text = f"{entry.findings}\n{entry.impression}"
        if text.strip():
            _group(self._texts, text, entry.image_id)
        if entry.content:
            _group(self._volumes, entry.content, entry.image_id)
        _group(self._ids, f"{entry.corpus} {entry.image_id}", entry.image_id)

    def same_report(self) -> Duplicates:
        """Studies whose findings and impression are equal, word for word."""
        return Duplicates.of(self._texts.values())

    def same_volume(self) -> Duplicates:
        """Studies with equal voxels (equal checksum and shape); nothing for raw trees, whose voxels stay unread."""
        return Duplicates.of(self._volumes.values())

    def same_id(self) -> Duplicates:
        """Ids that occur more than once in a corpus."""
        return Duplicates.of(self._ids.values())


@dataclass(frozen=True)
class Duplicates:
    """Groups of equal things.

    Attributes:
        studies: studies that have a twin.
        groups: number of groups.
        examples: size and first ids of the largest groups.
    """

    studies: int
    groups: int
    examples: tuple[tuple[int, tuple[str, ...]], ...]

    @classmethod
    def of(cls, entries: Iterable[list[Any]]) -> Duplicates:
        """Keep the groups of more than one."""
        groups = sorted((entry for entry in entries if entry[0] > 1), key=lambda entry: -entry[0])
        examples = tuple((entry[0], tuple(entry[1:])) for entry in groups[:MAX_LISTED_GROUPS])
        return cls(sum(entry[0] for entry in groups), len(groups), examples)


def edges(unit: str) -> np.ndarray:
    """Limits of the histogram bins: 20 HU wide around -1000 to 1000, or 4 grey levels."""
    return GREY_EDGES if unit == "grey" else HU_EDGES


def summarise(voxels: Voxels) -> VoxelSummary:
    """Count the intensities of a volume."""
    offset = 32768 if voxels.unit == "HU" else 0
    seen = np.bincount((voxels.array.astype(np.int32) + offset).ravel())
    values = np.flatnonzero(seen) - offset
    weights = seen[values + offset]
    limits = edges(voxels.unit)
    counts, _ = np.histogram(np.clip(values, limits[0], limits[-1]), bins=limits, weights=weights)
    order = np.cumsum(weights) / weights.sum()
    low, middle, high = (float(values[np.searchsorted(order, share)]) for share in (0.01, 0.5, 0.99))
    mean = float((values * weights).sum() / weights.sum())
    return VoxelSummary(voxels.unit, int(values[0]), int(values[-1]), mean, (low, middle, high), counts)


class Binned(NamedTuple):
    """A histogram: limits of the bins, how many in each, and whether the values are whole numbers."""

    edges: list[float]
    counts: list[int]
    whole: bool


def bin_values(seen: Counter[Any], most: int = 30) -> Binned:
    """Bin counted values into at most about ``most`` bins of a round width; whole numbers lie inside their bins."""
    low, high = min(seen), max(seen)
    whole = all(float(value).is_integer() for value in seen)
    width = _round_width((high - low) / most if high > low else 1.0, whole)
    first = math.floor(low / width) * width
    bins = math.floor((high - first) / width + 1e-9) + 1
    counts = [0] * bins
    for value, number in seen.items():
        counts[min(int((value - first) / width + 1e-9), bins - 1)] += number
    shift = 0.5 if whole else 0.0
    return Binned([first + width * number - shift for number in range(bins + 1)], counts, whole)


def _round_width(width: float, whole: bool) -> float:
    if whole and width <= 1:
        return 1.0
    power = 10.0 ** math.floor(math.log10(width))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= width * (1 - 1e-9))


def median(seen: Counter[Any]) -> float:
    """Middle of counted values (the lower one of two)."""
    half, passed = sum(seen.values()) / 2, 0
    for value in sorted(seen):
        passed += seen[value]
        if passed >= half:
            return float(value)
    return math.nan


def share_above(seen: Counter[int], limit: int) -> float:
    """Share of counted values above ``limit``."""
    total = sum(seen.values())
    return sum(number for value, number in seen.items() if value > limit) / total if total else 0.0


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "big")


def _group(groups: dict[int, list[Any]], text: str, image_id: str) -> None:
    entry = groups.setdefault(_digest(text), [0])
    entry[0] += 1
    if len(entry) <= MAX_LISTED_IDS:
        entry.append(image_id)
