"""Scans kept as one grey picture a slice, in folders or inside zip files that need not be unpacked."""

from __future__ import annotations

import logging
import re
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from mg3d.datasets.fitting import linear_taps
from mg3d.errors import DataError
from mg3d.paths import visible_files
from mg3d.scans.folders import PassedOver, walk_folders
from mg3d.scans.grey_slices import grey_pixels, natural_key

__all__ = ["DEPTH_RULES", "SliceSeries", "find_series", "read_slices", "series_to_array"]

SLICE = re.compile(r"(?:^|/)(?P<folder>[^/]+/[^/]+/[^/]+)/[^/]+\.(?:png|jpe?g|bmp|tiff?)$", re.IGNORECASE)
_HIDDEN = re.compile(r"(?:^|/)(?:\.(?!/)|__MACOSX/)")  # companions of macOS, folders of other tools
DEPTH_RULES = ("linear", "index")
logger = logging.getLogger(__name__)
_AGAIN = "download the file again"


@dataclass(frozen=True)
class SliceSeries:
    """One scan.

    Attributes:
        parts: names of the three folders above its slices, outermost first.
        container: the zip file, or the folder that was searched.
        slices: names inside the container, in the order of their numbers.
    """

    parts: tuple[str, str, str]
    container: Path
    slices: tuple[str, ...]


def find_series(root: Path) -> list[SliceSeries]:
    """Scans below a folder, and in the zip files directly in it, by their last three folders; no picture is read.

    A scan that is there packed and unpacked counts once.

    Raises:
        DataError: a zip file that cannot be opened.
    """
    found: dict[tuple[str, ...], tuple[Path, list[str]]] = {}
    for container in (*visible_files(root, "*.zip"), root):
        names = _names_in_zip(container) if container.is_file() else _names_in_folder(container)
        for name in names:
            match = None if _HIDDEN.search(name) else SLICE.search(name)
            if match:
                key = tuple(match["folder"].split("/"))
                place, slices = found.setdefault(key, (container, []))
                if place == container:
                    slices.append(name)
    return [
        SliceSeries((key[0], key[1], key[2]), container, tuple(sorted(slices, key=natural_key)))
        for key, (container, slices) in sorted(found.items(), key=lambda item: natural_key("/".join(item[0])))
    ]


def _names_in_zip(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (OSError, zipfile.BadZipFile) as problem:
        raise DataError(f"no readable zip file ({problem})", _AGAIN, path=str(path)) from None


def _names_in_folder(root: Path) -> Iterator[str]:
    passed_over = PassedOver()
    for folder, files in walk_folders(root, passed_over):
        prefix = folder.relative_to(root).as_posix()
        yield from (f"{prefix}/{name}" for name in files)
    for line in passed_over.lines():
        logger.warning("%s", line)


def read_slices(series: SliceSeries, indices: Sequence[int]) -> Iterator[np.ndarray]:
    """Yield the wanted slices, uint8 [H, W].

    Raises:
        DataError: a slice is damaged or no picture; the message names it.
    """
    archive = zipfile.ZipFile(series.container) if series.container.is_file() else None
    try:
        for index in indices:
            name = series.slices[index]
            try:
                data = archive.read(name) if archive else (series.container / name).read_bytes()
            except (OSError, ValueError, zipfile.BadZipFile) as e:
                raise DataError(f"{name} cannot be read ({e})", _AGAIN, path=str(series.container)) from None
            yield grey_pixels(data, path=str(series.container), name=name)
    finally:
        if archive:
            archive.close()


def series_to_array(series: SliceSeries, depth: int, size: int, rule: str = "linear") -> np.ndarray:
    """Bring a scan to a fixed number of slices and a fixed width.

    Args:
        series: the scan.
        depth: slices of the result.
        size: rows and columns of the result; pictures of another size are resized (linear).
        rule: ``linear`` interpolates between neighbouring slices, ``index`` takes evenly spaced ones.

    Returns:
        uint8 [depth, size, size], in the order of the slices.

    Raises:
        DataError: a slice cannot be read, or there is no such rule.
    """
    if rule not in DEPTH_RULES:
        raise DataError(f"depth rule {rule!r} is unknown", f"choose {' or '.join(DEPTH_RULES)}")
    count = len(series.slices)
    lower, upper, share = linear_taps(count, depth)
    if rule == "index":
        lower = upper = np.rint(np.linspace(0, count - 1, depth)).astype(np.int64)
    needed = sorted({*lower.tolist(), *upper.tolist()})
    planes = dict(zip(needed, (_resized(plane, size) for plane in read_slices(series, needed)), strict=True))
    out = np.empty((depth, size, size), dtype=np.uint8)
    for k, (low, high, weight) in enumerate(zip(lower.tolist(), upper.tolist(), share, strict=True)):
        near, far = planes[low].astype(np.float32), planes[high].astype(np.float32)
        out[k] = np.rint(near + weight * (far - near))
    return out


def _resized(plane_HW: np.ndarray, size: int) -> np.ndarray:
    if plane_HW.shape == (size, size):
        return plane_HW
    return np.asarray(Image.fromarray(plane_HW).resize((size, size), Image.Resampling.BILINEAR))
