"""The explanation as one HTML file: slices as inline pictures, maps as numbers, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from mg3d.inference.explanation import SentenceMaps, peak_place
from mg3d.scans.slices import PLANES, Window, draw_strip, pixel_mm, scale_bar_mm
from tools.explanation.colours import Contrast
from tools.explanation.pictures import small_text, value_text
from tools.gallery.book import PNG
from tools.gallery.charts import number
from tools.gallery.pages import TEMPLATES as GALLERY_TEMPLATES
from tools.gallery.pages import embed_json, pane_values, plan_panes

TEMPLATES: Final = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Explained:
    """Everything the page and the pictures show.

    Attributes:
        name: name of the scan.
        voxels: [D, H, W] in HU, the part of the scan that the model sees.
        spacing_mm: (z, y, x).
        maps: gates of the sentences.
        contrasts: ways of showing them.
        sections: F or I for every sentence.
        unseen: sentences beyond the model's longest text.
        facts: name and value, about scan, weights and maps.
        warnings: oddities of the scan.
        pictures: file names of the still pictures, one per sentence.
    """

    name: str
    voxels: np.ndarray
    spacing_mm: tuple[float, float, float]
    maps: SentenceMaps
    contrasts: tuple[Contrast, ...]
    sections: tuple[str, ...]
    unseen: tuple[str, ...] = ()
    facts: Sequence[tuple[str, str]] = ()
    warnings: Sequence[str] = ()
    pictures: Sequence[str] = field(default_factory=tuple)


def render_page(explained: Explained, windows: Sequence[Window]) -> str:
    """Return the page.

    Args:
        explained: what it shows.
        windows: HU windows to choose from; the first is shown first.
    """
    loader = FileSystemLoader([TEMPLATES, GALLERY_TEMPLATES])
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["number"] = number
    step = pixel_mm(explained.voxels.shape, explained.spacing_mm)
    panes = plan_panes(explained.voxels.shape, explained.spacing_mm, step)
    bar_mm = scale_bar_mm(min(pane.width_mm for pane in panes))
    strips = {
        pane.plane.name: [
            _data_uri(draw_strip(explained.voxels, pane.plane, pane.positions, window, pane.size_px))
            for window in windows
        ]
        for pane in panes
    }
    return environment.get_template("explanation.html").render(
        name=explained.name,
        css=_inline("gallery.css", GALLERY_TEMPLATES) + _inline("explanation.css"),
        scripts=[_inline("gallery.js", GALLERY_TEMPLATES), _inline("explanation.js")],
        panes=[pane_values(pane, bar_mm) for pane in panes],
        windows=windows,
        strips=strips,
        sentences=_sentences(explained),
        unseen=explained.unseen,
        contrasts=explained.contrasts,
        cells=cell_words(explained),
        flat=explained.maps.flat,
        spread=small_text(float(explained.maps.spread().max())),
        facts=explained.facts,
        warnings=explained.warnings,
        data=embed_json(_data(explained)),
    )


def cell_words(explained: Explained) -> str:
    """Size of a cell that one pass of the model tells apart, in mm (z, y, x)."""
    extents = [size * step for size, step in zip(explained.voxels.shape, explained.spacing_mm, strict=True)]
    cells = [extent / count for extent, count in zip(extents, explained.maps.token_grid, strict=True)]
    return " × ".join(f"{cell:.0f}" for cell in cells) + " mm"


def _sentences(explained: Explained) -> list[dict[str, Any]]:
    gates = explained.maps.gates
    means = gates.mean(axis=(1, 2, 3))
    high = float(means.max()) or 1.0
    return [
        {
            "section": section,
            "text": text,
            "mean": value_text(float(mean), explained.contrasts[0]),
            "spread": small_text(float(spread)),
            "percent": round(100 * float(mean) / high, 1),
            "picture": picture,
        }
        for section, text, mean, spread, picture in zip(
            explained.sections,
            explained.maps.sentences,
            means,
            explained.maps.spread(),
            explained.pictures or [""] * len(means),
            strict=True,
        )
    ]


def _data(explained: Explained) -> dict[str, Any]:
    """Numbers for the script: maps as base64 of float32, colours as lists."""
    return {
        "grid": list(explained.maps.gates.shape[1:]),
        "flat": explained.maps.flat,
        "planes": {p.name: {"axis": p.axis, "rows": p.rows, "columns": p.columns} for p in PLANES},
        "contrasts": [_contrast_data(contrast) for contrast in explained.contrasts],
    }


def _contrast_data(contrast: Contrast) -> Mapping[str, Any]:
    values = np.ascontiguousarray(contrast.values, dtype="<f4")
    return {
        "key": contrast.key,
        "values": base64.b64encode(values.tobytes()).decode("ascii"),
        "low": contrast.low,
        "high": contrast.high,
        "table": contrast.scale.table.reshape(-1).tolist(),
        "signed": contrast.low < 0,
        "peaks": [peak_place(sentence) for sentence in contrast.values],
    }


def _inline(name: str, folder: Path = TEMPLATES) -> Markup:
    return Markup((folder / name).read_text(encoding="utf-8"))


def _data_uri(picture: Image.Image) -> str:
    stream = io.BytesIO()
    picture.save(stream, "PNG", **PNG)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii")
