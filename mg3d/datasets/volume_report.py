"""One sample of a volume-report corpus (CT-RATE, CTRG): an Arrow row turned into arrays and tokens.

D, H, W volume axes; L text tokens; K false images.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import torch

from mg3d.datasets.arrow_schema import parse_window
from mg3d.datasets.arrow_table import ArrowTable, row_text
from mg3d.datasets.labels import CT_RATE_LABELS, UNKNOWN_LABEL
from mg3d.datasets.published_pixels import decode_slices, load_npz
from mg3d.datasets.report_text import FragmentSeparator, ReportEncoding, clean_text, encode_report
from mg3d.datasets.seeding import sample_generator, sample_seed
from mg3d.datasets.transforms import VolumeTransform, create_transform
from mg3d.datasets.volume import PRETRAIN_SIZE_DHW, WINDOW_HU, centre_crop, to_unit_range
from mg3d.errors import DataError

BadSamplePolicy = Literal["raise", "skip"]
MAX_REPLACEMENTS: Final = 16


class SampleIndex(NamedTuple):
    """What the sampler asks for: a dataset row in an epoch."""

    row: int
    epoch: int = 0


class BadSample(NamedTuple):
    """Marker of a row that could not be read and was replaced.

    Args:
        row: the row asked for (in the concatenated dataset).
        reason: the message of the error.
    """

    row: int
    reason: str


@dataclass(frozen=True)
class VolumeReportSample:
    """One study.

    Args:
        image: float32 ``[D, 1, H, W]`` in [0, 1].
        report: token view of the text.
        labels: int8 ``[18]``, -1 unknown.
        index: row in the (concatenated) dataset; the one asked for, unless it was replaced.
        image_id: name of the scan.
        patient_id: identifier of the patient.
        corpus: dataset key.
        mlm_seed: seed of the word masking.
        cell_seed: seed of the masked-image cells.
        report_key: number of the whole report's text, the same wherever the text is the same.
        false_image: float32 ``[K, D, 1, H, W]`` of other studies, when asked for.
        bad: rows that were tried before this one and could not be read.
    """

    image: torch.Tensor
    report: ReportEncoding
    labels: torch.Tensor
    index: int
    image_id: str
    patient_id: str
    corpus: str
    mlm_seed: int
    cell_seed: int
    report_key: int = 0
    false_image: torch.Tensor | None = None
    bad: tuple[BadSample, ...] = field(default_factory=tuple)


class VolumeReportDataset(torch.utils.data.Dataset):
    """Studies of one corpus; every random choice depends on (seed, epoch, row) alone.

    Args:
        table: the packed rows.
        corpus: dataset key, for example ``clm_ct_rate``.
        tokenizer: a transformers fast tokenizer.
        size_dhw: size of the model's input (D, H, W).
        max_text_len: L.
        seed: seed of the run.
        sent_level: draw one sentence of each fragment.
        fragment_separator: see :func:`~mg3d.datasets.report_text.encode_report`.
        transform_keys: one key of :data:`~mg3d.datasets.transforms.TRANSFORMS`.
        draw_false_image: K, number of other studies whose volume comes along.
        image_only: leave the text out.
        image_root: folder of the ``.npz`` files that published path-only rows name.
        on_bad_sample: ``raise``, or ``skip``: take another row, chosen by (seed, row), and report the bad one.
        first_row: row of this corpus' first study in a concatenation; enters the seeds.
        fixed_draws: repeat the draws of the first epoch (masks, crops, sentences) in every epoch.

    Raises:
        ValueError: an option is unknown or out of range.
        DataError: fewer rows than false images need.
    """

    def __init__(
        self,
        table: ArrowTable,
        *,
        corpus: str,
        tokenizer: Any,
        size_dhw: Sequence[int] = PRETRAIN_SIZE_DHW,
        max_text_len: int = 250,
        seed: int = 0,
        sent_level: bool = True,
        fragment_separator: FragmentSeparator = "blank",
        transform_keys: Sequence[str] = ("clip",),
        draw_false_image: int = 0,
        image_only: bool = False,
        image_root: str | Path = "",
        on_bad_sample: BadSamplePolicy = "raise",
        first_row: int = 0,
        fixed_draws: bool = False,
    ) -> None:
        if on_bad_sample not in ("raise", "skip"):
            raise ValueError(f"on_bad_sample must be 'raise' or 'skip', got {on_bad_sample!r}")
        if draw_false_image < 0 or draw_false_image >= max(len(table), 1):
            raise DataError(
                f"{len(table)} rows of {corpus} cannot give {draw_false_image} other volumes", "lower draw_false_image"
            )
        self.table = table
        self.corpus = corpus
        self.tokenizer = tokenizer
        self.size_dhw = tuple(size_dhw)
        self.max_text_len = max_text_len
        self.seed = seed
        self.sent_level = sent_level
        self.fragment_separator = fragment_separator
        self.draw_false_image = draw_false_image
        self.image_only = image_only
        self.image_root = image_root
        self.on_bad_sample = on_bad_sample
        self.first_row = first_row
        self.fixed_draws = fixed_draws
        self.transform: VolumeTransform = create_transform(transform_keys, size_dhw)
        self._crop_fractions = _native_crop(table)
        self._window_hu = _window(table)

    def __len__(self) -> int:
        return len(self.table)

    def __repr__(self) -> str:
        size = "x".join(str(value) for value in self.size_dhw)
        return f"VolumeReportDataset({self.corpus}, {len(self)} studies, input DHW {size})"

    def __getitem__(self, index: int | SampleIndex) -> VolumeReportSample:
        row, epoch = index if isinstance(index, tuple) else (index, 0)
        epoch = 0 if self.fixed_draws else epoch
        bad: list[BadSample] = []
        for candidate in self._candidates(row):
            try:
                return self._sample(candidate, epoch, tuple(bad))
            except DataError as error:
                if self.on_bad_sample == "raise":
                    raise
                bad.append(BadSample(self.first_row + candidate, str(error)))
        raise DataError(
            f"{len(bad)} rows in a row cannot be read, the last: {bad[-1].reason}",
            "check the packed files with prepro/verify.py",
            case_id=f"{self.corpus} row {row}",
        )

    def text(self, row: int) -> str:
        """Return the cleaned report of a row, findings before impression (no pixels are touched)."""
        values = self.table.row(row)
        parts = (" ".join(clean_text(text) for text in row_text(values, name)) for name in ("findings", "impression"))
        return clean_text(" ".join(parts))

    def image(self, row: int) -> torch.Tensor:
        """Return the volume of a row as in the first epoch, float32 ``[D, 1, H, W]`` in [0, 1]; no text is touched.

        Raises:
            DataError: the row cannot be read.
        """
        return self._image(self.table.row(row), self.first_row + row, epoch=0)

    def _candidates(self, row: int) -> list[int]:
        """The row asked for, then its replacements in an order fixed by (seed, row)."""
        if self.on_bad_sample == "raise" or len(self) == 1:
            return [row]
        rng = sample_generator(self.seed, 0, self.first_row + row, "replacement")
        others = min(MAX_REPLACEMENTS, len(self) - 1)
        steps = rng.choice(len(self) - 1, size=others, replace=False) + 1
        return [row, *((row + int(step)) % len(self) for step in steps)]

    def _sample(self, row: int, epoch: int, bad: tuple[BadSample, ...]) -> VolumeReportSample:
        place = self.first_row + row
        values = self.table.row(row)
        return VolumeReportSample(
            image=self._image(values, place, epoch),
            report=self._report(values, place, epoch),
            labels=_labels(values),
            index=place,
            image_id=values["image_id"],
            patient_id=values.get("patient_id") or values["image_id"],
            corpus=self.corpus,
            mlm_seed=sample_seed(self.seed, epoch, place, "words"),
            cell_seed=sample_seed(self.seed, epoch, place, "cells"),
            report_key=_report_key(values),
            false_image=self._false_images(row, epoch) if self.draw_false_image else None,
            bad=bad,
        )

    def _image(self, values: dict[str, Any], place: int, epoch: int) -> torch.Tensor:
        rng = sample_generator(self.seed, epoch, place, "transform")
        image = values["image"]
        if isinstance(image, np.ndarray):
            volume = self.transform(to_unit_range(self._cropped(image, values), self._window_hu), rng)
        elif image is None:
            volume = self.transform(load_npz(values["image_id"], self.image_root, self.size_dhw), rng)
        else:
            volume = self.transform(decode_slices(image, values["image_id"], self.size_dhw), rng)
        return torch.from_numpy(np.ascontiguousarray(volume))[:, None]

    def _cropped(self, image: np.ndarray, values: dict[str, Any]) -> np.ndarray:
        if self._crop_fractions is None:
            return image
        try:
            return centre_crop(image, self._crop_fractions)
        except ValueError as problem:
            raise DataError(str(problem), "leave the scan out", case_id=values["image_id"]) from problem

    def _report(self, values: dict[str, Any], place: int, epoch: int) -> ReportEncoding:
        fragments: dict[str, list[str]] = {"findings_sen": [], "impression_sen": []}
        for section in ("findings", "impression"):
            # a section that is only a missing-value word ("nan") has no text, whatever its fragments say
            if not self.image_only and any(clean_text(text) for text in row_text(values, section)):
                fragments[f"{section}_sen"] = row_text(values, f"{section}_sen")
        return encode_report(
            self.tokenizer,
            **fragments,
            max_text_len=self.max_text_len,
            sent_level=self.sent_level,
            fragment_separator=self.fragment_separator,
            rng=random.Random(sample_seed(self.seed, epoch, place, "sentences")),
        )

    def _false_images(self, row: int, epoch: int) -> torch.Tensor:
        rng = sample_generator(self.seed, epoch, self.first_row + row, "false_image")
        steps = rng.choice(len(self) - 1, size=self.draw_false_image, replace=False) + 1
        others = [(row + int(step)) % len(self) for step in steps]
        return torch.stack([self._image(self.table.row(i), self.first_row + i, epoch) for i in others])


def _report_key(values: dict[str, Any]) -> int:
    """Number of the cleaned findings and impression: 63 bits of their digest."""
    texts = [clean_text(text) for name in ("findings", "impression") for text in row_text(values, name)]
    return int.from_bytes(hashlib.blake2b("\n".join(texts).encode(), digest_size=8).digest()) >> 1


def _labels(values: dict[str, Any]) -> torch.Tensor:
    labels = values.get("labels") or [UNKNOWN_LABEL] * len(CT_RATE_LABELS)
    if len(labels) != len(CT_RATE_LABELS):
        raise DataError(
            f"{len(labels)} labels, expected {len(CT_RATE_LABELS)}", "pack the file again", case_id=values["image_id"]
        )
    return torch.tensor(labels, dtype=torch.int8)


def _native_crop(table: ArrowTable) -> tuple[float, ...] | None:
    """Centre crop that rows of whole volumes (``store=native``) still need; None where they hold the crop."""
    geometry = json.loads(table.metadata.get("mg3d.geometry", "{}"))
    return tuple(geometry["crop_fractions"]) if geometry.get("store") == "native" else None


def _window(table: ArrowTable) -> tuple[int, int]:
    """The window these files were packed with; each corpus keeps its own."""
    recorded = table.metadata.get("mg3d.window_hu")
    return (parse_window(recorded) if recorded else None) or WINDOW_HU


class ConcatReports(torch.utils.data.Dataset):
    """Several corpora behind one row number; ``index`` of a sample is the row in the concatenation.

    Args:
        datasets: the corpora; each must have been built with the matching ``first_row``.

    Raises:
        ValueError: no dataset, or ``first_row`` values that do not follow each other.
    """

    def __init__(self, datasets: Sequence[VolumeReportDataset]) -> None:
        expected = 0
        for part in datasets:
            if part.first_row != expected:
                raise ValueError(f"{part.corpus} starts at row {part.first_row}, expected {expected}")
            expected += len(part)
        if not datasets:
            raise ValueError("no dataset to concatenate")
        self.datasets = list(datasets)
        self._ends = np.cumsum([len(part) for part in datasets])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __repr__(self) -> str:
        return " + ".join(repr(part) for part in self.datasets)

    def __getitem__(self, index: int | SampleIndex) -> VolumeReportSample:
        row, epoch = index if isinstance(index, tuple) else (index, 0)
        part = self._part(row)
        return part[SampleIndex(row - part.first_row, epoch)]

    def text(self, row: int) -> str:
        """Return the cleaned report of a row."""
        part = self._part(row)
        return part.text(row - part.first_row)

    def _part(self, row: int) -> VolumeReportDataset:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        return self.datasets[int(np.searchsorted(self._ends, row, side="right"))]
