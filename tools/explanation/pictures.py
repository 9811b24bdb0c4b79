"""One still picture per sentence: the three planes through its strongest place, gates laid over, numbers beside."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Final

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mg3d.inference.explanation import upsample_maps
from mg3d.scans.slices import (
    PLANES,
    Window,
    annotate,
    cut,
    draw_frame,
    extent_mm,
    frame_size,
    pixel_mm,
    scale_bar_mm,
)
from tools.explanation.colours import STEPS, Contrast, blend

SIDE_PX: Final = 300
OPACITY: Final = 0.55
_GAP, _BAR_WIDTH, _BAR_ROOM = 8, 14, 86
_PAPER, _INK, _QUIET = (17, 20, 24), (230, 233, 236), (154, 165, 176)
_LINE_CHARACTERS: Final = 110


def draw_sentence(
    voxels: np.ndarray,
    spacing_mm: Sequence[float],
    window: Window,
    contrasts: Sequence[Contrast],
    number: int,
    title: str,
    place: Sequence[float],
) -> Image.Image:
    """Draw one row of planes for every contrast.

    Args:
        voxels: [D, H, W], the part of the scan that the model sees.
        spacing_mm: (z, y, x).
        window: what is black and what is white.
        contrasts: maps to lay over; all share one grid.
        number: which sentence.
        title: its text.
        place: where the planes cut, shares (z, y, x) of the volume.
    """
    step = pixel_mm(voxels.shape, spacing_mm, SIDE_PX, SIDE_PX)
    index = [min(int(share * size), size - 1) for share, size in zip(place, voxels.shape, strict=True)]
    rows = [_draw_row(voxels, spacing_mm, window, contrast, number, index, step) for contrast in contrasts]
    lines = textwrap.wrap(title, _LINE_CHARACTERS)[:3]
    head = 26 * len(lines) + 30
    picture = Image.new("RGB", (rows[0].width, head + sum(row.height + 26 for row in rows)), _PAPER)
    pen = ImageDraw.Draw(picture)
    for line, text in enumerate(lines):
        pen.text((_GAP, 6 + 26 * line), text, fill=_INK, font=ImageFont.load_default(size=18))
    cuts = zip("zyx", index, spacing_mm, strict=True)
    where = ", ".join(f"{axis} {row * edge:.0f} mm" for axis, row, edge in cuts)
    words = f"slices at {where} from the lowest, foremost, rightmost point shown; {window.key} window"
    pen.text((_GAP, head - 24), words, fill=_QUIET, font=ImageFont.load_default(size=14))
    top = head
    for contrast, row in zip(contrasts, rows, strict=True):
        pen.text((_GAP, top + 4), contrast.title, fill=_INK, font=ImageFont.load_default(size=15))
        picture.paste(row, (0, top + 26))
        top += row.height + 26
    return picture


def _draw_row(
    voxels: np.ndarray,
    spacing_mm: Sequence[float],
    window: Window,
    contrast: Contrast,
    number: int,
    index: Sequence[int],
    step: float,
) -> Image.Image:
    extents = extent_mm(voxels.shape, spacing_mm)
    values = upsample_maps(contrast.values[number : number + 1], voxels.shape)[0]
    frames = []
    for plane in PLANES:
        size = frame_size(plane, extents, step)
        grey = draw_frame(voxels, plane, index[plane.axis], window, size)
        shown = Image.fromarray(np.ascontiguousarray(cut(values, plane, index[plane.axis])))
        enlarged = np.asarray(shown.resize(size, Image.Resampling.BILINEAR))
        frame = blend(grey, contrast.scale.paint(enlarged, contrast.low, contrast.high), OPACITY)
        annotate(frame, plane, step, scale_bar_mm(min(extents)))
        frames.append(frame)
    height = max(frame.height for frame in frames)
    row = Image.new("RGB", (sum(frame.width + _GAP for frame in frames) + _BAR_ROOM, height + _GAP), _PAPER)
    left = 0
    for frame in frames:
        row.paste(frame, (left, (height - frame.height) // 2))
        left += frame.width + _GAP
    _draw_bar(row, contrast, left + 4, height)
    return row


def _draw_bar(row: Image.Image, contrast: Contrast, left: int, height: int) -> None:
    """Paint the colours from top (high) to bottom (low) with their values beside."""
    column = contrast.scale.table[np.linspace(STEPS - 1, 0, height - 16).astype(int)][:, None]
    grey = Image.new("L", (_BAR_WIDTH, height - 16), 90)
    row.paste(blend(grey, np.repeat(column, _BAR_WIDTH, axis=1), 1.0), (left, 8))
    pen = ImageDraw.Draw(row)
    font = ImageFont.load_default(size=13)
    middle = (contrast.low + contrast.high) / 2
    for value, place in ((contrast.high, 8), (middle, height // 2), (contrast.low, height - 8)):
        pen.text((left + _BAR_WIDTH + 5, place), value_text(value, contrast), fill=_INK, font=font, anchor="lm")


def value_text(value: float, contrast: Contrast) -> str:
    """A gate as text with as many digits as the colour scale resolves."""
    span = contrast.high - contrast.low
    digits = 2 if span >= 0.1 else 3 if span >= 0.01 else 4 if span >= 0.001 else 5
    text = f"{value:.{digits}f}" if contrast.low >= 0 else f"{value:+.{digits}f}"
    return "0" if not text.strip("+-0.") else text


def small_text(value: float) -> str:
    """A small positive number with two digits that count."""
    return f"{value:.2g}" if value >= 1e-4 else f"{value:.0e}"
