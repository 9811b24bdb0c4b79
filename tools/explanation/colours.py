"""Two colour scales as tables of 256 colours with opacity, shared by the pictures and the page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from PIL import Image

STEPS: Final = 256
_RISING: Final = ((30, 10, 70), (125, 30, 109), (212, 72, 66), (248, 150, 40), (255, 221, 60))
_DIVERGING: Final = ((20, 75, 200), (90, 160, 255), (245, 245, 245), (255, 120, 80), (205, 20, 30))


@dataclass(frozen=True)
class Scale:
    """A colour scale.

    Attributes:
        name: ``rising`` (low to high) or ``diverging`` (below and above zero; zero is transparent).
        table: uint8 [256, 4] red, green, blue, opacity.
    """

    name: str
    table: np.ndarray

    def paint(self, values: np.ndarray, low: float, high: float) -> np.ndarray:
        """Colour values: the same shape with a last axis of red, green, blue, opacity (uint8)."""
        share = (values - low) / max(high - low, 1e-12)
        return self.table[np.clip(np.rint(share * (STEPS - 1)), 0, STEPS - 1).astype(np.intp)]


def _table(anchors: tuple[tuple[int, int, int], ...], opacity: np.ndarray) -> np.ndarray:
    places, wanted = np.linspace(0, 1, len(anchors)), np.linspace(0, 1, STEPS)
    colours = [np.interp(wanted, places, channel) for channel in np.asarray(anchors, float).T]
    return np.rint(np.stack([*colours, 255 * opacity], axis=1)).astype(np.uint8)


RISING: Final = Scale("rising", _table(_RISING, np.linspace(0.45, 1, STEPS)))
DIVERGING: Final = Scale("diverging", _table(_DIVERGING, np.abs(np.linspace(-1, 1, STEPS)) ** 0.5))


@dataclass(frozen=True)
class Contrast:
    """One way of showing the gates.

    Attributes:
        key: short name, part of file names.
        title: words for a reader.
        note: what the numbers are, one sentence.
        scale: its colours.
        values: maps [S, D', H', W'].
        low: value of the first colour.
        high: value of the last colour.
    """

    key: str
    title: str
    note: str
    scale: Scale
    values: np.ndarray
    low: float
    high: float


def rising_contrast(key: str, title: str, note: str, values: np.ndarray) -> Contrast:
    """Values from their smallest to their largest over all sentences."""
    low, high = float(values.min()), float(values.max())
    return Contrast(key, title, note, RISING, values, low, max(high, low + 1e-6))


def diverging_contrast(key: str, title: str, note: str, values: np.ndarray) -> Contrast:
    """Values on both sides of zero, to the same limit on either side."""
    limit = max(float(np.abs(values).max()), 1e-6)
    return Contrast(key, title, note, DIVERGING, values, -limit, limit)


def blend(grey: Image.Image, colours: np.ndarray, opacity: float) -> Image.Image:
    """Lay colours [height, width, 4] over a grey picture of the same size.

    Args:
        grey: 8-bit picture.
        colours: from :meth:`Scale.paint`.
        opacity: factor on the colours' own opacity, 0 to 1.
    """
    base = np.asarray(grey, np.float32)[..., None]
    alpha = colours[..., 3:].astype(np.float32) / 255 * opacity
    mixed = base * (1 - alpha) + colours[..., :3] * alpha
    return Image.fromarray(np.rint(mixed).astype(np.uint8), "RGB")
