"""The slices of a folder or file, and the one series among them that is read; what is left out is said.

A volume is never made of a part of a series: a file that could be one of its slices and cannot be read is refused, not
left out. Files that are plainly something else (texts, a DICOMDIR, dose reports, images of other modalities) are left
out with a warning, localizers are set aside by name.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mg3d.errors import DataError
from mg3d.scans.dicom_file import DICOM_SUFFIXES
from mg3d.scans.dicom_slice import UNKNOWN_KIND, NoSlice, Slice, read_slices
from mg3d.scans.folders import files_in
from mg3d.scans.raw_volume import DOWNLOAD_AGAIN

LARGEST = "largest"
MAX_SCOUT_SLICES = 3
MAX_LISTED_SERIES = 8
CROSSING = 0.7  # cosine between slice normals below which a slice cannot belong to the stack
GIVE_FOLDER = "give the folder of the whole series"
CHOOSE = f"choose one: --series UID or --series {LARGEST} (series=... in Python), or keep one series per folder"


def slices_at(place: Path, series: str, warnings: list[str]) -> list[Slice]:
    """Read the tags of a series.

    Args:
        place: the folder of the series, or one file that holds several slices.
        series: SeriesInstanceUID, ``largest``, or "" where there is only one.
        warnings: takes what was left out.

    Returns:
        the slices of one series, in no order.

    Raises:
        DataError: no CT there, several series and no choice, or a file that may be a slice of the series is unusable.
    """
    files = files_in(place, special=True) if place.is_dir() else [place]
    found = {path: read_slices(path) for path in files}
    others = [item for item in found.values() if isinstance(item, NoSlice)]
    slices = [item for items in found.values() if not isinstance(items, NoSlice) for item in items]
    if not slices:
        raise _nothing(place, others)
    _refuse_lost_slices(slices, others, place)
    if others:
        names = [item.path.name for item in others]
        warnings.append(f"{len(others)} files that are no CT slice left out ({some(names)})")
    chosen = _chosen(slices, series, place, warnings)
    _refuse_foreign_images(chosen, others, place)
    if len(chosen) == 1:
        raise DataError("one DICOM slice is no volume", GIVE_FOLDER, path=str(place))
    return chosen


def some(names: Sequence[str], limit: int = 3) -> str:
    """The first few of many names."""
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


def normal_of(item: Slice) -> np.ndarray:
    """Unit vector across a slice, LPS."""
    row, column = np.reshape(item.directions, (2, 3))
    return np.cross(row, column)


def _nothing(place: Path, others: Sequence[NoSlice]) -> DataError:
    kinds = Counter(item.kind for item in others if item.kind)
    if kinds:
        listed = some([f"{count} x {kind}" for kind, count in kinds.most_common()])
        return DataError(f"no CT image, but {listed}", "give a CT series", path=str(place))
    if place.is_file():
        return DataError("no DICOM file, or an empty one", DOWNLOAD_AGAIN, path=str(place))
    below = sorted(path.name for path in place.iterdir() if path.is_dir())
    where = f"here, but {len(below)} sub-folders ({some(below)})" if below else "in this folder"
    return DataError(f"no DICOM slice {where}", "give the folder of one series", path=str(place))


def _refuse_lost_slices(slices: Sequence[Slice], others: Sequence[NoSlice], place: Path) -> None:
    """Refuse files that are named like the slices, or are DICOM files cut short, and no slices."""
    patterns = {_pattern(item.path.name) for item in slices}
    lost = [item.path.name for item in others if _like_a_slice(item, patterns)]
    if lost:
        message = f"{len(lost)} files look like slices and are none ({some(lost)}): the series may be incomplete"
        raise DataError(message, "download the series again, or remove them", path=str(place))


def _like_a_slice(item: NoSlice, patterns: set[str]) -> bool:
    if item.kind:
        return item.kind == UNKNOWN_KIND
    return item.path.name.lower().endswith(DICOM_SUFFIXES) or _pattern(item.path.name) in patterns


def _refuse_foreign_images(chosen: Sequence[Slice], others: Sequence[NoSlice], place: Path) -> None:
    """Refuse images of another kind in the series that is read."""
    foreign = [f"{item.path.name}: {item.kind}" for item in others if item.series == chosen[0].series != ""]
    if foreign:
        message = f"{len(foreign)} images of the CT series are no CT images ({some(foreign)})"
        raise DataError(message, "remove them if they do not belong to it", path=str(place))


def _pattern(name: str) -> str:
    return re.sub(r"\d+", "#", name.lower())


def _chosen(slices: Sequence[Slice], wanted: str, place: Path, warnings: list[str]) -> list[Slice]:
    by_series: dict[str, list[Slice]] = {}
    for item in slices:
        by_series.setdefault(item.series, []).append(item)
    if "" in by_series and len(by_series) > 1:
        names = [item.name for item in by_series[""]]
        message = f"{len(names)} slices without SeriesInstanceUID beside those of a series ({some(names)})"
        raise DataError(message, "keep one series per folder", path=str(place))
    if wanted in by_series and wanted:
        _say_others(by_series, wanted, warnings)
        return by_series[wanted]
    if wanted not in ("", LARGEST):
        message = f"no series {wanted!r} among {len(by_series)}: {_listed(by_series)}"
        raise DataError(message, CHOOSE, path=str(place))
    aside: list[Slice] = []
    for uid, items in by_series.items():
        by_series[uid] = [item for item in items if not item.localizer]
        aside += [item for item in items if item.localizer]
    _set_crossing_aside(by_series, aside)
    by_series = {uid: items for uid, items in by_series.items() if items}
    if aside:
        warnings.append(f"{len(aside)} localizer images set aside ({some([item.name for item in aside])})")
    if not by_series:
        raise DataError(
            f"only localizer images ({some([item.name for item in aside])})", "give a CT series", path=str(place)
        )
    if len(by_series) == 1:
        return next(iter(by_series.values()))
    if wanted != LARGEST:
        raise DataError(f"{len(by_series)} series in one folder: {_listed(by_series)}", CHOOSE, path=str(place))
    largest = min(by_series, key=lambda uid: (-len(by_series[uid]), by_series[uid][0].number, uid))
    _say_others(by_series, largest, warnings)
    return by_series[largest]


def _set_crossing_aside(by_series: dict[str, list[Slice]], aside: list[Slice]) -> None:
    """Move up to three slices that cross all others, as localizers without that name do, out of the series."""
    placed = [item for items in by_series.values() for item in items if item.directions]
    if not placed:
        return
    usual = normal_of(max(placed, key=lambda item: sum(other.directions == item.directions for other in placed[:64])))
    crossing = [item for item in placed if abs(float(normal_of(item) @ usual)) < CROSSING]
    if len(crossing) <= MAX_SCOUT_SLICES < len(placed) - len(crossing):
        for item in crossing:
            by_series[item.series].remove(item)
        aside += crossing


def _say_others(by_series: dict[str, list[Slice]], chosen: str, warnings: list[str]) -> None:
    rest = {uid: items for uid, items in by_series.items() if uid != chosen}
    if rest:
        size = len(by_series[chosen])
        equal = [uid for uid, items in rest.items() if len(items) == size]
        tie = f"; {len(equal)} others have as many slices" if equal else ""
        warnings.append(f"series {chosen} of {size} slices read, left out: {_listed(rest)}{tie}")


def _listed(by_series: dict[str, list[Slice]]) -> str:
    ranked = sorted(by_series.items(), key=lambda entry: -len(entry[1]))
    shown = [_described(uid, items) for uid, items in ranked[:MAX_LISTED_SERIES]]
    return "; ".join(shown + (["..."] if len(ranked) > MAX_LISTED_SERIES else []))


def _described(uid: str, items: Sequence[Slice]) -> str:
    first = items[0]
    parts = [f"{uid or 'no UID'} {first.description!r}", f"no. {first.number}" if first.number else ""]
    parts.append(f"of {len(items)} slices")
    placed = [item for item in items if item.position and item.directions]
    if len(placed) > 1:
        heights = np.sort([float(normal_of(placed[0]) @ np.asarray(item.position)) for item in placed])
        parts.append(f"{np.median(np.diff(heights)):.3g} mm apart")
    parts.append(f"kernel {first.kernel}" if first.kernel else "")
    return " ".join(part for part in parts if part)
