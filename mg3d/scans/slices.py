"""Slices as a radiologist expects to see them: true proportions, known directions, a window and a millimetre scale.

Volumes are ``[D, H, W]`` in canonical order (z to superior, y to posterior, x to the patient's left). Display follows
the radiological convention: axial seen from the feet, coronal from the front, both with the patient's right on the
left of the picture; sagittal from the left side, front on the left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from PIL import Image, ImageDraw, ImageFont

MAX_SIDE_PX: Final = 320
MIN_SIDE_PX: Final = 128
OVERVIEW_SIDE_PX: Final = 400
THUMBNAIL_PX: Final = 192
STRIP_PIXELS: Final = 2_000_000
MAX_FRAMES: Final = 32
SCALE_BAR_STEPS_MM: Final = (200, 100, 50, 20, 10, 5, 2, 1)
_GAP_PX: Final = 8
_INK: Final = "#ebebeb"


@dataclass(frozen=True)
class Window:
    """A display window.

    Attributes:
        key: short name, part of file names.
        center: middle value (HU, or grey level).
        width: values from black to white.
    """

    key: str
    center: float
    width: float

    @property
    def low(self) -> float:
        """The value shown black."""
        return self.center - self.width / 2

    @property
    def high(self) -> float:
        """The value shown white."""
        return self.center + self.width / 2

    def grey(self, values: np.ndarray) -> np.ndarray:
        """Map values to uint8 grey, the same shape."""
        scaled = (values.astype(np.float32) - np.float32(self.low)) * np.float32(255.0 / self.width)
        return np.rint(np.clip(scaled, 0.0, 255.0)).astype(np.uint8)


HU_WINDOWS: Final = {
    "lung": Window("lung", -600, 1500),
    "mediastinum": Window("mediastinum", 40, 400),
    "bone": Window("bone", 400, 1800),
    "full": Window("full", 0, 2000),
}
FULL_WINDOW: Final = HU_WINDOWS["full"]
SHOWN_WINDOWS: Final = ("lung", "mediastinum", "full")
GREY_WINDOW: Final = Window("grey", 127.5, 255)


def full_window(limits_hu: tuple[float, float]) -> Window:
    """The window that shows every value between two limits, lower first."""
    low, high = limits_hu
    return Window(FULL_WINDOW.key, (low + high) / 2, high - low)


@dataclass(frozen=True)
class Plane:
    """One of the three viewing planes.

    Attributes:
        name: axial, coronal or sagittal.
        axis: the axis (0 z, 1 y, 2 x) that is cut.
        rows: the axis that runs down the picture.
        columns: the axis that runs to the right.
        letters: patient directions at the top, right, bottom and left edge.
    """

    name: str
    axis: int
    rows: int
    columns: int
    letters: tuple[str, str, str, str]


PLANES: Final = (
    Plane("axial", 0, 1, 2, ("A", "L", "P", "R")),
    Plane("coronal", 1, 0, 2, ("S", "L", "I", "R")),
    Plane("sagittal", 2, 0, 1, ("S", "P", "I", "A")),
)


def cut(voxels: np.ndarray, plane: Plane, index: int) -> np.ndarray:
    """Return one slice as it is displayed.

    Args:
        voxels: ``[D, H, W]``.
        plane: the plane.
        index: position along its axis.

    Returns:
        two axes (picture rows, columns), a view; superior is up where the rows run along z.
    """
    picture = np.take(voxels, index, axis=plane.axis) if plane.axis else voxels[index]
    return picture[::-1] if plane.rows == 0 else picture


def extent_mm(shape: Sequence[int], spacing_mm: Sequence[float]) -> tuple[float, float, float]:
    """Size of the grid along (z, y, x) in mm."""
    depth, height, width = (size * step for size, step in zip(shape, spacing_mm, strict=True))
    return depth, height, width


def pixel_mm(
    shape: Sequence[int], spacing_mm: Sequence[float], low: int = MIN_SIDE_PX, high: int = MAX_SIDE_PX
) -> float:
    """Size of a square picture pixel in mm: the finest voxel, with the longest side between ``low`` and ``high``."""
    longest = max(extent_mm(shape, spacing_mm))
    return min(max(min(spacing_mm), longest / high), longest / low)


def frame_size(plane: Plane, extents: Sequence[float], step_mm: float) -> tuple[int, int]:
    """Width and height in pixels of a frame with square pixels of ``step_mm``."""
    return max(round(extents[plane.columns] / step_mm), 1), max(round(extents[plane.rows] / step_mm), 1)


def frame_positions(size: int, frame_pixels: int, most: int = MAX_FRAMES) -> list[int]:
    """Choose slices spread evenly over an axis, the middle one included: as many as the size of a strip allows."""
    count = max(min(size, most, STRIP_PIXELS // max(frame_pixels, 1)), 1)
    if count == size:
        return list(range(size))
    half = (count - 1) // 2
    step = size / count
    return [min(max(round(size // 2 + (k - half) * step), 0), size - 1) for k in range(count)]


def draw_frame(voxels: np.ndarray, plane: Plane, index: int, window: Window, size: tuple[int, int]) -> Image.Image:
    """Return one slice in a window as an 8-bit picture of ``size`` (width, height)."""
    picture = Image.fromarray(np.ascontiguousarray(window.grey(cut(voxels, plane, index))))
    return picture.resize(size, Image.Resampling.BICUBIC)


def draw_strip(
    voxels: np.ndarray, plane: Plane, positions: Sequence[int], window: Window, size: tuple[int, int]
) -> Image.Image:
    """Stack slices from top to bottom in one picture: the frames the viewer steps through."""
    strip = Image.new("L", (size[0], size[1] * len(positions)))
    for place, index in enumerate(positions):
        strip.paste(draw_frame(voxels, plane, index, window, size), (0, place * size[1]))
    return strip


def scale_bar_mm(width_mm: float) -> int:
    """Length of the scale bar in mm: the longest round number within a third of the picture (at least 1)."""
    return next((step for step in SCALE_BAR_STEPS_MM if step <= width_mm / 3), SCALE_BAR_STEPS_MM[-1])


def draw_overview(voxels: np.ndarray, spacing_mm: Sequence[float], window: Window) -> Image.Image:
    """Return the three middle slices side by side, at one scale, with direction letters and a scale bar.

    Args:
        voxels: ``[D, H, W]``.
        spacing_mm: (z, y, x).
        window: what is black and what is white.
    """
    extents = extent_mm(voxels.shape, spacing_mm)
    step = pixel_mm(voxels.shape, spacing_mm, OVERVIEW_SIDE_PX, OVERVIEW_SIDE_PX)
    frames = [
        draw_frame(voxels, plane, voxels.shape[plane.axis] // 2, window, frame_size(plane, extents, step))
        for plane in PLANES
    ]
    width = sum(frame.width for frame in frames) + _GAP_PX * (len(frames) - 1)
    picture = Image.new("L", (width, max(frame.height for frame in frames)))
    left = 0
    bar = scale_bar_mm(min(frame.width for frame in frames) * step)
    for plane, frame in zip(PLANES, frames, strict=True):
        annotate(frame, plane, step, bar)
        picture.paste(frame, (left, 0))
        left += frame.width + _GAP_PX
    return picture


def annotate(frame: Image.Image, plane: Plane, step_mm: float, length_mm: int) -> None:
    """Write the four direction letters and a scale bar of true length into a picture.

    Args:
        frame: grey or colour picture, changed in place.
        plane: which letters.
        step_mm: size of a pixel.
        length_mm: length of the scale bar.
    """
    pen = ImageDraw.Draw(frame)
    font = ImageFont.load_default(size=16)
    width, height = frame.size
    top, right, bottom, left = plane.letters
    places = {(width // 2, 4): (top, "mt"), (width - 5, height // 2): (right, "rm")}
    places |= {(width // 2, height - 4): (bottom, "mb"), (5, height // 2): (left, "lm")}
    for place, (letter, anchor) in places.items():
        pen.text(place, letter, fill=_INK, font=font, anchor=anchor, stroke_width=2, stroke_fill="black")
    bar = max(round(length_mm / step_mm), 1)
    row = height - 12
    pen.rectangle((9, row - 1, 10 + bar, row + 3), fill="black")
    pen.rectangle((10, row, 10 + bar - 1, row + 2), fill="white")
    pen.text((10, row - 4), f"{length_mm} mm", fill=_INK, font=font, anchor="lb", stroke_width=2, stroke_fill="black")


def draw_thumbnail(voxels: np.ndarray, spacing_mm: Sequence[float], window: Window) -> Image.Image:
    """Return the middle axial slice, its longest side ``THUMBNAIL_PX`` pixels."""
    extents = extent_mm(voxels.shape, spacing_mm)
    size = frame_size(PLANES[0], extents, max(extents[1:]) / THUMBNAIL_PX)
    return draw_frame(voxels, PLANES[0], voxels.shape[0] // 2, window, size)
