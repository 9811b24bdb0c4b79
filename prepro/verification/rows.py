"""Checks of one row's content, after its checksum and layout have been found right.

Axis legend: D depth (z), H rows (y), W columns (x).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from mg3d.datasets.arrow_schema import parse_window
from mg3d.datasets.labels import UNKNOWN_LABEL
from mg3d.datasets.report_text import clean_text
from mg3d.errors import DataError
from mg3d.scans.grey_slices import grey_pixels
from mg3d.scans.hounsfield import AIR_HU, MIN_AIR_SHARE, MIN_TISSUE_SHARE, TISSUE_HU, tissue_shares
from prepro.verification.findings import Finding, Severity, finding

SECTIONS: Final = ("findings", "impression")
NO_LETTER: Final = re.compile(r"[\W_]+")
EXTENT_RANGE_MM: Final = (30.0, 1500.0)
MAX_EMPTY_SLICES: Final = 0.25
LONGEST_MISSING_WORD: Final = 32
SHARE_STEP: Final = 2  # every second voxel along each axis is enough to see air and tissue

Problem = tuple[str, str]


@dataclass(frozen=True)
class FileContext:
    """What the rows of a file must agree with.

    Attributes:
        path: the file.
        corpus: corpus of the file name, empty when the name does not say.
        split: split of the file name, empty when the name does not say.
        geometry: ``mg3d.geometry`` of the schema; empty in the published layout.
        window: ``mg3d.window_hu`` of the schema.
        label_names: ``mg3d.label_names`` of the schema.
        empty_reports_wanted: whether the file was packed with ``--empty-report keep``.
    """

    path: str
    corpus: str = ""
    split: str = ""
    geometry: Mapping[str, Any] | None = None
    window: str = ""
    label_names: Sequence[str] = ()
    empty_reports_wanted: bool = False

    @property
    def published(self) -> bool:
        """Whether the file has the published layout."""
        return self.geometry is None


def check_row(row: Mapping[str, Any], number: int, context: FileContext) -> Iterator[Finding]:
    """Check one readable row.

    Args:
        row: from :meth:`mg3d.datasets.arrow_table.ArrowTable.row`.
        number: its number in the file.
        context: what it must agree with.

    Yields:
        what is wrong with it.
    """
    case = str(row["image_id"] or "")
    for code, message in _problems(row, context):
        severity: Severity | None = None
        if context.published and code in ("text_missing_word", "split_differs"):
            severity = "warning"
        if code == "empty_report" and context.empty_reports_wanted:
            severity = "note"
        yield finding(code, message, path=context.path, row=number, case=case, severity=severity)


def _problems(row: Mapping[str, Any], context: FileContext) -> Iterator[Problem]:
    yield from _identity_problems(row, context)
    yield from _text_problems(row)
    if context.geometry is None:
        yield from _slice_problems(row.get("image"))
    else:
        yield from _voxel_problems(row["image"], context.geometry, context.window)
        yield from _spacing_problems(row["spacing_mm"], row["image_shape"])
        yield from _label_problems(row["labels"], context.label_names)


def is_empty_report(row: Mapping[str, Any]) -> bool:
    """Return whether a row has no text in either section."""
    return not any(_says_something(text) for name in SECTIONS for text in row[name] or [])


def _says_something(text: str | None) -> bool:
    """Whether a text is more than blanks or a word for a missing value; those words are all short."""
    return text is not None and (len(text.strip()) > LONGEST_MISSING_WORD or bool(clean_text(text)))


def _identity_problems(row: Mapping[str, Any], context: FileContext) -> Iterator[Problem]:
    names = ("image_id",) if context.published else ("image_id", "patient_id")
    for name in names:
        if not str(row[name] or "").strip():
            yield "id_missing", f"{name} is empty"
    if context.split and row["split"] != context.split:
        yield "split_differs", f"split is {row['split']!r}, the file is {context.split!r}"
    if context.corpus and not context.published and row["corpus"] != context.corpus:
        yield "split_differs", f"corpus is {row['corpus']!r}, the file is {context.corpus!r}"


def _voxel_problems(image_DHW: np.ndarray, geometry: Mapping[str, Any], window: str) -> Iterator[Problem]:
    size = [int(value) for value in geometry.get("size", ())]
    if geometry.get("store") != "native" and list(image_DHW.shape) != size:
        yield "shape_differs", f"shape {list(image_DHW.shape)}, the geometry says {size}"
    window_hu = parse_window(window)
    if image_DHW.dtype != (np.uint8 if window_hu is None else np.int16):
        yield "type_differs", f"type {image_DHW.dtype}, the window is {window}"
        return
    slices = image_DHW.reshape(len(image_DHW), -1)
    lows, highs = slices.min(axis=1), slices.max(axis=1)
    low, high = int(lows.min()), int(highs.max())
    if low == high:
        yield "constant_volume", f"every voxel is {low}"
        return
    empty = int(np.count_nonzero(lows == highs))
    if empty > MAX_EMPTY_SLICES * len(slices):
        yield "empty_slices", f"{empty} of {len(slices)} slices hold one single value"
    if window_hu is not None:
        yield from _hounsfield_problems(image_DHW, (low, high), window_hu)


def _slice_problems(slices: Sequence[bytes] | None) -> Iterator[Problem]:
    for number, data in enumerate(slices or ()):
        try:
            grey_pixels(data or b"", name=f"slice {number} of {len(slices or ())}")
        except DataError as problem:
            yield "slice_undecodable", problem.message
            return


def _hounsfield_problems(
    image_DHW: np.ndarray, values_hu: tuple[int, int], window_hu: tuple[int, int]
) -> Iterator[Problem]:
    (low, high), (lowest, highest) = values_hu, window_hu
    if low < lowest or high > highest:
        yield "outside_window", f"values {low}..{high} HU, the window is {lowest}..{highest}"
    air, tissue = tissue_shares(image_DHW[::SHARE_STEP, ::SHARE_STEP, ::SHARE_STEP])
    # a window that cuts a tissue off says nothing about it
    no_air = lowest <= AIR_HU[1] and air < MIN_AIR_SHARE
    no_tissue = lowest <= TISSUE_HU[1] and highest >= TISSUE_HU[0] and tissue < MIN_TISSUE_SHARE
    if no_air or no_tissue:
        yield "implausible_hu", f"values {low}..{high}: {air:.1%} look like air or lung, {tissue:.1%} like soft tissue"


def _spacing_problems(spacing_mm: Sequence[float], shape: Sequence[int]) -> Iterator[Problem]:
    if len(spacing_mm) != 3 or not all(math.isfinite(value) and value > 0 for value in spacing_mm):
        yield "spacing_invalid", f"spacing {list(spacing_mm)}"
        return
    extent = [size * step for size, step in zip(shape, spacing_mm, strict=True)]
    if min(extent) < EXTENT_RANGE_MM[0] or max(extent) > EXTENT_RANGE_MM[1]:
        yield "spacing_odd", "the volume measures " + " x ".join(f"{value:.4g}" for value in extent) + " mm (z, y, x)"


def _label_problems(labels: Sequence[int], names: Sequence[str]) -> Iterator[Problem]:
    if len(labels) not in (0, len(names)):
        yield "labels_invalid", f"{len(labels)} labels for {len(names)} names"
    odd = sorted({label for label in labels if label not in (0, 1, UNKNOWN_LABEL)}, key=str)
    if odd:
        yield "labels_invalid", f"label {', '.join(map(str, odd))}"


def _text_problems(row: Mapping[str, Any]) -> Iterator[Problem]:
    columns = ("caption", *SECTIONS, *(f"{name}_sen" for name in SECTIONS))
    for name in columns:
        texts = row[name]
        if texts is None or any(text is None for text in texts):
            yield "text_invalid", f"{name} holds a null"
            return
        if not name.endswith("_sen") and len(texts) != 1:
            yield "text_invalid", f"{name} holds {len(texts)} texts instead of one"
            return
        if not name.endswith("_sen") and any(text.strip() and not _says_something(text) for text in texts):
            yield "text_missing_word", f"{name} is a word for a missing value"
    if is_empty_report(row):
        yield "empty_report", "neither findings nor impression"
        return
    for name in SECTIONS:
        if _letters(row[name]) != _letters(row[f"{name}_sen"]):
            yield "fragments_differ", f"{name}_sen does not hold the text of {name}"
    if _letters(row["caption"]) != _letters([*row["findings"], *row["impression"]]):
        yield "caption_differs", "caption is not findings followed by impression"


def _letters(texts: Sequence[str]) -> str:
    """Letters and digits alone: separators are dropped by the fragment rules on purpose."""
    return NO_LETTER.sub("", "".join(texts).casefold())
